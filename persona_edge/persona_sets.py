"""Which personas can be calibrated: the sets that ship, by name, and a user's own file.

`personas/personas.toml` says which axes there are and how sets combine them. A set with `compose = true` adds one
persona for every way of taking one pole from each axis, named by joining the poles: I + N + F + P is INFP. Each pole is
a persona on its own as well.
"""

from __future__ import annotations

import itertools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from persona_edge.contrasts import CalibrationSet, load_contrasts, parse_contrasts, parse_texts
from persona_edge.errors import PersonaNotFoundError

__all__ = [
    "PersonaSpec",
    "ShippedSet",
    "load_persona_set",
    "neutral_prompts",
    "neutral_texts",
    "shipped_sets",
]

FILE_SUFFIXES = frozenset({".jsonl", ".csv"})


@dataclass(frozen=True)
class PersonaSpec:
    """What to calibrate: one calibration set per axis, and the personas that the poles combine into.

    `personas` maps a persona's name to the names of its poles (`INFP` -> `("I", "N", "F", "P")`).
    """

    name: str
    sets: tuple[CalibrationSet, ...]
    personas: Mapping[str, tuple[str, ...]]

    @property
    def poles(self) -> tuple[str, ...]:
        """The names of all poles, the positive before the negative one of each axis."""
        return tuple(pole for item in self.sets for pole in (item.positive_pole, item.negative_pole))


@dataclass(frozen=True)
class ShippedSet:
    """One entry of the list of sets that ship."""

    name: str
    description: str
    axes: tuple[str, ...]
    compose: bool


def load_persona_set(name: str | os.PathLike[str]) -> PersonaSpec:
    """The shipped set `name`, or the contrasts of a JSONL or CSV file whose two poles become two personas.

    Raises PersonaNotFoundError, which lists what ships, when `name` is neither; CalibrationError when the file is
    malformed.
    """
    text = os.fspath(name)
    for shipped in shipped_sets():
        if shipped.name == text.casefold():
            return _load_shipped(shipped)
    if Path(text).suffix.casefold() in FILE_SUFFIXES or Path(text).is_file():
        contrasts = load_contrasts(Path(text))
        return PersonaSpec(contrasts.name, (contrasts,), _personas((contrasts,), compose=False))
    known = ", ".join(shipped.name for shipped in shipped_sets())
    raise PersonaNotFoundError(f"no persona set {text!r}; give one of {known}, or a .jsonl or .csv file of contrasts")


def shipped_sets() -> tuple[ShippedSet, ...]:
    """The sets that ship, in the order of personas.toml."""
    return tuple(
        ShippedSet(name, entry["description"], tuple(entry["axes"]), entry.get("compose", False))
        for name, entry in _index()["sets"].items()
    )


def neutral_prompts() -> tuple[str, ...]:
    """Ordinary chat requests without personality content; the model's own answers to them measure chat drift."""
    return parse_texts(_shipped_file("neutral_prompts.jsonl"), "prompt", source="neutral_prompts.jsonl")


def neutral_texts() -> tuple[str, ...]:
    """Web-like passages without personality content, of about 120 to 160 words."""
    return parse_texts(_shipped_file("neutral_text.jsonl"), "text", source="neutral_text.jsonl")


def _load_shipped(shipped: ShippedSet) -> PersonaSpec:
    sets = tuple(_load_axis(axis) for axis in shipped.axes)
    return PersonaSpec(shipped.name, sets, _personas(sets, shipped.compose))


def _load_axis(axis: str) -> CalibrationSet:
    entry = _index()["axes"][axis]
    found = parse_contrasts(_shipped_file(entry["file"]), name=Path(entry["file"]).stem, source=entry["file"])
    described = entry.get("descriptions", {})
    return replace(
        found,
        positive_description=described.get(found.positive_pole, found.positive_description),
        negative_description=described.get(found.negative_pole, found.negative_description),
    )


def _personas(sets: tuple[CalibrationSet, ...], compose: bool) -> Mapping[str, tuple[str, ...]]:
    poles = [(item.positive_pole, item.negative_pole) for item in sets]
    personas = {"".join(combined): combined for combined in itertools.product(*poles)} if compose else {}
    for pole in itertools.chain(*poles):
        personas[pole] = (pole,)
    return MappingProxyType(personas)


@cache
def _index() -> Mapping[str, Any]:
    return tomllib.loads(_shipped_file("personas.toml").decode())


def _shipped_file(name: str) -> bytes:
    return resources.files("persona_edge.personas").joinpath(name).read_bytes()
