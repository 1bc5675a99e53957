"""Text from models and packs, made safe and fit for a terminal: no control characters, whole words, marks it can show.

A model's answer and a pack's report are untrusted: an escape sequence in them could move the cursor, retitle the window
or rewrite what was shown before. Everything that is printed for people goes through `printable`.
"""

from __future__ import annotations

import os
import unicodedata
from typing import TextIO

__all__ = [
    "WordWrap",
    "bytes_text",
    "can_show",
    "display_width",
    "duration_text",
    "printable",
    "spell",
    "wants_colour",
]

_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # overrides and isolates reorder the text around them
_SEPARATORS = {0x2028, 0x2029}  # line breaks to some terminals, not to us
_PLAIN_MARKS = str.maketrans({"→": "->", "─": "-", "µ": "u", "·": ".", "…": "..."})
_SURROGATES = range(0xD800, 0xE000)  # half characters cannot be written in any encoding
_DROPPED = dict.fromkeys([*_CONTROLS, *_BIDI, *_SEPARATORS, *_SURROGATES])


def printable(text: str) -> str:
    """`text` without control characters (C0 but newline and tab, DEL, C1), bidirectional overrides and surrogates."""
    return text.translate(_DROPPED)


def can_show(stream: TextIO, text: str) -> bool:
    """Whether the encoding of `stream` has every character of `text`."""
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def spell(text: str, stream: TextIO) -> str:
    """Our own `text` with the marks → ─ µ · … in ASCII where the encoding of `stream` lacks one of them."""
    return text if can_show(stream, "→─µ·…") else text.translate(_PLAIN_MARKS)


def wants_colour(stream: TextIO) -> bool:
    """Whether to send colours: to a terminal that is not dumb, and that NO_COLOR (no-color.org) does not forbid."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def display_width(text: str) -> int:
    """How many columns of a terminal `text` takes: 2 for wide characters and emoji, 0 for combining marks."""
    return sum(map(_character_width, text))


def duration_text(seconds: float) -> str:
    """Three digits and the unit that fits: `412 µs`, `1.35 ms`, `2.10 s`."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{_three_digits(seconds * 1e3)} ms" if seconds < 0.9995 else f"{_three_digits(seconds)} s"


def bytes_text(n_bytes: float) -> str:
    """`n_bytes` in decimal units with three digits: `812 B`, `23.4 kB`, `1.25 MB`."""
    if n_bytes < 999.5:
        return f"{n_bytes:.0f} B"
    for limit, factor, unit in ((999.5e3, 1e3, "kB"), (999.5e6, 1e6, "MB")):
        if n_bytes < limit:
            return f"{_three_digits(n_bytes / factor)} {unit}"
    return f"{_three_digits(n_bytes / 1e9)} GB"


class WordWrap:
    """Breaks a text that arrives in pieces into lines of at most `width` columns, between words where possible.

    A word is held back until it is complete, so `finish` has to be called at the end. The text's own line breaks and
    spaces at the start of a line are kept. Each line begins with `indent`, which counts toward the width.
    """

    def __init__(self, width: int, indent: str = "") -> None:
        self._room = max(8, width - display_width(indent))
        self._indent = indent
        self._column = 0
        self._spaces = ""
        self._word = ""

    def push(self, piece: str) -> str:
        """What can be written now that `piece` has arrived."""
        return "".join(map(self._push_character, piece))

    def finish(self) -> str:
        """What was held back; the last line is left without a line break."""
        rest = self._flush()
        self._spaces = ""
        return rest

    def _push_character(self, character: str) -> str:
        if character == "\n":
            out = self._flush() + "\n"
            self._column, self._spaces = 0, ""
            return out
        if character in " \t":
            out = self._flush()
            self._spaces += " " if character == " " else "    "
            return out
        if _character_width(character) == 2:  # these scripts write no spaces: a line may break at each character
            out = self._flush()
            self._word = character
            return out + self._flush()
        self._word += character
        return ""

    def _flush(self) -> str:
        """The held word with the spaces before it, on this line or the next."""
        if not self._word:
            return ""
        word, spaces, self._word, self._spaces = self._word, self._spaces, "", ""
        out = ""
        if self._column and self._column + len(spaces) + display_width(word) > self._room:
            out, spaces, self._column = "\n", "", 0
        if not self._column:
            out += self._indent
            spaces = spaces[: self._room // 2]
        out += spaces
        self._column += len(spaces)
        for character in word:
            width = _character_width(character)
            if self._column + width > self._room:  # one word longer than a line
                out += "\n" + self._indent
                self._column = 0
            out += character
            self._column += width
        return out


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def _character_width(character: str) -> int:
    if character < "\u0300":
        return 1
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
