"""From poles to a program: which unit of which tensor gets which gate, at any strength. Knows nothing of memory.

Where planes overlap their gates multiply. A unit is kept only if its gate differs from 1. One tensor is masked either
by groups or by single weights: poles that would need both in one tensor cannot be composed, because a code is chosen
against its group's scale and the two edits would depend on their order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError
from persona_edge.masks import Granularity, Plane, Pole
from persona_edge.runtime.kernels import default_kernels

__all__ = ["Composition", "CompositionCache", "PersonaProgram", "compile_program", "compose"]

_Item = TypeVar("_Item", bound=np.generic)
_MAX_PLANES = 64  # bits of the set of planes that a unit lies in
_MAX_MIXES = 1 << 16


@dataclass(frozen=True, eq=False)
class PersonaProgram:
    """A composition at one strength, flat: tensor t of `names` (sorted) owns units `starts[t]:starts[t + 1]`.

    `positions` (n,) are strictly ascending within a tensor and of its `granularities[t]`; unit i's gate is
    `gates[mixes[i]]`, never 1. `strength` is what the user asked for.
    """

    names: tuple[str, ...]
    granularities: NDArray[np.int32]
    starts: NDArray[np.int64]
    positions: NDArray[np.uint32]
    mixes: NDArray[np.uint16]
    gates: NDArray[np.float32]
    strength: float

    @property
    def n_units(self) -> int:
        """How many units are gated."""
        return len(self.positions)

    def units(self, name: str) -> tuple[Granularity, NDArray[np.uint32], NDArray[np.float32]]:
        """Granularity, positions and gates of one tensor; KeyError when the program does not touch it."""
        t = self._index[name]
        gates = self.gates[self.mixes[self.starts[t] : self.starts[t + 1]]]
        return *self.positions_of(name), gates

    def positions_of(self, name: str) -> tuple[Granularity, NDArray[np.uint32]]:
        """Granularity and positions of one tensor, without a copy; KeyError when the program does not touch it."""
        t = self._index[name]
        return 1 if self.granularities[t] == 1 else 32, self.positions[self.starts[t] : self.starts[t + 1]]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: t for t, name in enumerate(self.names)}


@dataclass(frozen=True, eq=False)
class Composition:
    """Poles flattened for any strength: like PersonaProgram, but a unit's mix says in which planes it lies.

    `members` is (n_mixes, n_planes) bool, `plane_gates` (n_planes,). Build it once per persona; `at` is cheap.
    """

    names: tuple[str, ...]
    granularities: NDArray[np.int32]
    starts: NDArray[np.int64]
    positions: NDArray[np.uint32]
    mixes: NDArray[np.uint16]
    members: NDArray[np.bool_]
    plane_gates: NDArray[np.float64]

    @property
    def n_bytes(self) -> int:
        """What its arrays take that grow with the number of units."""
        return self.positions.nbytes + self.mixes.nbytes

    def at(self, strength: float) -> PersonaProgram:
        """The program at `strength` >= 0: a plane's gate g becomes 1 + strength * (g - 1). Shares arrays where it can.

        Raises InputError when the strength is negative or not finite, or a gate overflows float32.
        """
        if not (np.isfinite(strength) and strength >= 0):
            raise InputError(f"strength {strength} cannot be used; give a number from 0 (base) to 1 (as the pack says)")
        gates = self._gates(strength)
        kept = gates != 1
        if kept.all():
            arrays = self.names, self.granularities, self.starts, self.positions, self.mixes
            return PersonaProgram(*arrays, gates, strength)
        units = kept[self.mixes]
        counts = np.add.reduceat(units, self.starts[:-1], dtype=np.int64) if self.names else np.zeros(0, np.int64)
        touched = np.flatnonzero(counts)
        return PersonaProgram(
            tuple(self.names[t] for t in touched),
            _frozen(self.granularities[touched]),
            _offsets(counts[touched].tolist()),
            _frozen(self.positions[units]),
            _frozen(self.mixes[units]),
            gates,
            strength,
        )

    def _gates(self, strength: float) -> NDArray[np.float32]:
        # Written so that strength 0 gives exactly 1 and strength 1 exactly the plane's gate.
        factors = (1 - strength) + strength * self.plane_gates
        with np.errstate(over="ignore"):
            gates = np.where(self.members, factors, 1.0).prod(axis=1).astype(np.float32)
        if not np.isfinite(gates).all():
            raise InputError(f"at strength {strength} a gate overflows; use a lower strength")
        return _frozen(gates)


class CompositionCache:
    """The compositions used last, as many as fit into a number of bytes: 6 for each unit. Not safe in several threads.

    What does not fit is composed again when it is asked for. One that is larger than all the room is kept alone. Each
    keeps the program it gave last, so that a persona that returns at the same strength is the same object: whoever
    writes programs has checked that one already.
    """

    def __init__(self, poles_of: Callable[[str], Sequence[Pole]], max_bytes: int = 48 << 20) -> None:
        """`poles_of` gives the poles of a persona by its name, and may raise."""
        self._poles_of = poles_of
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, Composition] = OrderedDict()
        self._latest: dict[str, PersonaProgram] = {}

    @property
    def n_bytes(self) -> int:
        """What the compositions held take."""
        return sum(composition.n_bytes for composition in self._held.values())

    def program(self, name: str, strength: float) -> PersonaProgram:
        """The program of a persona at a strength. Raises what `compose` and `Composition.at` raise."""
        if name not in self._held:
            self._held[name] = compose(self._poles_of(name))
        self._held.move_to_end(name)
        while len(self._held) > 1 and self.n_bytes > self._max_bytes:
            dropped, _ = self._held.popitem(last=False)
            self._latest.pop(dropped, None)
        latest = self._latest.get(name)
        if latest is None or latest.strength != strength:
            latest = self._latest[name] = self._held[name].at(strength)
        return latest


def compile_program(poles: Sequence[Pole], strength: float = 1.0) -> PersonaProgram:
    """The program of a composition of poles at one strength. Raises InputError; see `compose` and `Composition.at`."""
    return compose(poles).at(strength)


def compose(poles: Sequence[Pole]) -> Composition:
    """Flatten poles into one composition: the union of their planes' units.

    Raises InputError when positions are not strictly ascending, a gate is not finite, one tensor would be masked at two
    granularities, or there are too many planes.
    """
    planes = [plane for pole in poles for plane in pole.planes]
    if len(planes) > _MAX_PLANES:
        raise InputError(f"{len(planes)} planes in one composition; at most {_MAX_PLANES} can be combined")
    gates = np.array([plane.gate for plane in planes], np.float64)
    if not np.isfinite(gates).all():
        raise InputError(f"plane gates {gates.tolist()} are not all finite; export the pack again")
    names = sorted({name for plane in planes for name, p in plane.positions.items() if len(p)})
    granularities = [_granularity(name, planes) for name in names]
    total = sum(plane.n_positions for plane in planes)
    positions, sets = np.empty(total, np.uint32), np.empty(total, np.uint64)
    counts: list[int] = []
    n = 0
    for name in names:
        counts.append(_unite(name, planes, positions[n:], sets[n:]))
        n += counts[-1]
    mixes, members = _number_mixes(sets[:n], len(planes))
    return Composition(
        tuple(names),
        _frozen(np.array(granularities, np.int32)),
        _offsets(counts),
        _frozen(positions[:n].copy()),
        _frozen(mixes),
        members,
        gates,
    )


def _granularity(name: str, planes: Sequence[Plane]) -> Granularity:
    """The one granularity at which the planes gate a tensor."""
    found = {plane.granularity for plane in planes if len(plane.positions.get(name, ()))}
    if len(found) > 1:
        raise InputError(
            f"{name}: group masks and weight masks cannot be combined in one tensor; compose poles of one kind"
        )
    return found.pop()


def _unite(name: str, planes: Sequence[Plane], positions: NDArray[np.uint32], sets: NDArray[np.uint64]) -> int:
    """Fill in one tensor's positions, ascending, and the set of planes each lies in, as bits. Returns how many."""
    runs, bits = [], []
    for i, plane in enumerate(planes):
        run = plane.positions.get(name)
        if run is not None and len(run):
            runs.append(run)
            bits.append(1 << i)
    try:
        if any(run.dtype != np.uint32 for run in runs):
            raise ValueError
        return default_kernels().unite(runs, bits, positions, sets)
    except ValueError:
        raise InputError(f"{name}: a plane's positions must be strictly ascending uint32") from None


def _number_mixes(bits: NDArray[np.uint64], n_planes: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Number the distinct sets of planes: (n,) uint16, and (n_mixes, n_planes) bool of who is in which."""
    if n_planes <= 16:  # the usual case, without a sort
        found = np.flatnonzero(np.bincount(bits.astype(np.int64), minlength=1)).astype(np.uint64)
        table = np.zeros(1 << n_planes, np.uint16)
        table[found] = np.arange(len(found))
        mixes = table[bits]
    else:
        found, inverse = np.unique(bits, return_inverse=True)
        if len(found) > _MAX_MIXES:
            raise InputError(f"the planes overlap in {len(found)} ways; at most {_MAX_MIXES} are possible")
        mixes = inverse.astype(np.uint16)
    members = (found[:, None] >> np.arange(n_planes, dtype=np.uint64)) & np.uint64(1)
    return mixes, members.astype(bool)


def _offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    return _frozen(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64))


def _frozen(array: NDArray[_Item]) -> NDArray[_Item]:
    """The C kernel reads these without the GIL: nobody may change them under its hands."""
    array.flags.writeable = False
    return array
