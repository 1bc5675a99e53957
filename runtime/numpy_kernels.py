"""The editing kernels in NumPy: the twin of the C extension, and its stand-in where that did not compile.

Three primitives, the same for every layout and both granularities, and the switch that is made of them. Positions and
gates must be valid; `persona_edge.runtime.kernels` checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_edge.masks import Granularity
from persona_edge.runtime.dequantize import code_terms, code_values
from persona_edge.runtime.group_codes import nearest_codes, scale_group_codes
from persona_edge.runtime.layouts import Units, WeightLayout
from persona_edge.runtime.plans import Plan, SwitchCounts, UndoLog

__all__ = ["Tensor", "check_log", "gather", "scale", "scatter", "switch", "touch", "unite"]

Fields = NDArray[np.uint8]


@dataclass(frozen=True)
class Tensor:
    """A weight tensor's memory, flat, and how to read it."""

    layout: WeightLayout
    data: NDArray[np.uint8]


def gather(units: Units) -> Fields:
    """The fields of `units`: (n, n_field_bytes) uint8."""
    return units.map.read(units.data, units.positions)


def scatter(units: Units, fields: Fields) -> None:
    """Write `fields` to `units`. CHANGES their data; undone by writing back what `gather` gave."""
    units.map.write(units.data, units.positions, fields)


def scale(units: Units, fields: Fields, gates: NDArray[np.float32]) -> Fields:
    """`fields` multiplied by `gates` (n,): what to scatter. Pure.

    The data is read only where `fields` are codes of single weights: the gated weight is expressed in its block's
    scales, which must be those of the base model. A code whose block has a scale of 0, NaN or infinity stays as it is.
    """
    layout = units.layout
    if units.granularity == 32 and layout.has_group_codes:
        return scale_group_codes(layout, fields, gates)
    if units.granularity == 32 or layout.codes is None:
        return layout.numbers.scale(fields, gates)
    terms = code_terms(layout, units.data, units.positions, np.float64)
    codes = fields[:, 0]
    with np.errstate(all="ignore"):
        value = terms.scale * code_values(layout.codes, codes) + terms.minimum
        nearest = nearest_codes(layout.codes, (gates * value - terms.minimum) / terms.scale)
    usable = np.isfinite(terms.scale) & (terms.scale != 0) & np.isfinite(terms.minimum) & (gates != 1)
    return np.where(usable, nearest, codes)[:, None]


def unite(runs: Sequence[NDArray[np.uint32]], bits: Sequence[int]) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """The union of strictly ascending `runs`, ascending, and for each position the `bits` of the runs it is in.

    ValueError for a run that does not ascend.
    """
    if any((run[1:] <= run[:-1]).any() for run in runs):
        raise ValueError("positions are not ascending")
    everything = np.concatenate(runs) if runs else np.zeros(0, np.uint32)
    sets = np.repeat(np.array(bits, np.uint64), [len(run) for run in runs])
    if len(everything) == 0:
        return everything, sets
    order = np.argsort(everything, kind="stable")  # merges the runs, which are sorted already
    everything, sets = everything[order], sets[order]
    first = np.flatnonzero(np.concatenate([[True], everything[1:] != everything[:-1]]))
    return everything[first], np.bitwise_or.reduceat(sets, first)


@dataclass(frozen=True)
class _Segment:
    """One segment of a log: the units of one tensor, with their gates and base fields (a view of the log)."""

    log: UndoLog
    index: int
    granularity: Granularity
    positions: NDArray[np.uint32]
    gates: NDArray[np.float32]
    fields: Fields

    @classmethod
    def of(cls, log: UndoLog, index: int) -> _Segment:
        plan = log.plan
        units = slice(plan.starts[index], plan.starts[index + 1])
        n = int(plan.starts[index + 1] - plan.starts[index])
        fields = log.fields[plan.field_starts[index] : plan.field_starts[index + 1]].reshape(n, -1)
        gates = plan.gates[plan.mixes[units]]
        granularity: Granularity = 1 if plan.granularities[index] == 1 else 32
        return cls(log, index, granularity, plan.positions[units], gates, fields)

    def units(self, tensor: Tensor, which: NDArray[np.intp]) -> Units:
        return Units(tensor.layout, self.granularity, tensor.data, self.positions[which])

    @property
    def n_filled(self) -> int:
        return int(self.log.filled[self.index])


