"""What every report of a record says, in this order, whatever it is written in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from persona_edge.effect.analysis_tables import analysis_tables
from persona_edge.effect.record import Record
from persona_edge.effect.tables import (
    Table,
    facts_table,
    overview_tables,
    persona_tables,
    problems,
    side_effect_tables,
    standing_tables,
)

__all__ = ["LEGEND", "Notes", "Section", "measured_on", "notes_of", "sections_of"]

LEGEND: Final = (
    "A cell is the mean with its 95 % interval (bootstrap over items) and, after it, the difference to base, paired "
    "item by item; * marks a difference whose own interval excludes zero. Shares and areas under a curve are percent, "
    "and as the arm's own pole sees them."
)


@dataclass(frozen=True)
class Section:
    """Tables under a title; a section without tables is left out of a report."""

    title: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Notes:
    """Lines under a title; left out where there are none."""

    title: str
    lines: tuple[str, ...]


def measured_on(record: Record) -> str:
    """When, where and with what, in one sentence."""
    return f"{record.conditions.date}; {record.conditions.machine}."


def sections_of(record: Record) -> tuple[Section, ...]:
    """The tables; the first section is the overview, which the plot follows. Transcripts and notes come after all."""
    return (
        _section("Overview", overview_tables(record)),
        _section("Against the other arms", standing_tables(record)),
        _section("Persona", persona_tables(record)),
        _section("Side effects", side_effect_tables(record)),
        _section("Making and keeping", [facts_table(record)]),
        _section("The masks", analysis_tables(record.analysis)),
    )


def notes_of(record: Record) -> tuple[Notes, ...]:
    """What it was measured with, and what is missing."""
    return (
        Notes("Settings", tuple(_setting(name, value) for name, value in record.settings.items() if value is not None)),
        Notes("Left out, and what went wrong", tuple(problems(record))),
    )


def _setting(name: str, value: object) -> str:
    return f"{name}: {', '.join(str(each) for each in value.values()) if isinstance(value, Mapping) else value}"


def _section(title: str, tables: Iterable[Table]) -> Section:
    return Section(title, tuple(table for table in tables if table.rows and len(table.headers) > 1))
