"""A record to files: JSON with everything, and the Markdown, HTML and SVG that are made from that JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from persona_edge.effect.plots import effect_plot
from persona_edge.effect.record import Record, from_json, to_json
from persona_edge.effect.report_html import html
from persona_edge.effect.report_markdown import markdown
from persona_edge.errors import MissingDependencyError
from persona_edge.files import write_atomically

__all__ = ["report_path", "write_reports"]

SUFFIXES: Final = (".json", ".md", ".html", ".svg")


def report_path(prefix: Path, suffix: str) -> Path:
    """`prefix` with `suffix` after its name; a suffix of a report that is already there does not count."""
    name = prefix.name.removesuffix(prefix.suffix) if prefix.suffix in SUFFIXES else prefix.name
    return prefix.with_name(name + suffix)


def write_reports(record: Record, prefix: Path) -> tuple[Path, ...]:
    """Write `prefix`.json, .md, .html and, when there is something to draw, .svg; returns their paths.

    Each file appears whole or not at all. Raises OutputError. Without matplotlib there is no picture, and a note.
    """
    text = to_json(record)
    shown = from_json(text)  # what is reported is what the JSON holds, rounding included
    try:
        plot = effect_plot(shown)
    except MissingDependencyError as error:
        plot, shown = None, replace(shown, notes=(*shown.notes, str(error)))
    picture = report_path(prefix, ".svg")
    files = {report_path(prefix, ".json"): text}
    if plot is not None:
        files[picture] = f'<?xml version="1.0" encoding="utf-8"?>\n{plot}'
    files[report_path(prefix, ".md")] = markdown(shown, picture=None if plot is None else picture.name)
    files[report_path(prefix, ".html")] = html(shown, plot=plot)
    for path, content in files.items():
        write_atomically(path, content.encode())
    return tuple(files)
