"""A record as one HTML file that needs nothing else: tables, the plot as inline SVG, all transcripts side by side.

Everything that a model or a user wrote is escaped; the page holds no script.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from persona_edge.effect.record import Record
from persona_edge.effect.report_sections import LEGEND, Notes, Section, measured_on, notes_of, sections_of
from persona_edge.effect.transcripts import Transcripts, transcripts_of

__all__ = ["html"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; margin: 0 0 1.5rem; }
table { border-collapse: collapse; font-size: 13px; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; vertical-align: top; }
th { border-bottom-color: #888; } th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.said td { text-align: left; min-width: 16rem; white-space: pre-wrap; } .said td:first-child { min-width: 9rem; }
code { background: #f3f3f3; padding: .1rem .3rem; } svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd; } code { background: #333; }
svg { background: #fff; } th, td { border-color: #444; } }
"""


def html(record: Record, *, plot: str | None = None) -> str:
    """The page. `plot` is SVG text."""
    return "\n".join(_page(record, plot)) + "\n"


def _page(record: Record, plot: str | None) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Effect: {escape(record.model)}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>Effect: {escape(record.model)}</h1>"
    if record.conditions.command:
        yield f"<p><code>{escape(record.conditions.command)}</code></p>"
    yield f"<p>{escape(measured_on(record))}</p><p>{escape(LEGEND)}</p>"
    overview, *others = sections_of(record)
    yield from _section(overview)
    if plot is not None:
        yield f"<h2>Effect against side effect</h2>{plot}"
    for section in others:
        yield from _section(section)
    yield from _transcripts(transcripts_of(record))
    for notes in notes_of(record):
        yield from _notes(notes)
    yield "</body></html>"


def _section(section: Section) -> Iterator[str]:
    if section.tables:
        yield f"<h2>{section.title}</h2>"
    for table in section.tables:
        yield f'<div class="wide"><table><caption>{escape(table.caption)}</caption>'
        yield _row(table.headers, "th")
        yield from (_row(row, "td") for row in table.rows)
        yield "</table></div>"


def _transcripts(found: Sequence[Transcripts]) -> Iterator[str]:
    if found:
        yield "<h2>Transcripts</h2>"
    for part in found:
        yield f'<div class="wide"><table class="said"><caption>{escape(part.title)}</caption>'
        yield _row(("prompt", *part.replies), "th")
        for prompt in part.prompts:
            yield _row((prompt, *(replies.get(prompt, "-") for replies in part.replies.values())), "td")
        yield "</table></div>"


def _notes(notes: Notes) -> Iterator[str]:
    if notes.lines:
        yield f"<h2>{notes.title}</h2><ul>"
        yield from (f"<li>{escape(line)}</li>" for line in notes.lines)
        yield "</ul>"


def _row(cells: Sequence[str], kind: str) -> str:
    return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"
