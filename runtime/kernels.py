"""The editing kernels: the C extension where it compiled, else its NumPy twin, behind one small interface.

`PERSONA_EDGE_KERNELS=numpy` forces the twin, `=c` makes a missing extension an error. Both give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError, MissingDependencyError
from persona_edge.machine import usable_cores
from persona_edge.masks import Granularity
from persona_edge.runtime import numpy_kernels
from persona_edge.runtime.layouts import FieldMap, Units, WeightLayout
from persona_edge.runtime.number_formats import NumberFormat
from persona_edge.runtime.plans import Plan, SwitchCounts, UndoLog

if TYPE_CHECKING:
    from persona_edge.runtime import _kernels

__all__ = ["CKernels", "Kernels", "NumpyKernels", "default_kernels", "implementation", "layout_words"]

Bytes = NDArray[np.uint8]
Gates = NDArray[np.float32]
Positions = NDArray[np.uint32]
Sets = NDArray[np.uint64]
_UNITS_PER_THREAD = 65_536
TensorSet = Any  # what `tensors` gave; only the kernels that made it can read it


class Kernels(Protocol):
    """The three primitives and the switch. ValueError for positions outside the tensor and non-finite gates."""

    name: Literal["c", "numpy"]

    def gather(self, units: Units) -> Bytes:
        """The fields of `units` (n): (n, n_field_bytes) uint8."""
        ...

    def scale(self, units: Units, fields: Bytes, gates: Gates) -> Bytes:
        """`fields` times `gates` (n,). Pure; the data must hold the base scales when single weights are gated."""
        ...

    def scatter(self, units: Units, fields: Bytes) -> None:
        """Write `fields` to `units`. CHANGES their data; undone by writing what `gather` gave before."""
        ...

    def tensors(self, layouts: Sequence[WeightLayout], data: Sequence[Bytes]) -> TensorSet:
        """The tensors that plans refer to by number, for `switch`. Keeps their memory alive."""
        ...

    def unite(self, runs: Sequence[Positions], bits: Sequence[int], positions: Positions, sets: Sets) -> int:
        """The union of `runs`, strictly ascending: FILL `positions` and, with the `bits` of the runs it is in, `sets`.

        Returns how many there are; both must have room for all of all runs. ValueError for a run that does not ascend.
        """
        ...

    def switch(self, tensors: TensorSet, old: UndoLog, new: UndoLog) -> SwitchCounts:
        """CHANGE the tensors from the state that `old` undoes to base plus `new`'s gates, filling `new`'s log.

        Writes only what differs. ValueError before the first write when a plan does not fit the tensors.
        """
        ...

    def touch(self, tensors: TensorSet, plan: Plan) -> None:
        """Read and write back one byte of each of the plan's units: no switch can be faster. For measurements."""
        ...


class NumpyKernels:
    """The NumPy twin; see Kernels for the methods."""

    name: Literal["c", "numpy"] = "numpy"

    def gather(self, units: Units) -> Bytes:
        """See Kernels."""
        _check_inside(units)
        return numpy_kernels.gather(units)

    def scale(self, units: Units, fields: Bytes, gates: Gates) -> Bytes:
        """See Kernels."""
        _check_inside(units)
        if not np.isfinite(gates).all():
            raise ValueError("a gate is not finite")
        return numpy_kernels.scale(units, fields, gates)

    def scatter(self, units: Units, fields: Bytes) -> None:
        """See Kernels."""
        _check_inside(units)
        numpy_kernels.scatter(units, fields)

    def tensors(self, layouts: Sequence[WeightLayout], data: Sequence[Bytes]) -> TensorSet:
        """See Kernels."""
        return [numpy_kernels.Tensor(layout, memory) for layout, memory in zip(layouts, data, strict=True)]

    def unite(self, runs: Sequence[Positions], bits: Sequence[int], positions: Positions, sets: Sets) -> int:
        """See Kernels."""
        united, members = numpy_kernels.unite(runs, bits)
        positions[: len(united)], sets[: len(united)] = united, members
        return len(united)

    def switch(self, tensors: TensorSet, old: UndoLog, new: UndoLog) -> SwitchCounts:
        """See Kernels."""
        for log in (old, new):
            numpy_kernels.check_log(tensors, log)
        return numpy_kernels.switch(tensors, old, new)

    def touch(self, tensors: TensorSet, plan: Plan) -> None:
        """See Kernels."""
        numpy_kernels.check_log(tensors, UndoLog.blank(plan))
        numpy_kernels.touch(tensors, plan)


