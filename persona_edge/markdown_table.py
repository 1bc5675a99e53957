"""Rows of text as a Markdown table: the first column to the left, the others to the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

__all__ = ["markdown_table"]


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The table's lines; a bar within a cell is escaped, what else is markup is the caller's."""
    yield _row(headers)
    yield _row(("---", *["---:"] * (len(headers) - 1)))
    yield from map(_row, rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
