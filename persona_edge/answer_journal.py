"""What has been generated so far, line by line in a file, so that an interrupted run loses one answer at most.

The first line names what the journal is for (a fingerprint); each line after it is one attempt at a prompt, with the
pair of answers that came of it or the reason why none did. A last line that was cut off is dropped.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_edge.errors import InputError, OutputError
from persona_edge.files import write_atomically
from persona_edge.generated_answers import Pair

__all__ = ["Attempt", "AttemptKey", "Journal"]


@dataclass(frozen=True)
class AttemptKey:
    """A prompt, and how often it was tried before."""

    prompt: str
    number: int


@dataclass(frozen=True)
class Attempt:
    """What came of an attempt: a pair, or the reason to drop it."""

    key: AttemptKey
    pair: Pair | None = None
    dropped: str | None = None


class Journal:
    """The attempts of one piece of work. Make one with `open`."""

    def __init__(self, path: Path, attempts: Iterable[Attempt]) -> None:
        """`open` is the usual way."""
        self._path = path
        self._attempts = {attempt.key: attempt for attempt in attempts}

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> Journal:
        """The journal at `path`, which is begun when there is none.

        Raises InputError when it belongs to other work or is none of ours, OutputError when it cannot be written.
        """
        header = json.dumps({"journal": fingerprint})
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            lines = []
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it to begin anew") from error
        if lines and lines[0] != header:
            raise InputError(f"{path} belongs to an interrupted run with other settings; repeat those, or remove it")
        attempts = [attempt for line in lines[1:-1] if (attempt := _read(line)) is not None]
        # Written anew, so that a line which was cut off does not run into the next one.
        write_atomically(path, "".join(f"{line}\n" for line in (header, *map(_line, attempts))).encode())
        return cls(path, attempts)

    def get(self, key: AttemptKey) -> Attempt | None:
        """The attempt, when it was made before."""
        return self._attempts.get(key)

    def add(self, attempt: Attempt) -> None:
        """Note an attempt. Raises OutputError."""
        self._attempts[attempt.key] = attempt
        try:
            with self._path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(f"{_line(attempt)}\n")
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}; free some space") from error

    def remove(self) -> None:
        """Delete the file: the work is done."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def _line(attempt: Attempt) -> str:
    record: dict[str, object] = {"prompt": attempt.key.prompt, "number": attempt.key.number}
    if attempt.pair is not None:
        record |= {"positive": attempt.pair.positive, "negative": attempt.pair.negative}
    else:
        record["dropped"] = attempt.dropped
    return json.dumps(record)


def _read(line: str) -> Attempt | None:
    """The attempt that a line notes; None for what is not one."""
    try:
        record: dict[str, Any] = json.loads(line)
        key = AttemptKey(str(record["prompt"]), int(record["number"]))
        if "dropped" in record:
            return Attempt(key, dropped=str(record["dropped"]))
        return Attempt(key, pair=Pair(str(record["positive"]), str(record["negative"])))
    except (ValueError, KeyError, TypeError):
        return None
