"""Lines for a chat: typed at a prompt, with history and completion where readline is there, or read from a pipe."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable
from typing import TextIO

from persona_edge.chat_output import TextOutput
from persona_edge.repl import Repl

__all__ = ["accept_any_bytes", "is_interactive", "talk", "work_through"]


def is_interactive() -> bool:
    """Whether a person types and reads: both ends are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def accept_any_bytes(stream: TextIO) -> None:
    """Bytes that are not in the stream's encoding become U+FFFD instead of an error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def work_through(repl: Repl, lines: Iterable[str]) -> None:
    """Feed `lines` until they end or one ends the chat. KeyboardInterrupt passes."""
    for line in lines:
        if not repl.feed(line):
            return


def talk(repl: Repl, output: TextOutput) -> None:
    """Prompt for lines until the user leaves. Ctrl-C stops an answer; at the prompt it leaves, like Ctrl-D."""
    has_readline = _use_readline(repl)
    while True:
        try:
            line = input(output.prompt(repl.speaker, readline=has_readline))
        except (EOFError, KeyboardInterrupt):
            output.show("")  # the shell's prompt goes on a line of its own
            return
        with contextlib.suppress(KeyboardInterrupt):  # the output has been told already
            if not repl.feed(line):
                return


def _use_readline(repl: Repl) -> bool:
    """History within this chat, and completion with Tab. False where Python has no readline, as on Windows."""
    try:
        import readline
    except ImportError:
        return False

    def complete(word: str, index: int) -> str | None:
        before = readline.get_line_buffer()[: readline.get_begidx()]
        found = repl.complete(before, word)
        space = " " if len(found) == 1 else ""
        return found[index] + space if index < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ,\t\n")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    return True
