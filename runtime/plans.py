"""What the switch kernel works on: a plan (which units get which gate, tensor by tensor) and its undo log.

Both are flat arrays, so that one call can switch a whole model without touching a Python object on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Plan", "SwitchCounts", "UndoLog"]


@dataclass(frozen=True, eq=False)
class Plan:
    """A program bound to the tensors of one model: one segment per touched tensor, in ascending order of tensor.

    Segment s gates tensor `tensors[s]` at `granularities[s]` (1 or 32); its units are the strictly ascending
    `positions[starts[s]:starts[s + 1]]`, and unit i's gate is `gates[mixes[i]]`. Its fields take the bytes
    `field_starts[s]:field_starts[s + 1]` of an undo log.
    """

    tensors: NDArray[np.int32]
    granularities: NDArray[np.int32]
    starts: NDArray[np.int64]
    field_starts: NDArray[np.int64]
    positions: NDArray[np.uint32]
    mixes: NDArray[np.uint16]
    gates: NDArray[np.float32]

    @classmethod
    def empty(cls) -> Plan:
        """The plan of the base model: nothing gated."""
        none = np.zeros(0, np.int32)
        start = np.zeros(1, np.int64)
        plan = cls(none, none, start, start, np.zeros(0, np.uint32), np.zeros(0, np.uint16), np.zeros(0, np.float32))
        for array in vars(plan).values():
            array.flags.writeable = False
        return plan

    @property
    def n_segments(self) -> int:
        """How many tensors the plan touches."""
        return len(self.tensors)


@dataclass(frozen=True, eq=False)
class UndoLog:
    """The base fields of the units that a plan has changed.

    `filled[s]` says how many units of segment s, from its start, have their base field in `fields`; a kernel raises it
    before it changes the unit in the weights, so writing the filled fields back always leads to base.
    """

    plan: Plan
    fields: NDArray[np.uint8]
    filled: NDArray[np.int64]

    @classmethod
    def blank(cls, plan: Plan, fields: NDArray[np.uint8] | None = None) -> UndoLog:
        """A log with nothing in it yet; `fields` may be an old buffer to reuse if it is large enough."""
        n_bytes = int(plan.field_starts[-1])
        if fields is None or fields.size < n_bytes:
            fields = np.empty(n_bytes, np.uint8)
        return cls(plan, fields, np.zeros(plan.n_segments, np.int64))


class SwitchCounts(NamedTuple):
    """What a switch wrote: tensors, units, and bytes of fields."""

    n_tensors: int
    n_units: int
    n_bytes: int
