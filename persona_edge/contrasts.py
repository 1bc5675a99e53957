"""Calibration data: what shows a model's two poles, and the files it is read from.

A *contrast* is a prompt with two answers: the one that the positive pole would give and the one that the negative pole
would give. `load_contrasts` reads three kinds of file and tells them apart by their content:

    JSONL       {"prompt": ..., "positive": ..., "negative": ...}, optionally after a first line that names the poles:
                {"axis": "EI", "positive": "E", "negative": "I"}, and may describe them for system prompts:
                "positive_description", "negative_description"
    CSV         with the header question,matching,not_matching
    statements  JSONL {"statement": ..., "label_matching": " Yes", "label_not_matching": " No"}

Whatever is wrong with a file is a CalibrationError that names the file, the line and what was expected there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from persona_edge.errors import CalibrationError, InputError

__all__ = [
    "MAX_ANSWER_CHARACTERS",
    "MAX_FILE_BYTES",
    "MAX_PROMPT_CHARACTERS",
    "CalibrationSet",
    "Contrast",
    "Example",
    "load_contrasts",
    "load_examples",
    "load_texts",
    "parse_contrasts",
    "parse_texts",
]

MAX_PROMPT_CHARACTERS: Final = 4_000
MAX_ANSWER_CHARACTERS: Final = 4_000
MAX_FILE_BYTES: Final = 64 * 2**20

CSV_HEADER: Final = ("question", "matching", "not_matching")
STATEMENT_PROMPT: Final = 'Is the following statement something you would say? "{statement}"'
# The second pair of names is the one that published yes/no persona statements use.
STATEMENT_LABELS: Final = (
    ("label_matching", "label_not_matching"),
    ("answer_matching_behavior", "answer_not_matching_behavior"),
)
EXPECTED_OBJECT: Final = 'one JSON object per line, such as {"prompt": "...", "positive": "...", "negative": "..."}'

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contrast:
    """One calibration item: a prompt, the positive pole's answer and the negative pole's answer."""

    prompt: str
    positive: str
    negative: str


@dataclass(frozen=True)
class Example:
    """One answer in a persona's manner, with no opposite. `persona-edge export` works with contrasts."""

    prompt: str
    response: str


