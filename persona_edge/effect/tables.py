"""A record as tables of text, the same for every kind of report.

Values are as the arm's own pole sees them (intervals.oriented): for the pole I, `I likelier` is one minus `E likelier`.
A cell reads

    78.0 [66.1, 87.2] +18.0*      mean, 95 % interval, paired difference to base; * where its interval excludes zero

Shares and areas under a curve are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from persona_edge.effect.interfaces import CHAT_KL, SHARE, TOWARD_POLE, Items
from persona_edge.effect.intervals import Estimate, estimate, paired_difference
from persona_edge.effect.record import ArmRecord, Axis, Record

__all__ = [
    "REFERENCE",
    "Side",
    "Table",
    "engines_of",
    "facts_table",
    "overview_tables",
    "persona_tables",
    "problems",
    "side_effect_tables",
    "sides_of",
    "standing_tables",
    "table_estimate",
]

BASE: Final = "base"
REFERENCE: Final = "contrastive-fisher"
PERCENT_UNITS: Final = (SHARE, "AUC")
LOG_RATIO: Final = "log perplexity ratio to base"
OTHER_AUTHOR: Final = "other author"  # in the names of tasks on data that we did not write
MAX_COLUMNS: Final = 6
FACTS: Final = (
    "artefact_bytes",
    "share_of_units",
    "context_tokens",
    "strength",
    "seconds_to_make",
    "tuned_chat_kl",
    "tuned_perplexity_ratio",
)


@dataclass(frozen=True)
class Table:
    """Rows of text under `headers`; the first column is left-aligned, the others right-aligned."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Side:
    """One pole, or a composition, as measured on one axis; `toward` is its direction there."""

    axis: Axis
    pole: str
    toward: int


@dataclass(frozen=True)
class Column:
    """A measure of a task; `axis` as in Outcome."""

    task: str
    axis: str | None
    measure: str
    unit: str
    higher_is: str

    def items(self, arm: ArmRecord) -> Items | None:
        """What `arm` has for this column."""
        outcome = arm.outcome(self.task, self.axis)
        return None if outcome is None else outcome.measure(self.measure)

    @property
    def is_log(self) -> bool:
        """Whether people know exp of it."""
        return self.measure.startswith("log perplexity")

    def header(self, pole: str | None = None) -> str:
        """Task and measure in words, in the pole's terms, with the unit."""
        name = self.measure.removeprefix("log ") if self.is_log else self.measure
        if pole is not None and self.higher_is == "positive":
            name = name.replace("the positive pole", pole).replace("positive", pole)
        unit = "%" if self.unit in PERCENT_UNITS else "" if self.is_log else self.unit
        shown = name if name == self.task else f"{self.task}: {name}"
        return f"{shown} ({unit})" if unit else shown


def engines_of(record: Record) -> tuple[str, ...]:
    """The engines that arms ran on, in order."""
    return tuple(dict.fromkeys(arm.engine for arm in record.arms))


def sides_of(record: Record, engine: str) -> tuple[Side, ...]:
    """The poles and compositions that were measured on each axis, positive poles first.

    Where only base was measured, it is shown as the positive pole sees it.
    """
    found: dict[Side, None] = {}
    for axis in record.axes:
        measured = [
            (arm.pole, outcome.toward)
            for arm in record.arms
            for outcome in arm.outcomes
            if arm.engine == engine and outcome.axis == axis.name
        ]
        sides = [Side(axis, pole, toward) for pole, toward in measured if pole is not None]
        if measured and not sides:
            sides = [Side(axis, axis.positive, 1)]
        poles = (axis.positive, axis.negative)
        found |= dict.fromkeys(sorted(sides, key=lambda side: (side.pole not in poles, -side.toward)))
    return tuple(found)


def overview_tables(record: Record) -> Iterator[Table]:
    """Per engine: effect on the axis's own and other authors' contrasts, drift on chat, perplexity; an arm a row."""
    headers = (
        "arm",
        "held-out contrasts (%)",
        "other author's (%)",
        "chat KL (nats per token)",
        "perplexity ratio",
        "bytes",
    )
    for engine in engines_of(record):
        rows = [
            (f"{side.pole}: {arm.name}", *_overview(arm, record.arm(engine, BASE, None), side), _size(arm))
            for side in sides_of(record, engine)
            for arm in _arms(record, engine, side)
        ]
        caption = f"Engine {engine}: contrasts whose answer of the pole is the likelier, and what that costs"
        yield Table(caption, headers, tuple(rows))


