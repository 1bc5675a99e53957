"""From the bytes of single tokens to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["TextStream"]


class TextStream:
    """Takes the bytes of one token after the other and gives the text that is certain so far.

    A character whose bytes are spread over tokens is held back until it is complete, and so is the end of the text
    while it could still become one of the `stop` strings. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """The text that became certain with `piece`; "" when there is none, and always once `stopped` is True."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What is still held back, when no more tokens follow."""
        certain = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return certain + rest

    def _release(self, new_text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new_text
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
