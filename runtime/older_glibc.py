"""Linux libraries that were linked on a newer system, made loadable on an older glibc.

A compiler that targets C23 turns `strtol` and its kin into `__isoc23_strtol` of glibc 2.38, which differs in reading
the prefix `0b` only. A library that needs nothing newer than these runs on any glibc once it asks for the plain ones.
`loadable_copy` writes such copies into the cache: in each, references to `__isoc23_x` become unversioned references to
`x`, and the version they asked for becomes optional. Nothing else changes, and what was installed stays as it is.

64-bit little-endian ELF only (x86-64, ARM64, RISC-V); any other file is refused.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from persona_edge.errors import MissingDependencyError

__all__ = ["is_about_glibc", "loadable_copy", "without_c23"]

_TOO_NEW = re.compile(r"version `GLIBC_([\d.]+)' not found")
_VERSION, _PREFIX = b"GLIBC_2.38", b"__isoc23_"
_LOAD, _DYNAMIC = 1, 2
_STRTAB, _SYMTAB, _GNU_HASH, _VERSYM, _VERNEED, _VERNEEDNUM = 5, 6, 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF
_WEAK, _GLOBAL = 2, 1


def is_about_glibc(reason: str) -> bool:
    """Whether the loader's complaint is that glibc is older than the library wants."""
    return _TOO_NEW.search(reason) is not None


def loadable_copy(library: Path, cache: Path) -> Path:
    """A copy of `library`, with the libraries beside it, under `cache`, that asks for no C23 function of glibc.

    Made once per state of the original. Raises MissingDependencyError when that is not enough, or cannot be written.
    """
    originals = sorted(p for p in library.parent.glob("lib*.so*") if p.is_file() and "mtmd" not in p.name)
    state = "\n".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in originals)
    folder = cache / "libllama" / hashlib.sha256(state.encode()).hexdigest()[:16]
    if not folder.is_dir():
        try:
            _write_copies(originals, folder)
        except OSError as error:
            reason = error.strerror or str(error)
            raise MissingDependencyError(
                f"{library.parent} needs a newer glibc, and a copy that does not cannot be written to {folder}: "
                f"{reason}; set PERSONA_EDGE_CACHE to a folder that can be written"
            ) from None
    return folder / library.name


def without_c23(data: bytes, name: str) -> bytes:
    """The ELF file `data` with plain names for glibc's C23 ones; MissingDependencyError when that cannot be done."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise MissingDependencyError(f"{name} is not a 64-bit little-endian ELF library; {_REMEDY}")
    changed = bytearray(data)
    try:
        _Elf(changed).forget_c23(name)
    except (struct.error, IndexError, KeyError, ValueError):
        raise MissingDependencyError(f"{name} cannot be read as an ELF library; {_REMEDY}") from None
    return bytes(changed)


_REMEDY = (
    "install llama-cpp-python instead, which is built on this machine: pip install 'llama-cpp-python>=0.3.36,<0.4'"
)


def _write_copies(originals: list[Path], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for original in originals:
            (temporary / original.name).write_bytes(without_c23(original.read_bytes(), original.name))
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was as fast
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Elf:
    """A shared library's dynamic section, changed where it stands."""

    def __init__(self, data: bytearray) -> None:
        self._data = data
        start, size, count = self._read("<Q", 32), self._read("<H", 54), self._read("<H", 56)
        headers = [struct.unpack_from("<IIQQQQQQ", data, start + i * size) for i in range(count)]
        self._segments = [(address, at, n) for kind, _, at, address, _, n, _, _ in headers if kind == _LOAD]
        at, n_bytes = next((at, n) for kind, _, at, _, _, n, _, _ in headers if kind == _DYNAMIC)
        entries = (struct.unpack_from("<QQ", data, at + i) for i in range(0, n_bytes, 16))
        self._tags = dict(reversed(list(entries)))

    def forget_c23(self, name: str) -> None:
        """Make `_VERSION` optional, and unversion every symbol that was asked of it."""
        if _VERNEED not in self._tags:
            return
        indices = set(self._make_optional())
        symbols, versions = self._at(self._tags[_SYMTAB]), self._at(self._tags[_VERSYM])
        for i in range(self._read("<I", self._at(self._tags[_GNU_HASH]) + 4)):  # undefined symbols come first
            if self._read("<H", versions + 2 * i) not in indices:
                continue
            text = self._read("<I", symbols + 24 * i)
            if not self._text(text).startswith(_PREFIX):
                wanted = self._text(text).decode("ascii", "replace")
                raise MissingDependencyError(f"{name} needs {wanted} of {_VERSION.decode()} or newer; {_REMEDY}")
            struct.pack_into("<I", self._data, symbols + 24 * i, text + len(_PREFIX))
            struct.pack_into("<H", self._data, versions + 2 * i, _GLOBAL)

    def _make_optional(self) -> Iterator[int]:
        need = self._at(self._tags[_VERNEED])
        for _ in range(self._tags[_VERNEEDNUM]):
            _, n_versions, _, first, following = struct.unpack_from("<HHIII", self._data, need)
            at = need + first
            for _ in range(n_versions):
                _, flags, index, text, step = struct.unpack_from("<IHHII", self._data, at)
                if self._text(text) == _VERSION:
                    struct.pack_into("<H", self._data, at + 4, flags | _WEAK)
                    yield index
                at += step
            need += following

    def _at(self, address: int) -> int:
        """The place in the file of what is at `address` in memory."""
        places: list[int] = [at + address - start for start, at, n in self._segments if start <= address < start + n]
        return places[0]

    def _text(self, offset: int) -> bytes:
        start = self._at(self._tags[_STRTAB]) + offset
        return bytes(self._data[start : self._data.index(0, start)])

    def _read(self, kind: str, at: int) -> int:
        value: int = struct.unpack_from(kind, self._data, at)[0]
        return value
