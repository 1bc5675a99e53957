"""Calibration sets in plain lines for a terminal: what a check found, what a set holds. No control characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from persona_edge.contrasts import CalibrationSet
from persona_edge.set_checker import Finding, Measures, Rules, check_set, measure
from persona_edge.terminal_text import printable

__all__ = ["CheckReport", "check_report"]

_NUMBERS_SHOWN = 20


@dataclass(frozen=True)
class CheckReport:
    """The lines to print, and whether a rule is broken."""

    lines: tuple[str, ...]
    has_errors: bool


def check_report(contrasts: CalibrationSet, rules: Rules) -> CheckReport:
    """The set's name and measures, a line for each finding, and a verdict."""
    findings = check_set(contrasts, rules)
    lines = (
        f"{_printable(contrasts.axis)}: {_printable(contrasts.positive_pole)} against "
        f"{_printable(contrasts.negative_pole)}",
        *(f"  {line}" for line in _measure_lines(measure(contrasts), len(contrasts))),
        *(_printable(_finding_line(finding)) for finding in findings),
        _verdict(findings),
    )
    return CheckReport(lines, any(finding.severity == "error" for finding in findings))


def _measure_lines(found: Measures, n_contrasts: int) -> Iterator[str]:
    yield f"{n_contrasts} contrasts, {found.n_held_out} of them held out"
    yield f"words per answer: {found.positive_words:.1f} and {found.negative_words:.1f}"
    yield f"the first two words tell the pole: {found.opening_accuracy:.0%} (50 % is a guess)"
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
    return f"{n_errors} errors, {len(findings) - n_errors} warnings"


def _printable(text: str) -> str:
    return " ".join(printable(text).split())
