"""Whether a file is a GGUF at all: the four bytes it begins with. What is in it is for those who read it."""

from __future__ import annotations

from pathlib import Path

from persona_edge.errors import ModelFileError, ModelNotFoundError

__all__ = ["check_is_gguf"]

_MAGIC = b"GGUF"


def check_is_gguf(path: Path) -> None:
    """ModelNotFoundError when there is no file at `path`, ModelFileError when it does not begin as a GGUF does."""
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder; give the path of a .gguf file in it")
    if not path.exists():
        raise ModelNotFoundError(f"no model file at {path}; check the path")
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start != _MAGIC:
        found = f"begins with {start!r}" if start else "is empty"
        raise ModelFileError(f"{path} is not a GGUF file: it {found}; download it again or give another file")
