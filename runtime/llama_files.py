"""Where a GGUF keeps each tensor: names, offsets and sizes, read by ggml's own reader without loading weights.

A model may be split over several files; `read_parts` finds them all from the first. What the weights mean is not
asked here.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from persona_edge.errors import ModelFileError
from persona_edge.gguf_magic import check_is_gguf
from persona_edge.runtime.llama_library import GgufInitParams, LlamaLibrary

__all__ = ["FileTensor", "ModelPart", "damaged", "read_parts"]


@dataclass(frozen=True)
class FileTensor:
    """A tensor's name, and where in its file its bytes lie."""

    name: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class ModelPart:
    """One file of a model, with its tensors in the file's order."""

    path: Path
    tensors: tuple[FileTensor, ...]


def read_parts(library: LlamaLibrary, path: Path) -> tuple[ModelPart, ...]:
    """Every file of the model whose first (usually only) file is `path`.

    Raises ModelNotFoundError for a part that is missing, ModelFileError for one that is damaged.
    """
    return tuple(ModelPart(part, tuple(_tensors(library, part))) for part in _split_paths(library, path))


def damaged(path: Path, reason: str) -> str:
    """What to tell the user about a file that cannot be read."""
    return f"{path} is damaged or incomplete: {reason or 'llama.cpp gives no reason'}; download it again"


def _split_paths(library: LlamaLibrary, path: Path) -> list[Path]:
    """The files of a model, by llama.cpp's rule: `name-00001-of-00003.gguf` and so on, loaded by naming the first."""
    stem, _, count = path.stem.rpartition("-of-")
    prefix, _, number = stem.rpartition("-")
    if not (prefix and len(number) == len(count) == 5 and (number + count).isdigit()):
        return [path]
    if int(number) != 1:
        raise ModelFileError(f"{path.name} is part {int(number)} of a split model; give the path of part 1")
    buffer = ctypes.create_string_buffer(len(os.fsencode(path)) + 64)
    parts = []
    for index in range(int(count)):
        library.api.llama_split_path(buffer, len(buffer), os.fsencode(path.with_name(prefix)), index, int(count))
        parts.append(Path(os.fsdecode(buffer.value)))
        check_is_gguf(parts[-1])
    return parts


def _tensors(library: LlamaLibrary, path: Path) -> list[FileTensor]:
    ggml = library.ggml
    library.listen()
    gguf = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
    if not gguf:
        raise ModelFileError(damaged(path, library.log.first_error()))
    try:
        start = ggml.gguf_get_data_offset(gguf)
        return [
            FileTensor(
                ggml.gguf_get_tensor_name(gguf, i).decode(),
                start + ggml.gguf_get_tensor_offset(gguf, i),
                ggml.gguf_get_tensor_size(gguf, i),
            )
            for i in range(ggml.gguf_get_n_tensors(gguf))
        ]
    except UnicodeDecodeError:
        raise ModelFileError(damaged(path, "a tensor's name is not UTF-8")) from None
    finally:
        ggml.gguf_free(gguf)
