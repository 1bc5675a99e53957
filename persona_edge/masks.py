"""What a persona is, as data: positions and gates per tensor. NumPy only; knows nothing of files, models or backends.

Words (docs/method.md): a *unit* is what one gate multiplies: a group of 32 consecutive weights of one row (granularity
32) or a single weight (granularity 1). A unit's *position* in a tensor of `n_rows` x `n_columns` is the flat index
`row * (n_columns // granularity) + unit_in_row`, in GGUF row order. A tensor is always named as GGUF names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError, PersonaNotFoundError

__all__ = [
    "GROUP_SIZE",
    "Granularity",
    "ModelIdentity",
    "PersonaSet",
    "Plane",
    "Pole",
    "SignSample",
    "TensorShape",
    "composed",
    "match_name",
    "merge_planes",
    "planes_digest",
]

GROUP_SIZE = 32
Granularity = Literal[1, 32]
Positions = NDArray[np.uint32]


@dataclass(frozen=True)
class TensorShape:
    """A maskable 2-D weight: `n_rows` output features by `n_columns` input features."""

    name: str
    n_rows: int
    n_columns: int

    def n_units(self, granularity: Granularity) -> int:
        """How many gates the tensor has; `n_columns` must be a multiple of `granularity`."""
        if self.n_columns % granularity:
            raise InputError(f"{self.name}: {self.n_columns} columns do not divide into groups of {granularity}")
        return self.n_rows * (self.n_columns // granularity)


@dataclass(frozen=True)
class SignSample:
    """Part of the sign sketch: the signs of a few large weights of one tensor.

    `positions` are flat weight indices (row * n_columns + column), strictly ascending, shape (n,); `negative` is (n,)
    bool, True where the weight is below zero.
    """

    positions: Positions
    negative: NDArray[np.bool_]


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a mask belongs to, whatever quantization its weights are in.

    `architecture` is GGUF's `general.architecture`. `tensors` are in the model's order. `sketch` maps tensor names to
    samples: every quantization of the same weights agrees with it, another model of the same shape does not.
    """

    architecture: str
    tensors: tuple[TensorShape, ...]
    sketch: Mapping[str, SignSample]

    def shape(self, name: str) -> TensorShape:
        """The shape of tensor `name`; KeyError when the model has none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)


@dataclass(frozen=True)
class Gates:
    """What suppressed units, and amplified ones if any, are multiplied by at strength 1."""

    suppress: float = 0.0
    amplify: float | None = None


@dataclass(frozen=True)
class Plane:
    """One mask with one gate value.

    `positions` maps tensor names to strictly ascending unit positions (uint32, at least one each). `gate` is the factor
    at strength 1: 0 suppresses, values above 1 amplify.
    """

    gate: float
    positions: Mapping[str, Positions]
    granularity: Granularity = 32

    @property
    def n_positions(self) -> int:
        """How many units the plane gates."""
        return sum(len(p) for p in self.positions.values())


@dataclass(frozen=True)
class Pole:
    """One end of an axis, e.g. pole `I` of axis `EI`, with the planes that move the model there."""

    name: str
    axis: str
    planes: tuple[Plane, ...]

    def at(self, strength: float) -> Pole:
        """The pole at a strength from 0 (nothing) to 1 (itself): a plane's gate g becomes 1 + strength * (g - 1)."""
        if strength == 1:
            return self
        # Written so that strength 0 gives exactly 1.
        gated = (replace(plane, gate=(1 - strength) + strength * plane.gate) for plane in self.planes)
        return replace(self, planes=tuple(gated))


@dataclass(frozen=True)
class PersonaSet:
    """What a pack holds: the model's identity, poles, personas composed of poles, and the quality report.

    `personas` maps a persona's name to the names of its poles (`INFP` -> `("I", "N", "F", "P")`). A pole may itself be
    listed as a persona. `strengths` says, for some personas, how much of each pole they take, in the same order, above
    0 and at most 1; all of it where nothing is said. `report` is JSON-compatible.
    """

    identity: ModelIdentity
    poles: tuple[Pole, ...]
    personas: Mapping[str, tuple[str, ...]]
    report: Mapping[str, Any] = field(default_factory=dict)
    strengths: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def pole(self, name: str) -> Pole:
        """The pole called `name`; PersonaNotFoundError when there is none."""
        for pole in self.poles:
            if pole.name == name:
                return pole
        raise PersonaNotFoundError(f"no pole {name!r}; this pack has {_listed(p.name for p in self.poles)}")

    def name_of(self, persona: str) -> str:
        """`persona` as this set spells it: letter case may differ where that is unambiguous.

        Raises PersonaNotFoundError that lists the personas there are.
        """
        name = match_name(persona, self.personas)
        if name is None:
            raise PersonaNotFoundError(f"no persona {persona!r}; this pack has {_listed(self.personas)}")
        return name

    def resolve(self, persona: str) -> tuple[Pole, ...]:
        """The poles that `persona` is composed of, in order and at its strengths. Found, or not, as `name_of` says."""
        name = self.name_of(persona)
        return composed([self.pole(pole) for pole in self.personas[name]], self.strengths.get(name))


def composed(poles: Sequence[Pole], strengths: Sequence[float] | None) -> tuple[Pole, ...]:
    """`poles`, each at its strength; as they are for None."""
    if strengths is None:
        return tuple(poles)
    return tuple(pole.at(strength) for pole, strength in zip(poles, strengths, strict=True))


def match_name(wanted: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is `wanted`, or is it but for letter case; None when there is none, or several."""
    known = list(names)
    if wanted in known:
        return wanted
    folded = [name for name in known if name.casefold() == wanted.casefold()]
    return folded[0] if len(folded) == 1 else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def merge_planes(first: Sequence[Plane], second: Sequence[Plane]) -> tuple[Plane, ...]:
    """The planes of both, one plane per gate and granularity; the two have no unit in common."""
    merged: dict[tuple[float, Granularity], dict[str, NDArray[np.uint32]]] = {}
    for plane in (*first, *second):
        tensors = merged.setdefault((plane.gate, plane.granularity), {})
        for name, positions in plane.positions.items():
            tensors[name] = np.union1d(tensors[name], positions) if name in tensors else positions
    return tuple(Plane(gate, tensors, granularity) for (gate, granularity), tensors in merged.items())


def planes_digest(planes: Sequence[Plane]) -> str:
    """SHA-256 of exactly what a mask is, so that no measurement is ever taken for another mask's."""
    digest = hashlib.sha256()
    for plane in planes:
        for name, positions in plane.positions.items():
            digest.update(json.dumps([name, plane.gate, plane.granularity, len(positions)]).encode())
            digest.update(positions.astype("<u4").tobytes())
    return digest.hexdigest()