class CKernels:
    """The C extension; see Kernels for the methods. MissingDependencyError when it did not compile here."""

    name: Literal["c", "numpy"] = "c"

    def __init__(self, n_threads: int | None = None) -> None:
        """`n_threads` for every switch, however small; None lets a switch take as many as pay."""
        self._native = _native()
        self._n_threads = n_threads
        self._layouts: dict[int, _kernels.Layout] = {}
        self._plans: WeakKeyDictionary[Plan, tuple[TensorSet, _kernels.Plan]] = WeakKeyDictionary()

    def gather(self, units: Units) -> Bytes:
        """See Kernels."""
        fields = np.empty((len(units.positions), units.map.n_field_bytes), np.uint8)
        self._native.gather(*self._arguments(units), fields)
        return fields

    def scale(self, units: Units, fields: Bytes, gates: Gates) -> Bytes:
        """See Kernels."""
        out = np.empty(fields.shape, np.uint8)
        gates = np.ascontiguousarray(gates, np.float32)
        self._native.scale(*self._arguments(units), np.ascontiguousarray(fields), gates, out)
        return out

    def scatter(self, units: Units, fields: Bytes) -> None:
        """See Kernels."""
        self._native.scatter(*self._arguments(units), np.ascontiguousarray(fields))

    def tensors(self, layouts: Sequence[WeightLayout], data: Sequence[Bytes]) -> TensorSet:
        """See Kernels."""
        return self._native.tensors(tuple(self._layout(layout) for layout in layouts), tuple(data))

    def unite(self, runs: Sequence[Positions], bits: Sequence[int], positions: Positions, sets: Sets) -> int:
        """See Kernels."""
        arrays = tuple(np.ascontiguousarray(run, np.uint32) for run in runs)
        return int(self._native.unite(arrays, np.array(bits, np.uint64), positions, sets))

    def switch(self, tensors: TensorSet, old: UndoLog, new: UndoLog) -> SwitchCounts:
        """See Kernels."""
        plans = self.bind(tensors, old.plan), self.bind(tensors, new.plan)
        n_threads = self.threads_for(len(old.plan.positions) + len(new.plan.positions))
        arguments = (plans[0], old.fields, old.filled, plans[1], new.fields, new.filled, n_threads)
        return SwitchCounts(*self._native.switch(*arguments))

    def touch(self, tensors: TensorSet, plan: Plan) -> None:
        """See Kernels."""
        self._native.touch(self.bind(tensors, plan), self.threads_for(len(plan.positions)))

    def bind(self, tensors: TensorSet, plan: Plan) -> _kernels.Plan:
        """`plan` checked against `tensors`. Kept as long as the plan lives if nobody can change its arrays."""
        known = self._plans.get(plan)
        if known is not None and known[0] is tensors:
            return known[1]
        arrays = _arrays(plan)
        bound: _kernels.Plan = self._native.plan(tensors, arrays)
        if not any(array.flags.writeable for array in arrays):
            self._plans[plan] = tensors, bound
        return bound

    def threads_for(self, n_units: int) -> int:
        """How many threads a switch of `n_units` takes: a thread must save more than starting it costs."""
        return self._n_threads or max(1, min(usable_cores(), n_units // _UNITS_PER_THREAD))

    def _layout(self, layout: WeightLayout) -> _kernels.Layout:
        if layout.ggml_type not in self._layouts:
            self._layouts[layout.ggml_type] = self._native.layout(layout_words(layout))
        return self._layouts[layout.ggml_type]

    def _arguments(self, units: Units) -> tuple[_kernels.Layout, Granularity, Bytes, NDArray[np.uint32]]:
        positions = np.ascontiguousarray(units.positions, np.uint32)
        return self._layout(units.layout), units.granularity, units.data, positions


@cache
def default_kernels() -> Kernels:
    """The kernels to use, by PERSONA_EDGE_KERNELS (`c`, `numpy` or unset) and by what compiled."""
    wanted = os.environ.get("PERSONA_EDGE_KERNELS", "")
    if wanted not in ("", "c", "numpy"):
        raise InputError(f"PERSONA_EDGE_KERNELS is {wanted!r}; set it to c or numpy, or unset it")
    if wanted == "numpy":
        return NumpyKernels()
    try:
        return CKernels()
    except MissingDependencyError:
        if wanted == "c":
            raise
        return NumpyKernels()


def implementation() -> Literal["c", "numpy"]:
    """Which kernels `default_kernels` gives."""
    return default_kernels().name


def layout_words(layout: WeightLayout) -> NDArray[np.int32]:
    """A layout as the int32 words that `pe_layout_parse` in csrc/layout.c reads."""
    words = [*_map_words(layout.group), *_map_words(layout.weight), *_number_words(layout.numbers)]
    codes = layout.codes
    if codes is None:
        words.append(0)
    else:
        words += [1, *_number_words(codes.numbers), codes.n_scales, codes.min_sign, codes.super_scale, codes.super_min]
        words += [codes.group_bits, len(codes.codebook), *codes.codebook]
    return np.array(words, np.int32)


def _map_words(units: FieldMap) -> list[int]:
    head = [units.units_per_block.bit_length() - 1, units.block_bytes, units.n_field_bytes, units.pieces.shape[2]]
    return [*head, *units.pieces.ravel().tolist()]


def _number_words(numbers: NumberFormat) -> list[int]:
    return [int(numbers.kind), numbers.flip, numbers.zero, numbers.max]


def _arrays(plan: Plan) -> tuple[NDArray[Any], ...]:
    where = (plan.tensors, plan.granularities, plan.starts, plan.field_starts)
    return (*where, plan.positions, plan.mixes, plan.gates)


def _check_inside(units: Units) -> None:
    if len(units.positions) and int(units.positions.max()) >= units.map.n_units(units.data.size):
        raise ValueError("positions exceed the tensor")


def _native() -> ModuleType:
    try:
        from persona_edge.runtime import _kernels
    except ImportError as error:
        raise MissingDependencyError(
            f"the C kernels are not compiled ({error}); reinstall persona-edge where there is a C compiler, "
            "or unset PERSONA_EDGE_KERNELS"
        ) from None
    if not hasattr(_kernels, "unite"):  # what was added last
        raise MissingDependencyError("the C kernels were compiled from older sources; reinstall persona-edge")
    return _kernels
