"""Writing a calibration set as the JSONL that `load_contrasts` reads, with its poles named on the first line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from persona_edge.contrasts import CalibrationSet
from persona_edge.errors import InputError
from persona_edge.files import write_atomically
from persona_edge.terminal_text import printable

__all__ = ["MAX_NAME_CHARACTERS", "check_output", "checked_name", "renamed", "write_set"]

MAX_NAME_CHARACTERS = 64


def checked_name(name: str, what: str) -> str:
    """`name` on one line without control characters. InputError when nothing is left or it is too long."""
    found = " ".join(printable(name).split())
    if not found:
        raise InputError(f"{what} is empty; give it a name")
    if len(found) > MAX_NAME_CHARACTERS:
        raise InputError(f"{what} has {len(found)} characters; shorten it to at most {MAX_NAME_CHARACTERS}")
    return found


def renamed(
    contrasts: CalibrationSet, *, axis: str | None = None, positive: str | None = None, negative: str | None = None
) -> CalibrationSet:
    """The same contrasts under other names; None keeps a name. InputError when both poles would have one name."""
    found = replace(
        contrasts,
        axis=checked_name(contrasts.axis if axis is None else axis, "the axis"),
        positive_pole=checked_name(contrasts.positive_pole if positive is None else positive, "the positive pole"),
        negative_pole=checked_name(contrasts.negative_pole if negative is None else negative, "the negative pole"),
    )
    if found.positive_pole.casefold() == found.negative_pole.casefold():
        raise InputError(f"both poles are called {found.positive_pole!r}; give them two names")
    return found


def check_output(path: Path, *, overwrite: bool) -> None:
    """InputError unless a set may be written to `path`: its name, its folder, and what is there already."""
    if path.suffix.casefold() != ".jsonl":
        raise InputError(f"{path} does not end in .jsonl, by which a calibration set is known; call it so")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} to; create it first")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or pass --overwrite to replace it")


def write_set(path: Path, contrasts: CalibrationSet) -> None:
    """Make the set the content of `path`, whole or not at all. Raises OutputError."""
    header = {"axis": contrasts.axis, "positive": contrasts.positive_pole, "negative": contrasts.negative_pole}
    if contrasts.positive_description:
        header["positive_description"] = contrasts.positive_description
    if contrasts.negative_description:
        header["negative_description"] = contrasts.negative_description
    rows = ({"prompt": c.prompt, "positive": c.positive, "negative": c.negative} for c in contrasts.contrasts)
    write_atomically(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in (header, *rows)))
