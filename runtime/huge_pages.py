"""Weights in the heap lie in huge pages where Linux has them to give.

A switch touches units all over the weights, and most of its time goes into finding pages: one of 2 MB stands for 512 of
4 kB. Linux uses them for memory that was advised of before it is first written to. llama.cpp allocates its buffers,
reports progress for the first time, and then reads the file into them; so the advice is given at that first report, for
the anonymous memory that appeared since loading began. Where there is no /proc, or no such advice, nothing happens.
docs/runtime.md has what it gains.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["huge_pages", "new_parts"]

_MAPS = Path("/proc/self/maps")
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw.. 0+ 00:00 0\s*$", re.MULTILINE)
_LEAST = 8 << 20  # bytes; what is smaller is no weights
_Progress = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)
Spans = list[tuple[int, int]]


@contextmanager
def huge_pages(params: ctypes.Structure) -> Iterator[None]:
    """While llama.cpp loads a model with `params`, the memory it allocates for weights is advised to be huge pages.

    MUTATES `params`, whose progress callback it sets.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or not sys.platform.startswith("linux"):
        yield
        return
    before = _anonymous()
    is_first = True

    def report(_progress: float, _data: object) -> bool:
        nonlocal is_first
        if is_first:
            is_first = False
            _advise(new_parts(_anonymous(), before), advice)
        return True  # go on loading

    callback = _Progress(report)
    params.progress_callback = ctypes.cast(callback, ctypes.c_void_p)
    yield


def new_parts(now: Iterable[tuple[int, int]], before: Iterable[tuple[int, int]]) -> Spans:
    """What `now` covers and `before` did not, as (start, stop). The kernel joins neighbours: a span may have grown."""
    old = sorted(before)
    found = []
    for start, stop in now:
        at = start
        for first, last in old:
            if last <= at or first >= stop:
                continue
            if first > at:
                found.append((at, first))
            at = last
        if at < stop:
            found.append((at, stop))
    return found


def _anonymous() -> Spans:
    """The writable memory of this process that is no file's and has no name, as (start, stop)."""
    try:
        text = _MAPS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return [(int(start, 16), int(stop, 16)) for start, stop in _ANONYMOUS.findall(text)]


def _advise(spans: Spans, advice: int) -> None:
    """A refusal is no error: the pages stay small."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    for start, stop in spans:
        if stop - start >= _LEAST:
            madvise(start, stop - start, advice)
