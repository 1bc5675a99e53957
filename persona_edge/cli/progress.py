"""A line of progress on stderr, rewritten in place; nothing at all when stderr is not a terminal."""

from __future__ import annotations

import shutil
import sys
import time

__all__ = ["ProgressLine", "StageProgress", "bytes_text"]

_REDRAW_SECONDS = 0.1


def bytes_text(n_bytes: int) -> str:
    """`n_bytes` in decimal units, as file managers and download pages count: `98 MB`, `4.9 GB`."""
    if n_bytes < 999_500:
        return f"{n_bytes / 1e3:.0f} kB"
    if n_bytes < 999_500_000:
        return f"{n_bytes / 1e6:.0f} MB"
    return f"{n_bytes / 1e9:.1f} GB"


class ProgressLine:
    """A `persona_edge.downloads.Progress` for people. Use as a context manager: the line is wiped at the end."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._step = ""
        self._drawn = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Shows how far `step` is, at most ten times a second."""
        now = time.monotonic()
        if step == self._step and now - self._drawn < _REDRAW_SECONDS:
            return
        self._step, self._drawn = step, now
        self._write(_line(step, done, total))

    def _write(self, text: str) -> None:
        if self._shown:
            # One column stays free: a full line would wrap and could no longer be rewritten.
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()


def _line(step: str, done: int, total: int | None) -> str:
    if total:
        return f"{step}: {bytes_text(done)} of {bytes_text(total)}, {100 * done // total} %"
    return f"{step}: {bytes_text(done)}" if done else f"{step} …"


class StageProgress:
    """Progress of long work in named stages: a line rewritten in place on a terminal, one line per stage elsewhere."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = 0.0

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_stage()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` steps of `stage` are finished, and about how long the rest takes."""
        if stage != self._stage:
            self._end_stage()
            self._stage, self._started = stage, time.monotonic()
        if sys.stderr.isatty():
            elapsed = time.monotonic() - self._started
            left = f", about {elapsed / done * (total - done):.0f} s left" if 0 < done < total else ""
            sys.stderr.write(f"\r\x1b[K{stage}: {done} of {total}{left}")
            sys.stderr.flush()

    def _end_stage(self) -> None:
        if self._stage:
            erase = "\r\x1b[K" if sys.stderr.isatty() else ""
            sys.stderr.write(f"{erase}{self._stage}: {time.monotonic() - self._started:.1f} s\n")
            sys.stderr.flush()
            self._stage = ""
