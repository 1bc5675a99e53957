"""The C extension; see csrc/. Use it through persona_edge.runtime.kernels, which has a NumPy twin."""

from typing import Any, NewType

import numpy as np
from numpy.typing import NDArray

Layout = NewType("Layout", object)
Tensors = NewType("Tensors", object)
Plan = NewType("Plan", object)

def layout(words: NDArray[np.int32], /) -> Layout: ...
def tensors(layouts: tuple[Layout, ...], data: tuple[NDArray[np.uint8], ...], /) -> Tensors: ...
def gather(
    layout: Layout,
    granularity: int,
    data: NDArray[np.uint8],
    positions: NDArray[np.uint32],
    fields: NDArray[np.uint8],
    /,
) -> None: ...
def scatter(
    layout: Layout,
    granularity: int,
    data: NDArray[np.uint8],
    positions: NDArray[np.uint32],
    fields: NDArray[np.uint8],
    /,
) -> None: ...
def scale(
    layout: Layout,
    granularity: int,
    data: NDArray[np.uint8],
    positions: NDArray[np.uint32],
    fields: NDArray[np.uint8],
    gates: NDArray[np.float32],
    out: NDArray[np.uint8],
    /,
) -> None: ...
def plan(tensors: Tensors, arrays: tuple[NDArray[Any], ...], /) -> Plan: ...
def switch(
    old: Plan,
    old_fields: NDArray[np.uint8],
    old_filled: NDArray[np.int64],
    new: Plan,
    new_fields: NDArray[np.uint8],
    new_filled: NDArray[np.int64],
    n_threads: int,
    /,
) -> tuple[int, int, int]: ...
def unite(
    runs: tuple[NDArray[np.uint32], ...],
    bits: NDArray[np.uint64],
    positions: NDArray[np.uint32],
    sets: NDArray[np.uint64],
    /,
) -> int: ...
def touch(plan: Plan, n_threads: int, /) -> None: ...
