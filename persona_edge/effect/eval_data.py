"""The evaluation data that is not part of this project: reading its files, and drawing the same items every time."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from persona_edge.errors import CalibrationError

__all__ = ["Row", "digest", "draw", "read_rows"]

Row = Mapping[str, Any]
Item = TypeVar("Item")


def read_rows(path: Path, keys: Sequence[str]) -> list[Row]:
    """The objects of a JSONL file, or the rows of a CSV file, each of which must have `keys`.

    Raises CalibrationError that names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path}: cannot be read ({error}); see docs/evaluation-tasks.md for the data"
        ) from error
    rows = list(csv.DictReader(io.StringIO(text))) if path.suffix == ".csv" else _json_lines(text, path)
    for line, row in enumerate(rows, 1):
        missing = [key for key in keys if key not in row]
        if missing:
            raise CalibrationError(f"{path}: row {line} has no {missing[0]!r}; it has {', '.join(row)}")
    return list(rows)


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise CalibrationError(f"{path}: line {line} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{path}: line {line} is not a JSON object")
        rows.append(row)
    return rows


def draw(items: Sequence[Item], n: int, seed: int) -> tuple[Item, ...]:
    """At most `n` of `items`, drawn by `seed` and kept in order; a smaller draw is part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(items))
    return tuple(items[int(i)] for i in sorted(order[:n]))


def digest(items: object) -> str:
    """16 hexadecimal digits that tell apart JSON-compatible contents."""
    text = json.dumps(items, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