def _overview(arm: ArmRecord, base: ArmRecord | None, side: Side) -> list[str]:
    """Four cells: own and other author's contrasts, chat KL, perplexity ratio."""
    effects, costs = _columns([arm], side.axis.name), _columns([arm], None)
    own = next((c for c in effects if c.measure == TOWARD_POLE and OTHER_AUTHOR not in c.task), None)
    other = next((c for c in effects if c.higher_is == "positive" and OTHER_AUTHOR in c.task), None)
    chat_kl = next((c for c in costs if c.measure == CHAT_KL), None)
    ratio = next((c for c in costs if c.measure == LOG_RATIO), None)
    return ["-" if column is None else _cell(arm, base, column, side.toward) for column in (own, other, chat_kl, ratio)]


def persona_tables(record: Record) -> Iterator[Table]:
    """Per engine, axis and pole: all that was measured of the persona; shares and scores first, then nats, then levels
    and biases, which have no direction.
    """
    for engine in engines_of(record):
        for side in sides_of(record, engine):
            arms, base = _arms(record, engine, side), record.arm(engine, BASE, None)
            columns = _columns(arms, side.axis.name)
            caption = f"Engine {engine}, axis {side.axis.name}, toward {side.pole}"
            directed = [c for c in columns if c.higher_is != "neutral"]
            for part in _parts(sorted(directed, key=lambda c: c.unit.startswith("nats"))):
                yield _table(caption, arms, part, base, side)
            for part in _parts([c for c in columns if c.higher_is == "neutral"]):
                yield _table(f"{caption}: levels and biases", arms, part, base, side)


def side_effect_tables(record: Record) -> Iterator[Table]:
    """Per engine: what every arm does to abilities and language."""
    for engine in engines_of(record):
        arms = [arm for arm in record.arms if arm.engine == engine and arm.outcomes]
        columns = [c for c in _columns(arms, None) if c.higher_is in ("better", "worse")]
        for part in _parts(columns):
            yield _table(f"Engine {engine}: side effects", arms, part, record.arm(engine, BASE, None), None)


def standing_tables(record: Record, reference: str = REFERENCE) -> Iterator[Table]:
    """Per engine and pole: `reference` minus every other arm on the first measure of each persona task.

    The last column counts measures on which the reference is higher, and in brackets those where it clearly is and
    where it clearly is not.
    """
    for engine in engines_of(record):
        for side in sides_of(record, engine):
            arms = _arms(record, engine, side)
            mine = next((arm for arm in arms if arm.name == reference), None)
            others = [arm for arm in arms if arm.name != reference]
            if mine is None or not others:
                continue
            columns = _first_of_each_task(_columns(arms, side.axis.name))
            rows = [_standing_row(mine, other, columns, side.toward) for other in others]
            headers = ("arm", *(column.header(side.pole) for column in columns), f"{reference} higher")
            yield Table(f"Engine {engine}, toward {side.pole}: {reference} minus the other arms", headers, tuple(rows))


def facts_table(record: Record) -> Table:
    """What each arm costs to make and to keep."""
    arms = [arm for arm in record.arms if arm.facts]
    names = [name for name in FACTS if any(name in arm.facts for arm in arms)]
    rows = [(_label(arm), *(_fact(arm.facts.get(name)) for name in names)) for arm in arms]
    return Table("What each arm takes", ("arm", *(name.replace("_", " ") for name in names)), tuple(rows))


def problems(record: Record) -> tuple[str, ...]:
    """Notes of the run, arms that could not be made and tasks that failed, one line each."""
    found = list(record.notes)
    for arm in record.arms:
        if arm.error is not None:
            found.append(f"{_label(arm)} ({arm.engine}): {arm.error}")
        found += [f"{_label(arm)} ({arm.engine}), {o.task}: {o.error}" for o in arm.outcomes if o.error is not None]
    return tuple(dict.fromkeys(found))


