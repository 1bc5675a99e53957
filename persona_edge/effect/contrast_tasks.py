"""Which pole's answers a model finds likelier: an axis's own held-out contrasts, and other authors' data that fits it.

Per contrast, m = log p(positive answer) - log p(negative answer), summed over tokens (nats) or as the mean per token
(nats per token). The levels of both sides are reported too: a persona that only makes the opposite unlikely shows.
Where the two poles' answers belong to different prompts (`UnpairedAnswers`) no margin exists. There, each answer's gain
over the unmodified model is its score, and the measure is the share of (positive, negative) pairs in which the positive
one gained more: an area under the curve, one half for the unmodified model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.effect.answer_levels import Turn, answer_levels
from persona_edge.effect.eval_data import Row, digest, draw, read_rows
from persona_edge.effect.interfaces import SHARE, TOWARD_POLE, Arm, Engine, Items, TaskResult
from persona_edge.effect.item_values import auc_values, preference
from persona_edge.encoding import MAX_RESPONSE_TOKENS

__all__ = ["ContrastTask", "UnpairedAnswers", "external_pairs", "external_source", "sought_by", "unpaired_answers"]

PER_TOKEN: Final = "nats per token"
Settings = Mapping[str, str | int | float]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ContrastTask:
    """Margins and levels of `contrasts` (whose axis may be another author's), answers cut to `max_tokens`."""

    name: str
    contrasts: tuple[Contrast, ...]
    max_tokens: int = MAX_RESPONSE_TOKENS
    kind: Literal["persona"] = "persona"

    @property
    def settings(self) -> Settings:
        """Number of contrasts, the cut, and a digest of the texts."""
        texts = [[c.prompt, c.positive, c.negative] for c in self.contrasts]
        return {"n_items": len(texts), "max_tokens": self.max_tokens, "data": digest(texts)}

    def prepare(self, engine: Engine) -> None:
        """Nothing: margins need no comparison with the unmodified model."""

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """Six measures per contrast: which side is likelier and by how much, twice, and both levels."""
        turns = [(c.prompt, c.positive) for c in self.contrasts] + [(c.prompt, c.negative) for c in self.contrasts]
        levels = answer_levels(engine, arm, turns, max_tokens=self.max_tokens)
        n = len(self.contrasts)
        positive, negative = levels.mean[:n], levels.mean[n:]
        summed = levels.summed[:n] - levels.summed[n:]
        return TaskResult(
            self.name,
            (
                Items(TOWARD_POLE, preference(positive - negative), SHARE, "positive"),
                Items("positive likelier, summed", preference(summed), SHARE, "positive"),
                Items("margin", positive - negative, PER_TOKEN, "positive"),
                Items("margin, summed", summed, "nats", "positive"),
                Items("log p of positive answers", positive, PER_TOKEN, "neutral"),
                Items("log p of negative answers", negative, PER_TOKEN, "neutral"),
            ),
        )


@dataclass
class UnpairedAnswers:
    """Answers of each pole to prompts of its own, compared by what they gain over the unmodified model."""

    name: str
    positive: tuple[Turn, ...]
    negative: tuple[Turn, ...]
    max_tokens: int = MAX_RESPONSE_TOKENS
    kind: Literal["persona"] = "persona"
    _base: Floats | None = field(default=None, init=False, repr=False)

    @property
    def settings(self) -> Settings:
        """Number of answers, the cut, and a digest of the texts."""
        n_items = len(self.positive) + len(self.negative)
        return {"n_items": n_items, "max_tokens": self.max_tokens, "data": digest([self.positive, self.negative])}

    def prepare(self, engine: Engine) -> None:
        """Record the levels of the unmodified model."""
        self._base = answer_levels(engine, None, self._turns, max_tokens=self.max_tokens).mean

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """The area under the curve of gains, and the gains of both sides. `prepare` must have been called."""
        assert self._base is not None, "prepare comes first"
        gain = answer_levels(engine, arm, self._turns, max_tokens=self.max_tokens).mean - self._base
        positive, negative = gain[: len(self.positive)], gain[len(self.positive) :]
        return TaskResult(
            self.name,
            (
                Items("answers of positive gain more", auc_values(positive, negative), "AUC", "positive"),
                Items("gain of positive answers", positive, PER_TOKEN, "neutral"),
                Items("gain of negative answers", negative, PER_TOKEN, "neutral"),
            ),
        )

    @property
    def _turns(self) -> tuple[Turn, ...]:
        return self.positive + self.negative


@dataclass(frozen=True)
class ExternalSource:
    """A file of another author, and the pole of ours that its first answer shows."""

    file: str
    pole: str
    keys: tuple[str, str, str]


def external_source(axis: CalibrationSet) -> ExternalSource | None:
    """The file of pairs that fits `axis`, told by the names of its poles or by its own; None when there is none."""
    poles = (axis.positive_pole, axis.negative_pole)
    for first, second in (("E", "I"), ("T", "F"), ("J", "P")):
        if set(poles) == {first, second}:
            return ExternalSource(f"mbti/pairs_{first}{second}.jsonl", first, ("instruction", first, second))
    sought = sought_by(axis)
    if sought is None:
        return None
    topic, sign = sought
    keys = ("question", "matching", "not_matching")
    return ExternalSource(f"ai_persona/{topic}_dev.csv", poles[0] if sign > 0 else poles[1], keys)


def sought_by(axis: CalibrationSet) -> tuple[str, int] | None:
    """What an axis is about, `power` or `wealth`, told by its names; +1 when its positive pole seeks it, else -1.

    The negative pole seeks when its name says so and the positive pole's does not.
    """
    words = [set(re.findall("[a-z]+", name.casefold())) for name in (axis.axis, axis.positive_pole, axis.negative_pole)]
    for topic in ("power", "wealth"):
        if any(topic in found for found in words):
            mirrored = {"seek", "seeking", "seeker"} & words[2] and not {"seek", "seeking", "seeker"} & words[1]
            return topic, -1 if mirrored else 1
    return None


def external_pairs(folder: Path, axis: CalibrationSet, source: ExternalSource, n: int, seed: int) -> ContrastTask:
    """The task of `source`, turned so that its positive answers are those of the axis's positive pole."""
    rows = [row for row in read_rows(folder / source.file, source.keys) if _is_usable(row, source.keys)]
    contrasts = []
    for row in draw(rows, n, seed):
        prompt, first, second = (str(row[key]).strip() for key in source.keys)
        same_way = axis.positive_pole == source.pole
        contrasts.append(Contrast(prompt, first, second) if same_way else Contrast(prompt, second, first))
    return ContrastTask(f"{Path(source.file).stem.replace('_', ' ')} (other author)", tuple(contrasts))


def _is_usable(row: Row, keys: tuple[str, str, str]) -> bool:
    """Whether there is a prompt with two different answers, short enough for a template's context."""
    prompt, first, second = (str(row[key]).strip() for key in keys)
    return bool(prompt and first and second) and first != second and len(prompt) <= 1200


def unpaired_answers(folder: Path, axis: CalibrationSet, n: int, seed: int) -> UnpairedAnswers:
    """mbti/unpaired_SN.jsonl for an axis whose poles are S and N: `n` answers in all, half of them of each pole."""
    rows = read_rows(folder / "mbti/unpaired_SN.jsonl", ("pole", "instruction", "output"))

    def turns(pole: str) -> tuple[Turn, ...]:
        usable = [
            row for row in rows if row["pole"] == pole and row["output"].strip() and len(row["instruction"]) <= 1200
        ]
        return tuple((row["instruction"].strip(), row["output"].strip()) for row in draw(usable, max(n // 2, 1), seed))

    return UnpairedAnswers("unpaired SN (other author)", turns(axis.positive_pole), turns(axis.negative_pole))
