"""How a chat looks: as text for a terminal or a pipe, or as one JSON record per answer.

In a pipe, standard output has the answers and what commands were asked to show; everything else goes to standard error.
On a terminal both lie together, words are wrapped and what the program itself says is dimmed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import TextIO

from persona_edge.chat_values import Answer, Speaker, Switch, speaker_name
from persona_edge.repl_commands import tokens_per_second
from persona_edge.terminal_text import (
    WordWrap,
    bytes_text,
    display_width,
    duration_text,
    printable,
    spell,
    wants_colour,
)

__all__ = ["JsonOutput", "TextOutput", "answer_record"]

_BOLD, _DIM, _RED, _CYAN = "1", "2", "31", "1;36"
_WIDEST = 88  # longer lines are hard to read


class TextOutput:
    """Answers as text on `out`. `interactive`: both streams are one terminal, where lines are wrapped."""

    def __init__(self, out: TextIO, err: TextIO, *, interactive: bool = False) -> None:
        self._out, self._err, self._interactive = out, err, interactive
        self._colour = wants_colour(out)
        self._width = max(20, min(shutil.get_terminal_size().columns, _WIDEST))
        self._comparing = False
        self._wrap: WordWrap | None = None

    def note(self, text: str) -> None:
        """Dimmed on a terminal; on standard error in a pipe."""
        self._line(self._out if self._interactive else self._err, text, _DIM)

    def show(self, text: str) -> None:
        """As it is."""
        self._line(self._out, text)

    def problem(self, text: str) -> None:
        """On standard error."""
        self._line(self._out if self._interactive else self._err, " ".join(text.split()), _RED)

    def prompt(self, speaker: str, *, readline: bool) -> str:
        """What stands before a line that is typed; `readline` has to be told which characters take no room."""
        text = self._marked(printable(speaker))
        styled = self._styled(text, _CYAN)
        if styled != text and readline:
            start, _, end = styled.partition(text)
            styled = f"\x01{start}\x02{text}\x01{end}\x02"
        return f"{styled}> "

    def comparison_begins(self, question: str) -> None:
        """The question, and a heading for each answer from now on."""
        self._comparing = True
        wrap = WordWrap(self._width)
        text = wrap.push(printable(question)) + wrap.finish()
        self._write(self._out, f"{self._styled(text, _BOLD)}\n\n")

    def comparison_ends(self, switches: Sequence[Switch]) -> None:
        """What the switches took, one below the other."""
        self._comparing = False
        rows = [_switch_row(switch) for switch in switches]
        if rows:
            self._line(self._out, self._rule("switches, in place"), _BOLD)
        widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
        for first, *rest in rows:
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            padding = " " * (widths[0] - display_width(first))
            self._line(self._out, "   ".join([f"  {first}{padding}", *cells]).rstrip())

    def answer_begins(self, speaker: Speaker, strength: float) -> None:
        """A heading when answers are compared; nothing before the only answer."""
        if self._comparing:
            at = f" at strength {strength:g}" if speaker is not None and strength != 1 else ""
            self._line(self._out, self._rule(f"{speaker_name(speaker)}{at}"), _CYAN)
            self._wrap = WordWrap(self._width, "  ")
        elif self._interactive:
            self._wrap = WordWrap(self._width)

    def answer_piece(self, text: str) -> None:
        """The piece at once, or up to its last whole word."""
        text = printable(text)
        self._write(self._out, text if self._wrap is None else self._wrap.push(text))

    def answer_ends(self, answer: Answer) -> None:
        """The rest of the answer and a line break; why it ended early, where a person is told."""
        rest = "" if self._wrap is None else self._wrap.finish()
        if self._comparing and not answer.text:
            rest = "  (no answer)"
        cut = answer.completion is not None and answer.completion.finish_reason != "stop"
        self._write(self._out, rest + (self._marked(" …") if cut and self._wrap else "") + "\n")
        if self._comparing:
            self._write(self._out, "\n")
        elif self._interactive and (why := _why_it_ended(answer)):
            self.note(why)
        self._wrap = None

    def _rule(self, title: str) -> str:
        return f"── {title} ".ljust(self._width, "─")

    def _line(self, stream: TextIO, text: str, style: str = "") -> None:
        self._write(stream, self._styled(self._marked(printable(text)), style) + "\n")

    def _marked(self, text: str) -> str:
        return spell(text, self._out)

    def _styled(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._colour and style else text

    def _write(self, stream: TextIO, text: str) -> None:
        if text:
            stream.write(text)
            stream.flush()


class JsonOutput:
    """One JSON object per answer and line on `out`; everything that is no answer goes to `err` as text."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._text = TextOutput(err, err)

    def note(self, text: str) -> None:
        """On standard error."""
        self._text.note(text)

    def show(self, text: str) -> None:
        """On standard error."""
        self._text.show(text)

    def problem(self, text: str) -> None:
        """On standard error."""
        self._text.problem(text)

    def comparison_begins(self, question: str) -> None:
        """Nothing: each record has the question."""

    def comparison_ends(self, switches: Sequence[Switch]) -> None:
        """Nothing: each record has the switch before it."""

    def answer_begins(self, speaker: Speaker, strength: float) -> None:
        """Nothing yet."""

    def answer_piece(self, text: str) -> None:
        """Nothing yet."""

    def answer_ends(self, answer: Answer) -> None:
        """The record. Its text is the model's own: JSON escapes control characters, a reader has to mind them."""
        self._out.write(json.dumps(answer_record(answer)).replace("\x7f", "\\u007f") + "\n")
        self._out.flush()


def answer_record(answer: Answer) -> dict[str, object]:
    """The answer as JSON types: times in seconds, `persona` null for the unmodified model."""
    completion, switch = answer.completion, answer.switch
    return {
        "persona": answer.persona,
        "strength": answer.strength,
        "question": answer.question,
        "text": answer.text,
        "finish_reason": "interrupted" if completion is None else completion.finish_reason,
        "n_prompt_tokens": completion.n_prompt_tokens if completion else None,
        "n_tokens": completion.n_tokens if completion else None,
        "seconds": completion.seconds if completion else None,
        "seconds_to_first_token": completion.seconds_to_first_token if completion else None,
        "tokens_per_second": tokens_per_second(completion) if completion else None,
        "seed": answer.seed,
        "switch": None if switch is None else {"from": switch.before, **asdict(switch.report)},
    }


def _switch_row(switch: Switch) -> tuple[str, ...]:
    """Cells: what switched, how long the weights took, how much was written, and the wait in all."""
    report, wait = switch.report, switch.report.seconds_to_first_token
    return (
        f"{speaker_name(switch.before)} → {speaker_name(report.persona)}",
        duration_text(report.seconds),
        f"{report.n_units_written:,} units",
        bytes_text(report.n_bytes_written),
        "" if wait is None else f"first token after {duration_text(wait)}",
    )


def _why_it_ended(answer: Answer) -> str | None:
    completion = answer.completion
    if completion is None:
        return "stopped"
    if completion.finish_reason == "length":
        return f"cut after {completion.n_tokens} tokens; --max-tokens allows more"
    if completion.finish_reason == "context":
        return "cut: the context is full; /reset forgets the conversation, --context makes more room"
    return None if answer.text else "the model had nothing to say"
