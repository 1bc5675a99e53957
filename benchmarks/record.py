"""What a measurement leaves behind: tables to read, values to compute with, and where and with what it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from persona_edge.conditions import Conditions
from persona_edge.conditions import conditions as current_conditions
from persona_edge.markdown_table import markdown_table

__all__ = ["Conditions", "Result", "Spread", "Table", "conditions", "markdown", "write"]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Table:
    """Rows of text under `headers`; the first column is left-aligned, the others right-aligned."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome. `values` is what JSON can hold, with units in the names; `notes` are paragraphs.

    `plot` is SVG text, "" for none.
    """

    title: str
    tables: tuple[Table, ...]
    values: Mapping[str, object]
    notes: tuple[str, ...] = ()
    plot: str = ""


@dataclass(frozen=True)
class Spread:
    """Quantiles of repeated measurements, in the unit that these were in."""

    n: int
    p25: float
    p50: float
    p75: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        p25, p50, p75, p95 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75, 0.95)))
        return cls(len(values), p25, p50, p75, p95)


def conditions(arguments: Sequence[str]) -> Conditions:
    """This machine and these packages now. `arguments` are the command's; folders in them are left out."""
    return current_conditions(["python", "-m", "benchmarks", *arguments])


def markdown(result: Result, measured: Conditions) -> str:
    """The result as a page."""
    return "\n".join(_lines(result, measured))


def write(name: str, result: Result, measured: Conditions, folder: Path = FOLDER) -> tuple[Path, ...]:
    """Store `name`.json, `name`.md and, if there is a plot, `name`.svg in `folder`, in place of an earlier run's.

    OSError when that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown, as_svg = (folder / f"{name}.{ending}" for ending in ("json", "md", "svg"))
    content = {"title": result.title, "measured": asdict(measured), "values": result.values}
    as_json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page = markdown(result, measured)
    if not result.plot:
        as_markdown.write_text(page, encoding="utf-8")
        return as_json, as_markdown
    title, _, rest = page.partition("\n")
    as_markdown.write_text(f"{title}\n\n![{result.title}]({as_svg.name})\n{rest}", encoding="utf-8")
    as_svg.write_text(result.plot, encoding="utf-8")
    return as_json, as_markdown, as_svg


def _lines(result: Result, measured: Conditions) -> Iterator[str]:
    yield from (f"# {result.title}", "")
    for table in result.tables:
        if table.caption:
            yield from (table.caption, "")
        yield from (*markdown_table(table.headers, table.rows), "")
    for note in result.notes:
        yield from (note, "")
    yield from (f"`{measured.command}` on {measured.date}: {measured.machine}.", "")
