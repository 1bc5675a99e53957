"""What a persona changes in memory that ONNX Runtime reads, and the way from one persona to the next.

A plan lists elements of flat arrays with their values as base and as the persona. The way from plan to plan writes only
what differs, and is remembered like the plans themselves, within a number of bytes. Nothing here runs a session.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from persona_edge.runtime.programs import PersonaProgram

__all__ = [
    "Patch",
    "PatchPlan",
    "Recent",
    "Step",
    "Way",
    "Written",
    "key_of",
    "n_bytes_of",
    "n_units_between",
    "patch_of",
    "way_between",
]


class Written(NamedTuple):
    """What a switch wrote: gated units and bytes."""

    n_units: int
    n_bytes: int


class Patch(NamedTuple):
    """Elements `at` (n,) int64, ascending, of the flat `memory`: what they are with the persona, and without."""

    memory: NDArray[Any]
    at: NDArray[np.int64]
    values: NDArray[Any]
    base: NDArray[Any]


class Step(NamedTuple):
    """`memory[at] = values`."""

    memory: NDArray[Any]
    at: NDArray[np.int64]
    values: NDArray[Any]


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """A program as patches, one per array at most."""

    program: PersonaProgram
    patches: tuple[Patch, ...]

    @property
    def n_bytes(self) -> int:
        """What its arrays take."""
        return sum(patch.at.nbytes + 2 * patch.values.nbytes for patch in self.patches)

    def undoing(self) -> tuple[Step, ...]:
        """The steps back to base."""
        return tuple(Step(patch.memory, patch.at, patch.base) for patch in self.patches)


@dataclass(frozen=True, eq=False)
class Way:
    """Steps from one plan, or base, to another, in their order."""

    steps: tuple[Step, ...]
    written: Written

    @property
    def n_bytes(self) -> int:
        """What its arrays take."""
        return sum(step.at.nbytes + step.values.nbytes for step in self.steps)


class _Sized(Protocol):
    @property
    def n_bytes(self) -> int: ...


_Kept = TypeVar("_Kept", bound=_Sized)


class Recent(Generic[_Kept]):
    """What was made last, as much as fits into a number of bytes; the newest always."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self.n_bytes = 0

    def get(self, key: Hashable, make: Callable[[], _Kept]) -> _Kept:
        """The one of `key`, made if it is not there."""
        if key not in self._kept:
            self._kept[key] = make()
            self.n_bytes += self._kept[key].n_bytes
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self.n_bytes > self._max_bytes:
            self.n_bytes -= self._kept.popitem(last=False)[1].n_bytes
        return self._kept[key]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.n_bytes = 0


def key_of(program: PersonaProgram) -> Hashable:
    """Equal for programs that a persona's composition gives at the same strength; valid while one of them is kept."""
    arrays = program.granularities, program.starts, program.positions, program.mixes
    return (program.names, *map(id, arrays), program.gates.tobytes())


def patch_of(memory: NDArray[Any], at: NDArray[np.integer], values: NDArray[Any], base: NDArray[Any]) -> Patch:
    """A patch without the elements that stay as they are. `at` names each element once, in any order."""
    changed = np.flatnonzero(_bits(values) != _bits(base))
    order = changed[np.argsort(at[changed], kind="stable")]
    return Patch(memory, at[order].astype(np.int64), values[order], base[order])


def way_between(one: PatchPlan | None, other: PatchPlan) -> Way:
    """The steps that make memory in state `one` (None: base) into `other`, and what they write."""
    before = {} if one is None else {_place(patch): patch for patch in one.patches}
    steps: list[Step] = []
    for patch in other.patches:
        earlier = before.pop(_place(patch), None)
        steps.append(Step(patch.memory, patch.at, patch.values) if earlier is None else _difference(earlier, patch))
    # What is left is untouched by `other`, or seen by it in elements of another size: undone before anything else.
    undone = [Step(patch.memory, patch.at, patch.base) for patch in before.values()]
    done = tuple(step for step in (*undone, *steps) if len(step.at))
    n_units = n_units_between(None if one is None else one.program, other.program)
    return Way(done, Written(n_units, n_bytes_of(done)))


def n_bytes_of(steps: Iterable[Step]) -> int:
    """How many bytes the steps write."""
    return sum(step.values.nbytes for step in steps)


def n_units_between(one: PersonaProgram | None, other: PersonaProgram) -> int:
    """How many units have another gate in `other` than in `one` (None: base)."""
    if one is None:
        return other.n_units
    shared = set(one.names).intersection(other.names)
    n_alike = 0
    for name in shared:
        (size, positions, gates), (other_size, other_positions, other_gates) = one.units(name), other.units(name)
        if size != other_size:
            continue
        found, where = _found(positions, other_positions)
        n_alike += int(found.sum()) + int((gates[where[found]] == other_gates[found]).sum())
    return one.n_units + other.n_units - n_alike


def _difference(one: Patch, other: Patch) -> Step:
    """From one patch to another of the same memory."""
    found, where = _found(one.at, other.at)
    present = np.where(found, one.values[where], other.base) if len(one.at) else other.base
    changed = _bits(present) != _bits(other.values)
    gone = np.ones(len(one.at), bool)
    gone[where[found]] = False
    at = np.concatenate([one.at[gone], other.at[changed]])
    return Step(one.memory, at, np.concatenate([one.base[gone], other.values[changed]]))


def _found(ascending: NDArray[np.integer], wanted: NDArray[np.integer]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Of each of `wanted`, whether `ascending` has it and where."""
    if not len(ascending):
        return np.zeros(len(wanted), bool), np.zeros(len(wanted), np.int64)
    where = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return ascending[where] == wanted, where


def _place(patch: Patch) -> tuple[int, int]:
    return patch.memory.ctypes.data, patch.memory.itemsize


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """As unsigned integers: -0 and 0 differ, a NaN equals itself."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