def table_estimate(arm: ArmRecord, column: Column, toward: int) -> Estimate | None:
    """The estimate behind a cell; exp of the mean where people know that."""
    items = column.items(arm)
    found = None if items is None else estimate(items, toward=toward)
    if found is None or not column.is_log:
        return found
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.n_items)


def _arms(record: Record, engine: str, side: Side) -> list[ArmRecord]:
    """Base, then the arms of this pole that were measured on this axis."""
    return [
        arm
        for arm in record.arms
        if arm.engine == engine
        and arm.pole in (None, side.pole)
        and any(outcome.axis == side.axis.name for outcome in arm.outcomes)
    ]


def _columns(arms: Sequence[ArmRecord], axis: str | None) -> list[Column]:
    """Measures of persona tasks of `axis`, or of the others for None; in the order in which they were measured."""
    found: dict[tuple[str, str], Column] = {}
    for arm in arms:
        for outcome in arm.outcomes:
            if outcome.axis == axis:
                for items in outcome.measures:
                    column = Column(outcome.task, axis, items.measure, items.unit, items.higher_is)
                    found.setdefault((outcome.task, items.measure), column)
    return list(found.values())


def _first_of_each_task(columns: Sequence[Column]) -> list[Column]:
    found: dict[str, Column] = {}
    for column in columns:
        if column.higher_is == "positive":
            found.setdefault(column.task, column)
    return list(found.values())


def _parts(columns: Sequence[Column]) -> Iterator[Sequence[Column]]:
    for start in range(0, len(columns), MAX_COLUMNS):
        yield columns[start : start + MAX_COLUMNS]


def _table(
    caption: str, arms: Sequence[ArmRecord], columns: Sequence[Column], base: ArmRecord | None, side: Side | None
) -> Table:
    """A row per arm; `side` None for measures that have no pole."""
    toward, pole = (0, None) if side is None else (side.toward, side.pole)
    rows = [
        (_label(arm) if side is None else arm.name, *(_cell(arm, base, column, toward) for column in columns))
        for arm in arms
    ]
    return Table(caption, ("arm", *(column.header(pole) for column in columns)), tuple(rows))


def _cell(arm: ArmRecord, base: ArmRecord | None, column: Column, toward: int) -> str:
    found = table_estimate(arm, column, toward)
    if found is None:
        return "-"
    decimals, scale = _format(column)
    text = f"{scale * found.mean:.{decimals}f} [{scale * found.low:.{decimals}f}, {scale * found.high:.{decimals}f}]"
    if base is None or arm.name == BASE or column.is_log or column.measure == CHAT_KL:
        return text
    difference = _difference(arm, base, column, toward)
    return text if difference is None else f"{text} {_signed(difference, column)}"


def _difference(arm: ArmRecord, other: ArmRecord, column: Column, toward: int) -> Estimate | None:
    mine, theirs = column.items(arm), column.items(other)
    return None if mine is None or theirs is None else paired_difference(mine, theirs, toward=toward)


def _signed(difference: Estimate, column: Column) -> str:
    decimals, scale = _format(column)
    return f"{scale * difference.mean:+.{decimals}f}{'*' if difference.excludes_zero else ''}"


def _standing_row(mine: ArmRecord, other: ArmRecord, columns: Sequence[Column], toward: int) -> tuple[str, ...]:
    differences = [_difference(mine, other, column, toward) for column in columns]
    known = [d for d in differences if d is not None]
    higher = sum(d.mean > 0 for d in known)
    clearly, not_at_all = sum(d.low > 0 for d in known), sum(d.high < 0 for d in known)
    cells = ["-" if d is None else _signed(d, c) for d, c in zip(differences, columns, strict=True)]
    return (other.name, *cells, f"{higher} of {len(known)} ({clearly} clearly, {not_at_all} clearly lower)")


def _format(column: Column) -> tuple[int, float]:
    """Decimals, and what a value is multiplied by."""
    if column.unit in PERCENT_UNITS:
        return 1, 100.0
    return (2, 1.0) if column.unit.startswith("points") else (3, 1.0)


def _label(arm: ArmRecord) -> str:
    return arm.name if arm.pole is None else f"{arm.pole}: {arm.name}"


def _size(arm: ArmRecord) -> str:
    return _fact(arm.facts.get("artefact_bytes"))


def _fact(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
