"""What an evaluation has measured so far, so that an interrupted one goes on: JSON lines, each whole before the next.

An entry is kept under a key of everything that it depends on. A line that was cut off by a crash is passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_edge.errors import OutputError

__all__ = ["Journal", "key_of"]


def key_of(what: Mapping[str, object]) -> str:
    """32 hexadecimal digits that stand for a JSON-compatible content."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """Entries by key, in the file at `path`; in memory only for None. Raises OutputError when it cannot be written."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in _read(path).splitlines():
                self._take(line)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Any:
        """The value kept under `key`; None when there is none."""
        return self._entries.get(key)

    def put(self, key: str, value: object) -> None:
        """Keep a JSON-compatible `value`, at once."""
        self._entries[key] = value
        if self._path is None:
            return
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
        try:
            # The line break comes first: what a crash left half-written must not swallow this line.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete the file: everything in it is part of a finished record."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            self._entries[str(entry["key"])] = entry["value"]
        except (ValueError, KeyError, TypeError):
            return


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}; remove it to begin anew") from error
