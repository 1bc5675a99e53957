"""Switches the weights in memory between personas: only what differs is written, and base is always one call away.

The undo log holds the base fields of the active persona's units and nothing else. Everything is checked before the
first write. If anything raises half-way, a KeyboardInterrupt included, the weights go back to base and the error goes
on; a second interrupt during that is survived too: the next call finishes the way back first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError, ModelMismatchError, UnsupportedModelError, WeightAccessError
from persona_edge.masks import Granularity
from persona_edge.runtime.kernels import Kernels, default_kernels
from persona_edge.runtime.layouts import LAYOUTS, Units, WeightLayout, layout_of
from persona_edge.runtime.plans import Plan, SwitchCounts, UndoLog
from persona_edge.runtime.programs import Composition, PersonaProgram, compile_program, compose
from persona_edge.runtime.residue import Residue, residue

__all__ = ["Composition", "PersonaProgram", "SwitchStats", "Switcher", "WeightTensor", "compile_program", "compose"]


_Item = TypeVar("_Item", bound=np.generic)


@dataclass(frozen=True, eq=False)
class WeightTensor:
    """A 2-D weight in memory: `n_rows` x `n_columns` of GGML type `ggml_type`, without padding between rows.

    `data` is a flat, writable uint8 view of its memory. A tensor whose memory cannot be addressed (on a GPU) would take
    this one's place with read and write methods of its own.
    """

    name: str
    ggml_type: int
    n_rows: int
    n_columns: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class SwitchStats:
    """What a switch wrote, in units and in bytes of their fields; and the time that checking and writing took."""

    n_tensors: int
    n_units_written: int
    n_bytes: int
    seconds: float


@dataclass(frozen=True)
class _State:
    """The program in force and the log that undoes it."""

    program: PersonaProgram | None
    log: UndoLog


class Switcher:
    """Owns the persona state of one model's weights. MUTATES the tensors' memory; `restore` brings every byte back.

    Safe to call from several threads. It does not know about generation: whoever evaluates the model must not do so
    during a switch, and must drop its KV cache after one.
    """

    def __init__(self, tensors: Mapping[str, WeightTensor], kernels: Kernels | None = None) -> None:
        """Raises WeightAccessError for memory that is read-only, of the wrong size, or given twice.

        A tensor of a type without a layout is accepted; a program that touches it is not.
        """
        self._kernels = default_kernels() if kernels is None else kernels
        self._tensors = dict(tensors)
        editable = sorted(name for name, tensor in tensors.items() if tensor.ggml_type in LAYOUTS)
        for name in editable:
            _check_memory(name, tensors[name])
        _check_disjoint({name: tensors[name].data for name in editable})
        self._number = {name: i for i, name in enumerate(editable)}
        layouts = [layout_of(tensors[name].ggml_type) for name in editable]
        self._memory = self._kernels.tensors(layouts, [tensors[name].data for name in editable])
        self._plans: WeakKeyDictionary[PersonaProgram, Plan] = WeakKeyDictionary()
        self._base = _State(None, UndoLog.blank(Plan.empty()))
        self._state = self._base
        self._interrupted: tuple[UndoLog, UndoLog] | None = None  # logs to write back before anything else
        self._spare: NDArray[np.uint8] | None = None  # a log's buffer, to be used again
        self._lock = threading.Lock()

    @property
    def active(self) -> PersonaProgram | None:
        """The program that the weights carry; None is base."""
        return self._state.program

    def apply(self, program: PersonaProgram) -> SwitchStats:
        """Make `program` the active one; from wherever the weights are, writing only what differs.

        Raises, before anything is written: ModelMismatchError when the model has no such tensor or unit,
        UnsupportedModelError when a tensor's type cannot be edited or a group's scale cannot take a negative gate,
        InputError when the program is malformed.
        """
        started = time.perf_counter()
        with self._lock:
            self._finish_restoring()
            log = UndoLog.blank(self._plan(program), self._spare)
            return self._switch(_State(program, log), started)

    def restore(self) -> SwitchStats:
        """Back to base: every byte that `apply` changed."""
        started = time.perf_counter()
        with self._lock:
            self._finish_restoring()
            return self._switch(self._base, started)

    def check(self, program: PersonaProgram) -> None:
        """Raise what `apply` would raise, and write nothing."""
        with self._lock:
            self._plan(program)

    def touch(self, program: PersonaProgram) -> float:
        """Seconds to read and write back one byte of each unit that `program` gates: no switch to it can be faster.

        For measurements; the weights stay as they are. Raises what `apply` raises.
        """
        with self._lock:
            plan = self._plan(program)
            started = time.perf_counter()
            self._kernels.touch(self._memory, plan)
            return time.perf_counter() - started

    def residues(self, program: PersonaProgram) -> dict[str, Residue]:
        """How far from its gates `program` would land, by tensor, as residue.py measures it. Writes nothing.

        Slow: reads every weight of the tensors concerned. Raises InputError while a program is active, for it compares
        with the base weights; and what `apply` raises.
        """
        with self._lock:
            self._finish_restoring()
            if self._state.program is not None:
                raise InputError("residues are measured on the base weights; restore them first")
            self._plan(program)
            return {name: self._residue(program, name) for name in program.names}

    def _residue(self, program: PersonaProgram, name: str) -> Residue:
        granularity, positions, gates = program.units(name)
        tensor = self._tensors[name]
        return residue(Units(layout_of(tensor.ggml_type), granularity, tensor.data, positions), gates)

    def _switch(self, after: _State, started: float) -> SwitchStats:
        before = self._state
        self._interrupted = (after.log, before.log)
        try:
            counts: SwitchCounts = self._kernels.switch(self._memory, before.log, after.log)
            stats = SwitchStats(*counts, seconds=time.perf_counter() - started)
            self._state = after
            self._interrupted = None
        except BaseException:
            self._interrupted = (after.log, before.log)
            self._finish_restoring()
            raise
        self._spare = before.log.fields
        return stats

    def _finish_restoring(self) -> None:
        """Write back what an interrupted switch may have changed. Filled fields are base fields, so order is free."""
        if self._interrupted is None:
            return
        for log in self._interrupted:
            self._kernels.switch(self._memory, log, self._base.log)
        self._state = self._base
        self._spare = None  # the two logs may share nothing with a later one
        self._interrupted = None

    def _plan(self, program: PersonaProgram) -> Plan:
        if program not in self._plans:
            self._plans[program] = self._bind(program)
        return self._plans[program]

    def _bind(self, program: PersonaProgram) -> Plan:
        _check_shape(program)
        layouts = [self._layout(name) for name in program.names]
        widths = []
        for t, name in enumerate(program.names):
            granularity, positions = program.positions_of(name)
            _check_units(self._tensors[name], granularity, positions)
            if program.gates.min() < 0 and not layouts[t].allows_negative(granularity):
                _check_signs(name, layouts[t], program.units(name)[2])
            widths.append(layouts[t].fields(granularity).n_field_bytes)
        sizes = np.diff(program.starts) * np.array(widths, np.int64)
        return Plan(
            _frozen(np.array([self._number[name] for name in program.names], np.int32)),
            program.granularities,
            program.starts,
            _frozen(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)),
            program.positions,
            program.mixes,
            program.gates,
        )

    def _layout(self, name: str) -> WeightLayout:
        if name not in self._tensors:
            raise ModelMismatchError(
                f"the model has no weight {name!r} that can be edited; use a pack made from this model"
            )
        try:
            return layout_of(self._tensors[name].ggml_type)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name}: {error}") from None


def _frozen(array: NDArray[_Item]) -> NDArray[_Item]:
    """What is frozen, the kernels check once and not at every switch."""
    array.flags.writeable = False
    return array


def _check_memory(name: str, tensor: WeightTensor) -> None:
    data, layout = tensor.data, layout_of(tensor.ggml_type)
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous or not data.flags.writeable:
        raise WeightAccessError(
            f"{name}: the weights' memory must be a flat, writable view of bytes; load without mmap"
        )
    expected = tensor.n_rows * layout.n_bytes(tensor.n_columns)
    if tensor.n_columns % layout.block_weights or data.size != expected:
        raise WeightAccessError(
            f"{name}: {data.size} bytes of {layout.name} cannot hold {tensor.n_rows} x {tensor.n_columns} weights; "
            f"expected {expected} bytes"
        )


def _check_disjoint(memory: Mapping[str, NDArray[np.uint8]]) -> None:
    """Two tensors over the same bytes would each log the other's edit as base."""
    spans = sorted((data.ctypes.data, data.size, name) for name, data in memory.items() if data.size)
    for (start, size, name), (following, _, other) in pairwise(spans):
        if start + size > following:
            raise WeightAccessError(f"{name} and {other} share memory; hand over one of them only")


