"""What a measurement leaves behind: tables to read, values to compute with, and where and with what it was made."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from persona_edge import __version__
from persona_edge.doctor import installed_version
from persona_edge.machine import cpu_model, system_name, total_memory, usable_cores

__all__ = ["Conditions", "Result", "Spread", "Table", "conditions", "markdown", "write"]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
_PACKAGES = ("numpy", "llama-cpp-python", "torch", "transformers")


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
class Conditions:
    """Where, with what and when something was measured. Memory in bytes, None where it cannot be told."""

    command: str
    date: str
    cpu: str
    cores: int
    memory_bytes: int | None
    system: str
    versions: Mapping[str, str]


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
    versions = {name: version for name in _PACKAGES if (version := installed_version(name)) is not None}
    return Conditions(
        command=shlex.join(["python", "-m", "benchmarks", *map(_without_folder, arguments)]),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_bytes=total_memory(),
        system=system_name(),
        versions={"python": platform.python_version(), **versions, "persona-edge": __version__},
    )


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
        yield _row(table.headers)
        yield _row(("---", *["---:"] * (len(table.headers) - 1)))
        yield from map(_row, table.rows)
        yield ""
    for note in result.notes:
        yield from (note, "")
    memory = "" if measured.memory_bytes is None else f", {measured.memory_bytes / 2**30:.1f} GiB of memory"
    versions = ", ".join(f"{package} {version}" for package, version in measured.versions.items())
    yield f"`{measured.command}` on {measured.date}: {measured.cpu}, {measured.cores} cores{memory}; {measured.system};"
    yield f"{versions}."
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _without_folder(argument: str) -> str:
    """`--pack=/home/me/a.maskpack` as `--pack=a.maskpack`: where files lie is nobody's business."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_without_folder(value)}"
    return Path(argument).name if os.sep in argument else argument
