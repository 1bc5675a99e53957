"""Mapped weights that can be edited: the loader's read-only pages become private ones, copied when written to.

llama.cpp maps a model file shared and read-only. Here the pages under the weights are replaced, at the same addresses,
by a private mapping of the same range of the same file: an edit copies the page that it falls on; every other page
stays the file's own, shared with all processes that map it. The file itself never changes.

Where the range lies follows from the tensors: each has an address in memory and an offset in the file, and all agree on
where the file would begin. That needs no /proc, and where they disagree, nothing is replaced.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from ctypes import c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_edge.errors import WeightAccessError
from persona_edge.runtime.llama_files import ModelPart

__all__ = ["MappedSpan", "make_private", "mapped_spans", "why_not_here"]

_PAGE = mmap.ALLOCATIONGRANULARITY if sys.platform == "win32" else mmap.PAGESIZE
_MAP_FIXED = 0x10  # on every Linux but Alpha's and PA-RISC's, on macOS and on the BSDs; Python does not name it
_PAGE_WRITECOPY = 0x08
_SAMPLE = 256  # bytes compared at the beginning, in the middle and at the end of each tensor


@dataclass(frozen=True)
class MappedSpan:
    """Whole pages of a file in memory: `n_bytes` from `offset` on lie at `address`. `samples` are addresses in it."""

    path: Path
    address: int
    offset: int
    n_bytes: int
    samples: tuple[int, ...]


def why_not_here() -> str | None:
    """Why mapped weights cannot be made editable on this system; None when they can."""
    if ctypes.sizeof(c_void_p) < 8:
        return "a 32-bit process has no room for it"
    if sys.platform == "win32" or sys.platform.startswith(("linux", "darwin", "freebsd")):
        return None
    return f"it is not known how on {sys.platform}"


def mapped_spans(parts: Iterable[ModelPart], addresses: Mapping[str, int]) -> tuple[MappedSpan, ...]:
    """The pages of each part that hold the tensors of `addresses` (by name, those that lie in a mapped buffer).

    Raises WeightAccessError when the tensors of a part do not lie in memory as they do in the file.
    """
    spans = []
    for part in parts:
        found = [(addresses[t.name], t) for t in part.tensors if t.name in addresses]
        if not found:
            continue
        bases = {address - tensor.offset for address, tensor in found}
        base = min(bases)
        if len(bases) > 1 or base % _PAGE:
            raise WeightAccessError(f"{part.path.name} does not lie in memory as it does in the file")
        start = min(tensor.offset for _, tensor in found) // _PAGE * _PAGE
        stop = -(-max(tensor.offset + tensor.n_bytes for _, tensor in found) // _PAGE) * _PAGE
        samples = (at for address, tensor in found for at in _sample_addresses(address, tensor.n_bytes))
        spans.append(MappedSpan(part.path, base + start, start, stop - start, tuple(samples)))
    return tuple(spans)


def make_private(spans: Iterable[MappedSpan]) -> None:
    """MUTATES the process's address space: what lies at `spans` is writable afterwards, and never reaches the file.

    Each span's bytes are first compared with the file's, at the samples; a file that was exchanged since is found out.
    Raises WeightAccessError where it cannot be done; what was already replaced holds the same bytes as before.
    """
    reason = why_not_here()
    if reason is not None:
        raise WeightAccessError(reason)
    replace = _write_copy_windows if sys.platform == "win32" else _map_private
    for span in spans:
        try:
            with span.path.open("rb") as file:
                _check_is_file(span, file.fileno())
                replace(span, file.fileno())
        except OSError as error:
            raise WeightAccessError(f"the system refuses it: {error.strerror or error}") from None


def _sample_addresses(address: int, n_bytes: int) -> tuple[int, ...]:
    last = max(0, n_bytes - _SAMPLE)
    return tuple(sorted({address, address + last // 2, address + last}))


def _check_is_file(span: MappedSpan, file: int) -> None:
    # A private mapping of our own to compare with: reading the file would copy it, and may be cut short.
    end = min(span.offset + span.n_bytes, os.fstat(file).st_size)
    if end <= span.offset:
        raise WeightAccessError(f"{span.path.name} is shorter now than it was")
    with mmap.mmap(file, end - span.offset, access=mmap.ACCESS_READ, offset=span.offset) as contents:
        for address in span.samples:
            at = address - span.address
            expected = contents[at : at + _SAMPLE]
            if ctypes.string_at(address, len(expected)) != expected or not expected:
                raise WeightAccessError(f"{span.path.name} in memory is not what is in the file now")


def _map_private(span: MappedSpan, file: int) -> None:
    """`mmap` over the old pages. Whoever unmaps the range later, as llama.cpp does, unmaps these."""
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | int(getattr(mmap, "MAP_NORESERVE", 0))
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (c_void_p, c_size_t, c_int, c_int, c_int, c_int64)
    replace: Callable[..., Any] = ctypes.CFUNCTYPE(c_void_p, *arguments, use_errno=True)(("mmap", libc))
    address = replace(span.address, span.n_bytes, protection, flags, file, span.offset)
    if address != span.address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _write_copy_windows(span: MappedSpan, _file: int) -> None:
    """A view of a read-only section may be turned into a copy-on-write one where it stands."""
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    before = ctypes.c_uint32()
    if not kernel32.VirtualProtect(
        c_void_p(span.address), c_size_t(span.n_bytes), _PAGE_WRITECOPY, ctypes.byref(before)
    ):
        number = ctypes.get_last_error()  # type: ignore[attr-defined,unused-ignore]
        raise OSError(number, ctypes.FormatError(number))  # type: ignore[attr-defined,unused-ignore]