def switch(tensors: Sequence[Tensor], old: UndoLog, new: UndoLog) -> SwitchCounts:
    """Take the weights from the state that `old` undoes to base, plus the gates of `new`, whose log gets filled.

    Writes only where the two differ. CHANGES the tensors' memory; the inverse is the same call with `old` the filled
    log and `new` blank and empty.
    """
    before = {int(tensor): _Segment.of(old, s) for s, tensor in enumerate(old.plan.tensors)}
    after = {int(tensor): _Segment.of(new, s) for s, tensor in enumerate(new.plan.tensors)}
    n_tensors = n_units = n_bytes = 0
    for index in sorted(before.keys() | after.keys()):
        units, size = _switch_tensor(tensors[index], before.get(index), after.get(index))
        n_tensors += units > 0
        n_units += units
        n_bytes += size
    return SwitchCounts(n_tensors, n_units, n_bytes)


def _switch_tensor(tensor: Tensor, old: _Segment | None, new: _Segment | None) -> tuple[int, int]:
    """Units and bytes written."""
    if old is not None and new is not None and old.granularity != new.granularity:
        # Codes are chosen against the base scales, so the old mask has to go before the new one comes.
        there, back = _switch_tensor(tensor, old, None), _switch_tensor(tensor, None, new)
        return there[0] + back[0], there[1] + back[1]
    if new is None:
        return (0, 0) if old is None else _restore(tensor, old, np.arange(old.n_filled))
    if old is None:
        return _change(tensor, new, np.arange(len(new.positions)))
    n = old.n_filled
    _, in_old, in_new = np.intersect1d(old.positions[:n], new.positions, assume_unique=True, return_indices=True)
    kept = np.zeros(len(new.positions), bool)
    kept[in_new] = True
    fresh = np.flatnonzero(~kept)
    new.fields[in_new] = old.fields[in_old]
    new.fields[fresh] = gather(new.units(tensor, fresh))
    new.log.filled[new.index] = len(new.positions)
    units, size = _restore(tensor, old, np.setdiff1d(np.arange(n), in_old, assume_unique=True))
    changed = np.concatenate([fresh, in_new[old.gates[in_old] != new.gates[in_new]]])
    more_units, more_size = _write(tensor, new, np.sort(changed))
    return units + more_units, size + more_size


def _change(tensor: Tensor, new: _Segment, which: NDArray[np.intp]) -> tuple[int, int]:
    new.fields[which] = gather(new.units(tensor, which))
    new.log.filled[new.index] = len(new.positions)
    return _write(tensor, new, which)


def _write(tensor: Tensor, new: _Segment, which: NDArray[np.intp]) -> tuple[int, int]:
    units = new.units(tensor, which)
    fields = scale(units, new.fields[which], new.gates[which])
    scatter(units, fields)
    return len(which), fields.size


def _restore(tensor: Tensor, old: _Segment, which: NDArray[np.intp]) -> tuple[int, int]:
    fields = old.fields[which]
    scatter(old.units(tensor, which), fields)
    return len(which), fields.size


def touch(tensors: Sequence[Tensor], plan: Plan) -> None:
    """Read and write back the first byte of each of the plan's units. CHANGES nothing."""
    for s, index in enumerate(plan.tensors):
        tensor = tensors[index]
        units = tensor.layout.fields(1 if plan.granularities[s] == 1 else 32)
        positions = plan.positions[plan.starts[s] : plan.starts[s + 1]]
        at = units.first_bytes(positions)
        tensor.data[at] = tensor.data[at]


def check_log(tensors: Sequence[Tensor], log: UndoLog) -> None:
    """ValueError when a plan does not fit the tensors or its log; the same checks as the C kernel's."""
    plan = log.plan
    if len(plan.tensors) and not (plan.tensors[0] >= 0 and plan.tensors[-1] < len(tensors)):
        raise ValueError("no such tensor")
    if (np.diff(plan.tensors) <= 0).any():
        raise ValueError("tensors are not ascending")
    if int(plan.starts[-1]) > len(plan.positions) or int(plan.field_starts[-1]) > log.fields.size:
        raise ValueError("segments do not fit the positions or the fields")
    if (plan.mixes >= len(plan.gates)).any() or not np.isfinite(plan.gates).all():
        raise ValueError("a unit has no gate, or a gate is not finite")
    for s, tensor in enumerate(plan.tensors):
        positions = plan.positions[plan.starts[s] : plan.starts[s + 1]]
        layout = tensors[tensor].layout
        units = layout.fields(1 if plan.granularities[s] == 1 else 32)
        if (positions[1:] <= positions[:-1]).any() or int(positions[-1]) >= units.n_units(tensors[tensor].data.size):
            raise ValueError("positions are not ascending or exceed the tensor")
        if plan.field_starts[s + 1] - plan.field_starts[s] != len(positions) * units.n_field_bytes:
            raise ValueError("fields have the wrong size")
