"""Finding the packed weights of a live session in memory, and views to write them.

A session that loads a packed model by path maps the data file privately and writable (on Linux and macOS), and computes
with those pages: what is written there takes effect in the next run, in this session alone, and never reaches the file.
ONNX Runtime does not tell where it mapped; `/proc/self/maps`, read before and after, does. So this works on Linux, and
everywhere else says that it does not. A blob that is not found in exactly one new mapping is refused. (One that fits
into a page may lie in mappings of its neighbours too: those copies are written like the one that counts.)
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import WeightAccessError
from persona_edge.runtime.onnx_packing import Blob
from persona_edge.runtime.onnx_prepared import PreparedModel
from persona_edge.runtime.onnx_runtime import make_session

__all__ = ["MAPS", "MappedSession", "Region", "mapped_session", "regions_of"]

MAPS = Path("/proc/self/maps")
_one_at_a_time = threading.Lock()  # sessions that come or go meanwhile would be taken for ours


class Region(NamedTuple):
    """`end - start` bytes of a file from `offset` on, mapped writable at address `start`."""

    start: int
    end: int
    offset: int


@dataclass(frozen=True, eq=False)
class MappedSession:
    """A session and, by matrix name, writable uint8 views of each packed blob: one, or several that are all the same.

    Views die with the session.
    """

    session: Any
    blobs: Mapping[str, tuple[NDArray[np.uint8], ...]]


def mapped_session(prepared: PreparedModel, *, n_threads: int) -> MappedSession:
    """Load `prepared` and find its blobs. WeightAccessError says what was not as it has to be."""
    with _one_at_a_time:
        before = regions_of(prepared.data)
        session = make_session(prepared.graph, n_threads=n_threads)
        ours = sorted(regions_of(prepared.data) - before, key=lambda region: region.offset)
    return MappedSession(session, {name: _views(name, blob, ours) for name, blob in prepared.blobs.items()})


def regions_of(file: Path) -> frozenset[Region]:
    """Where `file` is mapped writable in this process. WeightAccessError where the system does not say."""
    try:
        stat, lines = file.stat(), MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise WeightAccessError(
            f"{sys.platform} does not tell where files are mapped ({error.strerror or error})"
        ) from None
    found = set()
    for line in lines:
        span, access, offset, _, inode, *_ = line.split(None, 5)
        if int(inode) == stat.st_ino and access.startswith("rw-p") and line.rstrip().endswith(file.name):
            start, end = (int(part, 16) for part in span.split("-"))
            found.add(Region(start, end, int(offset, 16)))
    return frozenset(found)


def _views(name: str, blob: Blob, regions: list[Region]) -> tuple[NDArray[np.uint8], ...]:
    holding = [
        region
        for region in regions
        if region.offset <= blob.offset and blob.offset + blob.n_bytes <= region.offset + region.end - region.start
    ]
    in_one_page = blob.offset // mmap.PAGESIZE == (blob.offset + blob.n_bytes - 1) // mmap.PAGESIZE
    if not holding or (len(holding) > 1 and not in_one_page):
        raise WeightAccessError(f"the packed weights of {name} are mapped {len(holding)} times instead of once")
    addresses = [region.start + blob.offset - region.offset for region in holding]
    return tuple(np.ctypeslib.as_array((ctypes.c_uint8 * blob.n_bytes).from_address(at)) for at in addresses)