def _check_shape(program: PersonaProgram) -> None:
    """The arrays of a program against each other; `compose` makes them right, a caller may not."""
    n, starts, names = len(program.names), program.starts, program.names
    fits = len(starts) == n + 1 and starts[0] == 0 and starts[-1] == len(program.positions) == len(program.mixes)
    if not fits or (np.diff(starts) <= 0).any() or list(names) != sorted(set(names)):
        raise InputError("the program's tensors and units do not fit together; make it with compile_program")
    if len(program.granularities) != n or not np.isin(program.granularities, (1, 32)).all():
        raise InputError("the program's granularities are not all 1 or 32; make it with compile_program")
    if (program.mixes >= len(program.gates)).any() or not np.isfinite(program.gates).all():
        raise InputError("the program has units without a finite gate; make it with compile_program")


def _check_units(tensor: WeightTensor, granularity: Granularity, positions: NDArray[np.uint32]) -> None:
    if tensor.n_columns % granularity:
        raise ModelMismatchError(
            f"{tensor.name}: {tensor.n_columns} columns do not divide into groups of {granularity}"
        )
    n_units = tensor.n_rows * (tensor.n_columns // granularity)
    if (positions[1:] <= positions[:-1]).any():
        raise InputError(
            f"{tensor.name}: the program's positions are not strictly ascending; make it with compile_program"
        )
    if int(positions[-1]) >= n_units:
        raise ModelMismatchError(
            f"{tensor.name}: the pack gates unit {positions[-1]} and the model has {n_units}; "
            "use a pack made from this model"
        )


def _check_signs(name: str, layout: WeightLayout, gates: NDArray[np.float32]) -> None:
    if (gates < 0).any():
        raise UnsupportedModelError(
            f"{name}: the gate {gates.min():g} is negative and the group scales of {layout.name} have no sign; "
            "use a strength of at most 1, or another quantization"
        )
