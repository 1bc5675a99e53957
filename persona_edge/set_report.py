"""Calibration sets in plain lines for a terminal: what a check found, what a set holds. No control characters."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.persona_sets import PersonaSpec, load_persona_set, shipped_sets
from persona_edge.set_checker import Finding, Measures, Rules, check_set, listed, measure
from persona_edge.terminal_text import printable

if TYPE_CHECKING:
    from persona_edge.new_set import NewSet, NewSetRequest

__all__ = ["CheckReport", "check_report", "list_lines", "new_set_lines", "show_lines"]

_NUMBERS_SHOWN = 20


@dataclass(frozen=True)
class CheckReport:
    """The lines to print, and whether a rule is broken."""

    lines: tuple[str, ...]
    has_errors: bool


def check_report(
    contrasts: CalibrationSet, rules: Rules, *, more: Sequence[str] = (), found: Sequence[Finding] = ()
) -> CheckReport:
    """The set's name and measures, a line for each finding, and a verdict; `more` measures and `found` come on top."""
    findings = (*check_set(contrasts, rules), *found)
    lines = (
        f"{_printable(contrasts.axis)}: {_printable(contrasts.positive_pole)} against "
        f"{_printable(contrasts.negative_pole)}",
        *(f"  {line}" for line in (*_measure_lines(measure(contrasts), len(contrasts)), *map(_printable, more))),
        *(_printable(_finding_line(finding)) for finding in findings),
        _verdict(findings),
    )
    return CheckReport(lines, any(finding.severity == "error" for finding in findings))


def list_lines() -> Iterator[str]:
    """A table of the sets that ship."""
    rows = [("set", "axes", "poles", "contrasts", "what it is about")]
    for shipped in shipped_sets():
        sets = load_persona_set(shipped.name).sets
        poles = [f"{item.positive_pole}/{item.negative_pole}" for item in sets]
        n_contrasts = str(sum(map(len, sets)))
        rows.append((shipped.name, listed(shipped.axes, 4), listed(poles, 4), n_contrasts, shipped.description))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def show_lines(spec: PersonaSpec, n_shown: int, seed: int, width: int) -> Iterator[str]:
    """The personas of a set, and `n_shown` contrasts of each axis, drawn by `seed`, in at most `width` columns."""
    yield from textwrap.wrap(_printable(f"personas: {', '.join(spec.personas)}"), width, subsequent_indent="  ")
    for item in spec.sets:
        calibration, held_out = item.split()
        counts = f"{_some(len(item), 'contrast')}, {len(calibration)} to calibrate on and {len(held_out)} held out"
        yield ""
        yield _printable(f"{item.axis}: {item.positive_pole} against {item.negative_pole}; {counts}")
        names = (item.positive_pole, item.negative_pole)
        for name, text in zip(names, (item.positive_description, item.negative_description), strict=True):
            yield from textwrap.wrap(_printable(f"{name}: {text}"), width, subsequent_indent="  ") if text else ()
        for contrast in item.limit(n_shown, seed).contrasts:
            yield ""
            yield from _contrast_lines(contrast, names, max(width, 40))


def new_set_lines(found: NewSet, request: NewSetRequest) -> Iterator[str]:
    """What was written, and the commands that come next."""
    yield from found.notes
    yield f"{_some(len(found.contrasts), 'contrast')} written to {_printable(str(request.output))}"
    file = shlex.quote(str(request.output))
    yield f"read them:   persona-edge personas show {file} --contrasts 10"
    yield f"then:        persona-edge export --model {shlex.quote(request.model or 'MODEL')} --personas {file}"


def _contrast_lines(contrast: Contrast, names: tuple[str, str], width: int) -> Iterator[str]:
    yield from textwrap.wrap(_printable(contrast.prompt), width)
    column = max(len(_printable(name)) for name in names) + 4
    for name, text in zip(names, (contrast.positive, contrast.negative), strict=True):
        start = f"  {_printable(name)}".ljust(column)
        # A long name gets a line of its own: beside it, the answer would have no room.
        if column > width // 2:
            yield start.rstrip()
            start = "    "
        indent = " " * len(start)
        yield from textwrap.wrap(_printable(text), width, initial_indent=start, subsequent_indent=indent)


def _measure_lines(found: Measures, n_contrasts: int) -> Iterator[str]:
    yield f"{n_contrasts} contrasts, {found.n_held_out} of them held out"
    yield f"words per answer: {found.positive_words:.1f} and {found.negative_words:.1f}"
    yield f"the first two words tell the pole: {found.opening_accuracy:.0%} (50% is a guess)"
    yield f"answers that negate: {found.positive_negations} and {found.negative_negations}"
    if found.telling_word is not None:
        word = _printable(found.telling_word)
        yield f"most telling word: {word!r}, {abs(found.telling_difference):.0%} of contrasts more often on one side"


def _finding_line(finding: Finding) -> str:
    at = finding.contrasts
    more = f" … ({len(at)} in all)" if len(at) > _NUMBERS_SHOWN else ""
    where = f" [{', '.join(map(str, at[:_NUMBERS_SHOWN]))}{more}]" if at else ""
    return f"{finding.severity}: {finding.rule}: {finding.message}{where}"


def _verdict(findings: Sequence[Finding]) -> str:
    n_errors = sum(finding.severity == "error" for finding in findings)
    if not findings:
        return "keeps all rules"
    return f"{_some(n_errors, 'error')}, {_some(len(findings) - n_errors, 'warning')}"


def _printable(text: str) -> str:
    return " ".join(printable(text).split())


def _some(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
