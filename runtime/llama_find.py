"""Which libllama: the one that the app names, llama-cpp-python's, or a prebuilt one that needed no compiler.

Only files and package metadata are looked at; nothing is imported and nothing loaded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from persona_edge.errors import MissingDependencyError, ModelNotFoundError

__all__ = ["VARIABLE", "LibraryFile", "find_library", "installed_libraries"]

VARIABLE = "PERSONA_EDGE_LIBLLAMA"
_NAMES = ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll")


@dataclass(frozen=True)
class LibraryFile:
    """A libllama on disk; `package` and `version` say what it came with, as far as that is known."""

    path: Path
    package: str
    version: str = ""

    @property
    def name(self) -> str:
        """`llama-cpp-python 0.3.36`."""
        return f"{self.package} {self.version}".rstrip()

    @property
    def reinstall(self) -> str:
        """What to try when it does not load."""
        if not self.version:
            return "give the path of another build"
        options = "--force-reinstall --no-cache-dir " if self.package == "llama-cpp-python" else "--force-reinstall "
        return f"reinstall it with: pip install {options}{self.package}"


def find_library(wanted: str | os.PathLike[str] | None = None) -> LibraryFile:
    """`wanted`, else what PERSONA_EDGE_LIBLLAMA names (a file or the folder it lies in), else the first one installed.

    Raises ModelNotFoundError when what is named does not exist, MissingDependencyError when nothing is installed.
    """
    named = os.fspath(wanted) if wanted is not None else os.environ.get(VARIABLE, "")
    if named:
        return LibraryFile(_named_file(Path(named).expanduser()), "libllama")
    found = next(installed_libraries(), None)
    if found is None:
        raise MissingDependencyError(
            "running a GGUF model needs llama.cpp; install it with: pip install 'persona-edge[prebuilt]' "
            "(no compiler needed), or: pip install 'llama-cpp-python>=0.3.36,<0.4' (builds it for this machine)"
        )
    return found


def installed_libraries() -> Iterator[LibraryFile]:
    """Those of installed packages, the preferred one first: llama-cpp-python was compiled for this very processor."""
    own_folder = os.environ.get("LLAMA_CPP_LIB_PATH")  # llama-cpp-python's own way of naming another build
    for package, module, folder in (
        ("llama-cpp-python", "llama_cpp", "lib"),
        ("llama-cpp-py-sync", "llama_cpp_py_sync", ""),
    ):
        for place in _folders_of(module):
            is_redirected = bool(own_folder) and module == "llama_cpp"
            path = _library_in(Path(own_folder or "") if is_redirected else place / folder)
            if path is not None:
                yield LibraryFile(path, package, _version_of(package))


def _named_file(path: Path) -> Path:
    found = _library_in(path) if path.is_dir() else path if path.is_file() else None
    if found is None:
        raise ModelNotFoundError(
            f"no libllama at {path}; give the path of libllama.so, libllama.dylib or llama.dll, or of its folder"
        )
    return found.absolute()


def _library_in(folder: Path) -> Path | None:
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def _folders_of(module: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
