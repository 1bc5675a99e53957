"""A record as a Markdown page: overview, where the default method stands, details, side effects, a few transcripts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from persona_edge.effect.analysis_tables import analysis_tables
from persona_edge.effect.record import Conditions, Record
from persona_edge.effect.tables import (
    Table,
    facts_table,
    overview_tables,
    persona_tables,
    problems,
    side_effect_tables,
    standing_tables,
)
from persona_edge.effect.transcripts import Transcripts, transcripts_of

__all__ = ["LEGEND", "conditions_text", "markdown"]

LEGEND = (
    "A cell is the mean with its 95 % interval (bootstrap over items) and, after it, the difference to base, paired "
    "item by item; * marks a difference whose own interval excludes zero. Shares and areas under a curve are percent, "
    "and as the arm's own pole sees them."
)
N_PROMPTS = 3
MAX_CHARACTERS = 400


def markdown(record: Record, *, picture: str | None = None) -> str:
    """The page. `picture` is the link to the plot."""
    return "\n".join(_lines(record, picture)) + "\n"


def conditions_text(measured: Conditions) -> str:
    """Where and with what, in one sentence."""
    memory = "" if measured.memory_bytes is None else f", {measured.memory_bytes / 2**30:.1f} GiB of memory"
    versions = ", ".join(f"{package} {version}" for package, version in measured.versions.items())
    return f"{measured.date}; {measured.cpu}, {measured.cores} cores{memory}; {measured.system}; {versions}."


def _lines(record: Record, picture: str | None) -> Iterator[str]:
    yield from (f"# Effect: {record.model}", "")
    if record.conditions.command:
        yield from (f"`{record.conditions.command}`", "")
    yield from (conditions_text(record.conditions), "", LEGEND, "")
    yield from _section("Overview", overview_tables(record))
    if picture is not None:
        yield from (f"![Effect against side effect]({picture})", "")
    yield from _section("Against the other arms", standing_tables(record))
    yield from _section("Persona", persona_tables(record))
    yield from _section("Side effects", side_effect_tables(record))
    yield from _section("Making and keeping", [facts_table(record)])
    yield from _section("The masks", analysis_tables(record.analysis))
    yield from _transcripts(transcripts_of(record))
    yield from _list("Settings", [f"{name}: {value}" for name, value in record.settings.items()])
    yield from _list("Left out, and what went wrong", problems(record))


def _section(title: str, tables: Iterable[Table]) -> Iterator[str]:
    filled = [table for table in tables if table.rows and len(table.headers) > 1]
    if filled:
        yield from (f"## {title}", "")
    for table in filled:
        yield from (f"{table.caption}:", "", _row(table.headers))
        yield _row(("---", *["---:"] * (len(table.headers) - 1)))
        yield from map(_row, table.rows)
        yield ""


def _transcripts(found: Sequence[Transcripts]) -> Iterator[str]:
    if found:
        yield from ("## Transcripts", "", "Of the first prompts; all of them are in the HTML report.", "")
    for part in found:
        for prompt in part.prompts[:N_PROMPTS]:
            yield from (f"**{_inline(prompt)}** ({part.title})", "")
            yield from (f"- {name}: {_inline(replies.get(prompt, '-'))}" for name, replies in part.replies.items())
            yield ""


def _list(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from (f"## {title}", "", *(f"- {_inline(line, None)}" for line in lines), "")


def _inline(text: str, longest: int | None = MAX_CHARACTERS) -> str:
    """One line, cut where it is long, with what Markdown would read as markup escaped."""
    line = " ".join(text.split())
    if longest is not None and len(line) > longest:
        line = f"{line[:longest].rstrip()} …"
    return "".join(f"\\{character}" if character in "\\`*_[]<>#|" else character for character in line)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
