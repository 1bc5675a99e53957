"""Weights of every quantization in plain memory, and random programs to switch them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.errors import MissingDependencyError
from persona_edge.masks import Granularity, Plane, Pole
from persona_edge.runtime.kernels import CKernels, Kernels, NumpyKernels
from persona_edge.runtime.layouts import LAYOUTS
from persona_edge.runtime.switcher import PersonaProgram, Switcher, WeightTensor

N_ROWS, N_COLUMNS = 4, 512
N_GROUPS = N_ROWS * N_COLUMNS // 32
Weights = dict[str, WeightTensor]
Memory = dict[str, NDArray[np.uint8]]


def _both() -> list[Kernels]:
    try:
        return [NumpyKernels(), CKernels()]
    except MissingDependencyError:
        return [NumpyKernels()]


every_kernels = pytest.mark.parametrize("kernels", _both(), ids=lambda kernels: kernels.name)


def weights(seed: int = 0) -> Weights:
    """One tensor of every type, named by it; memory is random, NaN scales and all."""
    rng = np.random.default_rng(seed)
    memory = {layout: rng.integers(0, 256, N_ROWS * layout.n_bytes(N_COLUMNS), np.uint8) for layout in LAYOUTS.values()}
    return {
        layout.name: WeightTensor(layout.name, layout.ggml_type, N_ROWS, N_COLUMNS, data)
        for layout, data in memory.items()
    }


def snapshot(tensors: Weights) -> Memory:
    """A copy of every byte."""
    return {name: tensor.data.copy() for name, tensor in tensors.items()}


def assert_memory(tensors: Weights, expected: Memory) -> None:
    """Every byte is as it was expected."""
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.data, expected[name], err_msg=name)


def random_pole(name: str, seed: int, gates: Sequence[float] = (0.0, 1.5), weight_tensors: Sequence[str] = ()) -> Pole:
    """One plane per gate, over a random choice of tensors; those in `weight_tensors` are masked weight by weight."""
    rng = np.random.default_rng(seed)
    planes = []
    for gate in gates:
        for granularity in (1, 32):
            names = [
                n for n in (layout.name for layout in LAYOUTS.values()) if (n in weight_tensors) == (granularity == 1)
            ]
            n_units = N_ROWS * N_COLUMNS // granularity
            chosen = {
                n: np.flatnonzero(rng.random(n_units) < 0.2).astype(np.uint32) for n in names if rng.random() < 0.7
            }
            planes.append(Plane(gate, {n: p for n, p in chosen.items() if len(p)}, 1 if granularity == 1 else 32))
    return Pole(name, "axis", tuple(planes))


def pole(gate: float, positions: Mapping[str, Sequence[int]], granularity: Granularity = 32) -> Pole:
    """One plane with these units."""
    plane = Plane(gate, {name: np.array(p, np.uint32) for name, p in positions.items()}, granularity)
    return Pole("pole", "axis", (plane,))


def cold(program: PersonaProgram | None, seed: int = 0) -> Memory:
    """The memory of a fresh model with `program` applied and nothing before it, by the NumPy kernels."""
    tensors = weights(seed)
    if program is not None:
        Switcher(tensors, NumpyKernels()).apply(program)
    return snapshot(tensors)
