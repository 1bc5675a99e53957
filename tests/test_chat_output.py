"""How answers look: plain marks where the encoding is narrow, colour only where it is wanted."""

from __future__ import annotations

from io import StringIO

import pytest

from persona_edge.chat_output import TextOutput
from persona_edge.chat_values import Answer


def test_narrow_encodings_get_plain_marks() -> None:
    class Narrow(StringIO):
        encoding = "ascii"

    out = Narrow()
    TextOutput(out, out).show("a → b in 5 µs ── …")
    assert out.getvalue() == "a -> b in 5 us -- ...\n"


def test_colour_needs_a_terminal_and_no_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    def shown() -> str:
        out = Terminal()
        TextOutput(out, out, interactive=True).note("note \x1b[31m")
        return out.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown() == "\x1b[2mnote [31m\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "note [31m\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert shown() == "note [31m\n"


def test_an_empty_answer_is_said_to_be_one_where_answers_are_compared() -> None:
    out = StringIO()
    output = TextOutput(out, out)
    output.comparison_begins("Q")
    output.answer_begins("INFP", 1.0)
    output.answer_ends(Answer("INFP", 1.0, "Q", "", 0, None, None))
    assert "(no answer)" in out.getvalue()
