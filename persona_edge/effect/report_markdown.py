"""A record as a Markdown page: overview, where the default method stands, details, side effects, a few transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from persona_edge.effect.record import Record
from persona_edge.effect.report_sections import LEGEND, Notes, Section, measured_on, notes_of, sections_of
from persona_edge.effect.transcripts import Transcripts, transcripts_of
from persona_edge.markdown_table import markdown_table

__all__ = ["markdown"]

N_PROMPTS = 3
MAX_CHARACTERS = 400


def markdown(record: Record, *, picture: str | None = None) -> str:
    """The page. `picture` is the link to the plot."""
    return "\n".join(_lines(record, picture)) + "\n"


def _lines(record: Record, picture: str | None) -> Iterator[str]:
    yield from (f"# Effect: {record.model}", "")
    if record.conditions.command:
        yield from (f"`{record.conditions.command}`", "")
    yield from (measured_on(record), "", LEGEND, "")
    overview, *others = sections_of(record)
    yield from _section(overview)
    if picture is not None:
        yield from (f"![Effect against side effect]({picture})", "")
    for section in others:
        yield from _section(section)
    yield from _transcripts(transcripts_of(record))
    for notes in notes_of(record):
        yield from _notes(notes)


def _section(section: Section) -> Iterator[str]:
    if section.tables:
        yield from (f"## {section.title}", "")
    for table in section.tables:
        yield from (f"{table.caption}:", "", *markdown_table(table.headers, table.rows), "")


def _transcripts(found: Sequence[Transcripts]) -> Iterator[str]:
    if found:
        yield from ("## Transcripts", "", "Of the first prompts; all of them are in the HTML report.", "")
    for part in found:
        for prompt in part.prompts[:N_PROMPTS]:
            yield from (f"**{_inline(prompt)}** ({part.title})", "")
            yield from (f"- {name}: {_inline(replies.get(prompt, '-'))}" for name, replies in part.replies.items())
            yield ""


def _notes(notes: Notes) -> Iterator[str]:
    if notes.lines:
        yield from (f"## {notes.title}", "", *(f"- {_inline(line, None)}" for line in notes.lines), "")


def _inline(text: str, longest: int | None = MAX_CHARACTERS) -> str:
    """One line, cut where it is long, with what Markdown would read as markup escaped."""
    line = " ".join(text.split())
    if longest is not None and len(line) > longest:
        line = f"{line[:longest].rstrip()} …"
    return "".join(f"\\{character}" if character in "\\`*_[]<>#|" else character for character in line)
