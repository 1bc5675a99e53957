"""What an evaluation leaves behind: every value of every item, and where and with what it was measured.

A record is data only; tables and plots are made from it (report_*.py, plots.py). Its JSON holds floats to six
significant digits, and null for an item that could not be measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np

from persona_edge.conditions import Conditions
from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.interfaces import EngineName, Items
from persona_edge.errors import InputError

__all__ = [
    "ArmRecord",
    "Axis",
    "Outcome",
    "Record",
    "from_json",
    "merged",
    "outcome_from_plain",
    "outcome_to_plain",
    "to_json",
]

FORMAT: Final = "persona-edge evaluation 1"
_NUMBER = r"(?:-?[\d.e+-]+|null)"
_NUMBERS: Final = re.compile(rf"\[\n\s*{_NUMBER}(?:,\n\s*{_NUMBER})*\n\s*\]")


@dataclass(frozen=True)
class Axis:
    """An axis by its names."""

    name: str
    positive: str
    negative: str

    @classmethod
    def of(cls, axis_set: CalibrationSet) -> Axis:
        """The axis of a calibration set."""
        return cls(axis_set.axis, axis_set.positive_pole, axis_set.negative_pole)


@dataclass(frozen=True)
class Outcome:
    """One task on one arm. `axis` is the name of the axis of a persona task, None for others; `toward` is the arm's
    there. `error` says why there are no measures.
    """

    task: str
    kind: str
    axis: str | None
    toward: int
    measures: tuple[Items, ...] = ()
    transcripts: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    def measure(self, name: str) -> Items | None:
        """The measure called `name`, if there is one."""
        return next((items for items in self.measures if items.measure == name), None)


@dataclass(frozen=True)
class ArmRecord:
    """One arm on one engine. `error` says why it could not be made; it then has no outcomes."""

    engine: EngineName
    name: str
    pole: str | None
    facts: Mapping[str, float | str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    error: str | None = None

    def outcome(self, task: str, axis: str | None) -> Outcome | None:
        """What task `task` found on `axis` (None: a task of no axis)."""
        return next((found for found in self.outcomes if (found.task, found.axis) == (task, axis)), None)


@dataclass(frozen=True)
class Record:
    """An evaluation of one model. `fingerprint` is its weights' SHA-256; `notes` say what was left out and why.

    `analysis` is a PackAnalysis as plain values, empty where no pack was given.
    """

    model: str
    fingerprint: str
    axes: tuple[Axis, ...]
    arms: tuple[ArmRecord, ...]
    settings: Mapping[str, object]
    conditions: Conditions
    notes: tuple[str, ...] = ()
    analysis: Mapping[str, Any] = field(default_factory=dict)

    def arm(self, engine: str, name: str, pole: str | None) -> ArmRecord | None:
        """The arm with these names."""
        return next((arm for arm in self.arms if (arm.engine, arm.name, arm.pole) == (engine, name, pole)), None)


def merged(records: Sequence[Record]) -> Record:
    """One record of several of the same model. Arms of the same engine, name and pole join; a later outcome counts.

    Raises InputError when there is none, or when they are of different models.
    """
    if not records:
        raise InputError("there is no evaluation to merge; give at least one")
    first = records[0]
    others = {record.model for record in records if record.fingerprint != first.fingerprint}
    if others:
        raise InputError(f"evaluations of {first.model} and of {', '.join(sorted(others))} do not go into one record")
    axes = dict.fromkeys(axis for record in records for axis in record.axes)
    notes = dict.fromkeys(note for record in records for note in record.notes)
    arms = _merged_arms(arm for record in records for arm in record.arms)
    return replace(first, axes=tuple(axes), arms=arms, notes=tuple(notes))


def _merged_arms(arms: Iterable[ArmRecord]) -> tuple[ArmRecord, ...]:
    found: dict[tuple[str, str, str | None], ArmRecord] = {}
    for arm in arms:
        key = (arm.engine, arm.name, arm.pole)
        earlier = found.get(key, arm)
        outcomes = {(outcome.task, outcome.axis): outcome for outcome in (*earlier.outcomes, *arm.outcomes)}
        facts = {**earlier.facts, **arm.facts}
        found[key] = replace(arm, facts=facts, outcomes=tuple(outcomes.values()), error=arm.error or earlier.error)
    return tuple(found.values())


def to_json(record: Record) -> str:
    """The record as JSON text, the values of a measure on one line."""
    plain = _plain({"format": FORMAT, **asdict(record)})
    text = json.dumps(plain, ensure_ascii=False, indent=1, allow_nan=False)
    # Inside JSON strings a line break is written as \\n, so what spans lines is an array.
    return (
        _NUMBERS.sub(lambda found: re.sub(r"\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n"
    )


def from_json(text: str) -> Record:
    """The record that `to_json` wrote; InputError when it is none."""
    try:
        found = json.loads(text)
        if found.get("format") != FORMAT:
            raise InputError(
                f"not an evaluation of this version: its format is {found.get('format')!r}, not {FORMAT!r}"
            )
        return Record(
            model=found["model"],
            fingerprint=found["fingerprint"],
            axes=tuple(Axis(**axis) for axis in found["axes"]),
            arms=tuple(_arm(arm) for arm in found["arms"]),
            settings=found["settings"],
            conditions=Conditions(**found["conditions"]),
            notes=tuple(found["notes"]),
            analysis=found.get("analysis", {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not an evaluation's JSON: {type(error).__name__} {error}") from error


def outcome_to_plain(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON-compatible values."""
    plain: dict[str, Any] = _plain(asdict(outcome))
    return plain


def outcome_from_plain(plain: Mapping[str, Any]) -> Outcome:
    """The inverse of `outcome_to_plain`."""
    return Outcome(**{**plain, "measures": tuple(_items(items) for items in plain["measures"])})


def _arm(plain: Mapping[str, Any]) -> ArmRecord:
    return ArmRecord(**{**plain, "outcomes": tuple(outcome_from_plain(outcome) for outcome in plain["outcomes"])})


def _items(plain: Mapping[str, Any]) -> Items:
    values = np.array([math.nan if value is None else value for value in plain["values"]], dtype=np.float64)
    return Items(plain["measure"], values, plain["unit"], plain["higher_is"])


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, bool | int | str) or value is None:
        return value
    return int(value) if isinstance(value, np.integer) else str(value)