@dataclass(frozen=True)
class CalibrationSet:
    """The contrasts of one axis, and the names of the axis and its poles.

    A description says in a few sentences, to the model, how a pole is ("You plan ahead …"); it may be empty.
    """

    name: str
    axis: str
    positive_pole: str
    negative_pole: str
    contrasts: tuple[Contrast, ...]
    positive_description: str = ""
    negative_description: str = ""

    def __len__(self) -> int:
        return len(self.contrasts)

    def split(self, held_out: float = 0.2) -> tuple[CalibrationSet, CalibrationSet]:
        """(calibration, held-out), where about the share `held_out` of the prompts is held out.

        Where a contrast goes depends on its prompt alone, so a set may grow without moving what it already has, and two
        contrasts of one prompt stay together. The share holds on average: a small set may miss it by some contrasts.
        Raises InputError unless 0 <= held_out < 1.
        """
        if not 0 <= held_out < 1:
            raise InputError(f"the held-out share is {held_out}; give a number from 0 up to, but not including, 1")
        outside = [_fraction(contrast.prompt) < held_out for contrast in self.contrasts]
        return (
            self._with(tuple(c for c, out in zip(self.contrasts, outside, strict=True) if not out)),
            self._with(tuple(c for c, out in zip(self.contrasts, outside, strict=True) if out)),
        )

    def halves(self) -> tuple[CalibrationSet, CalibrationSet]:
        """Two halves that share no prompt, always the same; both are the whole set when it has one prompt only."""
        prompts = sorted({contrast.prompt for contrast in self.contrasts}, key=_fraction)
        first = set(prompts[: len(prompts) // 2])
        if not first:
            return self, self
        return (
            self._with(tuple(c for c in self.contrasts if c.prompt in first)),
            self._with(tuple(c for c in self.contrasts if c.prompt not in first)),
        )

    def limit(self, n: int, seed: int = 0) -> CalibrationSet:
        """At most `n` contrasts, drawn by `seed` and kept in order; a smaller draw is part of a larger one.

        Raises InputError when `n` is below 1.
        """
        if n < 1:
            raise InputError(f"cannot limit {self.name} to {n} contrasts; give 1 or more")
        order = sorted(self.contrasts, key=lambda c: _digest(f"{seed}\n{c.prompt}\n{c.positive}"))
        chosen = set(order[:n])
        return self._with(tuple(c for c in self.contrasts if c in chosen))

    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of the axis, its poles and the contrasts in order; not of the set's name nor of the
        descriptions, which no mask depends on."""
        content = {
            "axis": self.axis,
            "poles": [self.positive_pole, self.negative_pole],
            "contrasts": [[c.prompt, c.positive, c.negative] for c in self.contrasts],
        }
        return _digest(json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))).hex()

    def _with(self, contrasts: tuple[Contrast, ...]) -> CalibrationSet:
        return replace(self, contrasts=contrasts)


def load_contrasts(path: str | Path) -> CalibrationSet:
    """The contrasts of a JSONL, CSV or statement file; the poles of `power.csv` are `power` and `anti-power`.

    A contrast that repeats an earlier one word for word is dropped, with a warning in the log that says on which line.
    Raises CalibrationError: the file cannot be read, is empty, or a line is not what the format asks for.
    """
    path = Path(path)
    return parse_contrasts(_read(path), name=path.stem, source=str(path))


def parse_contrasts(data: bytes, *, name: str, source: str) -> CalibrationSet:
    """As `load_contrasts`, from a file's bytes; `source` is what errors call the file."""
    text = _decode(data, source)
    first = text.lstrip()[:1]
    if first == "[":
        raise CalibrationError(f"{source}: line 1 opens a JSON array; expected {EXPECTED_OBJECT}")
    poles = _Poles(axis=name, positive=name, negative=f"anti-{name}")
    if first == "{":
        records = list(_json_records(text, source))
        if "axis" in records[0].fields and "prompt" not in records[0].fields:
            poles = _poles(records.pop(0))
        numbered = [(record.line, _contrast(record)) for record in records]
    else:
        numbered = [(record.line, _two_answers(record, CSV_HEADER)) for record in _csv_records(text, source)]
    if not numbered:
        raise CalibrationError(f"{source}: no contrasts; add at least one after the header")
    return CalibrationSet(
        name,
        poles.axis,
        poles.positive,
        poles.negative,
        _without_repeats(numbered, source),
        poles.positive_description,
        poles.negative_description,
    )


def load_examples(path: str | Path) -> tuple[Example, ...]:
    """The examples of a JSONL file of {"prompt", "response"}. Raises CalibrationError as `load_contrasts` does."""
    path = Path(path)
    source = str(path)
    return tuple(
        Example(
            record.text("prompt", MAX_PROMPT_CHARACTERS),
            record.text("response", MAX_ANSWER_CHARACTERS),
        )
        for record in _json_records(_decode(_read(path), source), source)
    )


def load_texts(path: str | Path, key: str) -> tuple[str, ...]:
    """The string under `key` of every line of a JSONL file. Raises CalibrationError as `load_contrasts` does."""
    path = Path(path)
    return parse_texts(_read(path), key, source=str(path))


def parse_texts(data: bytes, key: str, *, source: str) -> tuple[str, ...]:
    """As `load_texts`, from a file's bytes; `source` is what errors call the file."""
    records = _json_records(_decode(data, source), source)
    return tuple(record.text(key, MAX_PROMPT_CHARACTERS) for record in records)


@dataclass(frozen=True)
class _Record:
    """One object or row of a file, with where it stood."""

    source: str
    line: int
    fields: Mapping[str, object]

    def error(self, problem: str) -> CalibrationError:
        return CalibrationError(f"{self.source}: line {self.line}: {problem}")

    def text(self, key: str, longest: int) -> str:
        """The field `key` without surrounding white space, once it is known to be usable text."""
        if key not in self.fields:
            raise self.error(f"no {key!r}; the line has {_listed(self.fields)}")
        value = self.fields[key]
        if not isinstance(value, str):
            raise self.error(f"{key!r} is of type {type(value).__name__}; expected a string")
        value = value.strip()
        if not value:
            raise self.error(f"{key!r} is empty; write some text or remove the line")
        if len(value) > longest:
            raise self.error(f"{key!r} has {len(value)} characters; shorten it to at most {longest}")
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
            raise self.error(f"{key!r} holds a character that is not text (NUL or half a surrogate pair); remove it")
        return value


@dataclass(frozen=True)
class _Poles:
    axis: str
    positive: str
    negative: str
    positive_description: str = ""
    negative_description: str = ""


def _poles(record: _Record) -> _Poles:
    names = [record.text(key, 64) for key in ("axis", "positive", "negative")]
    poles = _Poles(*names, *(_description(record, side) for side in ("positive", "negative")))
    if poles.positive == poles.negative:
        raise record.error(f"both poles are called {poles.positive!r}; give them two names")
    return poles


def _description(record: _Record, side: str) -> str:
    key = f"{side}_description"
    return record.text(key, MAX_PROMPT_CHARACTERS) if key in record.fields else ""


def _contrast(record: _Record) -> Contrast:
    if "statement" in record.fields:
        return _statement_contrast(record)
    return _two_answers(record, ("prompt", "positive", "negative"))


def _two_answers(record: _Record, keys: tuple[str, str, str]) -> Contrast:
    prompt = record.text(keys[0], MAX_PROMPT_CHARACTERS)
    positive, negative = (record.text(key, MAX_ANSWER_CHARACTERS) for key in keys[1:])
    if positive == negative:
        raise record.error(f"{keys[1]!r} and {keys[2]!r} are the same text; a contrast needs two different answers")
    return Contrast(prompt, positive, negative)


def _statement_contrast(record: _Record) -> Contrast:
    statement = record.text("statement", MAX_PROMPT_CHARACTERS)
    labels = [pair for pair in STATEMENT_LABELS if pair[0] in record.fields]
    if not labels:
        raise record.error(f"a statement without {STATEMENT_LABELS[0][0]!r}; expected ' Yes' or ' No' under it")
    matching_key, other_key = labels[0]
    matching = record.text(matching_key, MAX_ANSWER_CHARACTERS)
    if matching not in {"Yes", "No"}:
        raise record.error(f"{matching_key!r} is {matching!r}; expected ' Yes' or ' No'")
    opposite = "No" if matching == "Yes" else "Yes"
    if other_key in record.fields and record.text(other_key, MAX_ANSWER_CHARACTERS) != opposite:
        raise record.error(f"{matching_key!r} is {matching!r}, so {other_key!r} should be ' {opposite}'")
    return Contrast(STATEMENT_PROMPT.format(statement=statement), matching, opposite)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise CalibrationError(f"{path}: larger than {MAX_FILE_BYTES // 2**20} MiB; split it into several files")
    return data


def _decode(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{source}: line {line}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if not text.strip():
        raise CalibrationError(f"{source}: empty; expected {EXPECTED_OBJECT}")
    return text


def _json_records(text: str, source: str) -> Iterator[_Record]:
    # Only the line feed ends a JSONL line: str.splitlines would also break at U+2028, which may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "numbers or nesting out of bounds"
            message = f"{source}: line {number}: malformed JSON ({reason}); expected {EXPECTED_OBJECT}"
            raise CalibrationError(message) from error
        if not isinstance(value, dict):
            raise CalibrationError(
                f"{source}: line {number}: a JSON {type(value).__name__}; expected {EXPECTED_OBJECT}"
            )
        yield _Record(source, number, value)


def _csv_records(text: str, source: str) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    header: Sequence[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = _csv_header(row, source)
            elif row:
                if len(row) != len(header):
                    problem = f"{len(row)} fields where the header has {len(header)}; quote fields that hold commas"
                    raise CalibrationError(f"{source}: line {line}: {problem}")
                yield _Record(source, line, dict(zip(header, row, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise CalibrationError(f"{source}: line {line}: malformed CSV ({error}); check its quotes") from error


def _csv_header(row: Sequence[str], source: str) -> tuple[str, ...]:
    header = tuple(cell.strip() for cell in row)
    missing = [name for name in CSV_HEADER if name not in header]
    if missing:
        raise CalibrationError(
            f"{source}: line 1: neither JSON nor a CSV header with {','.join(CSV_HEADER)} (no {', '.join(missing)})"
        )
    if len(set(header)) != len(header):
        raise CalibrationError(f"{source}: line 1: a column of the CSV header occurs twice; name each once")
    return header


def _without_repeats(numbered: Sequence[tuple[int, Contrast]], source: str) -> tuple[Contrast, ...]:
    first_seen: dict[Contrast, int] = {}
    for line, contrast in numbered:
        if contrast in first_seen:
            logger.warning("%s: line %d repeats line %d; it is left out", source, line, first_seen[contrast])
        else:
            first_seen[contrast] = line
    return tuple(first_seen)


def _listed(keys: Mapping[str, object]) -> str:
    shown = [repr(key) for key in itertools.islice(keys, 8)]
    return ", ".join(shown + ["…"] * (len(keys) > len(shown))) or "no keys"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(_digest(text)[:8], "big") / 2.0**64
