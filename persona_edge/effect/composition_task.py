"""Compositions: does a persona made of several poles hold all of them at once, and does it sound like its type?

`CompositionTask` measures the held-out contrasts of every axis of a set under one arm. `TypeAnswersTask` uses answers
of all sixteen types to questions about themselves, by another author: an answer's gain over the unmodified model, less
the mean gain of its question, is its score. It works for single poles as well: types that have the pole against types
that have its opposite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.effect.answer_levels import Turn, answer_levels
from persona_edge.effect.eval_data import digest, draw, read_rows
from persona_edge.effect.interfaces import SHARE, Arm, Engine, Items, TaskResult
from persona_edge.effect.item_values import auc_values, preference
from persona_edge.effect.role_task import identified
from persona_edge.encoding import MAX_RESPONSE_TOKENS
from persona_edge.persona_sets import PersonaSpec

__all__ = ["TYPE_FILE", "AxisContrasts", "CompositionTask", "TypeAnswersTask", "composition_task", "type_answers_task"]

TYPE_FILE: Final = "mbti/self_awareness_16types.jsonl"
MAX_ANSWER_TOKENS: Final = 96
Settings = Mapping[str, str | int | float]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AxisContrasts:
    """Held-out contrasts of one axis, and its poles."""

    axis: str
    poles: tuple[str, str]
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class CompositionTask:
    """Held-out contrasts of all `axes` under one arm; `personas` says which poles a composition has."""

    name: str
    axes: tuple[AxisContrasts, ...]
    personas: Mapping[str, tuple[str, ...]]
    kind: Literal["persona"] = "persona"

    @property
    def settings(self) -> Settings:
        """Number of contrasts and a digest of the texts."""
        texts = [[axis.axis, [[c.prompt, c.positive, c.negative] for c in axis.contrasts]] for axis in self.axes]
        n_items = sum(len(axis.contrasts) for axis in self.axes)
        return {"n_items": n_items, "max_tokens": MAX_RESPONSE_TOKENS, "data": digest(texts)}

    def prepare(self, engine: Engine) -> None:
        """Nothing."""

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """Per axis the share of contrasts whose positive answer is likelier by mean log p.

        For an arm that is a composition or a pole also `own poles likelier`, over all axes where it has a pole, and the
        same for each of these axes: what a composition has to hold at once.
        """
        shares = {axis.axis: preference(_margins(engine, arm, axis.contrasts)) for axis in self.axes}
        measures = [
            Items(f"{axis.axis}: {axis.poles[0]} likelier", shares[axis.axis], SHARE, "neutral") for axis in self.axes
        ]
        own = {axis: share if side > 0 else 1 - share for axis, side, share in self._sides(arm, shares)}
        if own:
            measures.append(Items("own poles likelier", np.concatenate(list(own.values())), SHARE, "better"))
            measures += [Items(f"{axis}: own pole likelier", share, SHARE, "better") for axis, share in own.items()]
        return TaskResult(self.name, tuple(measures))

    def _sides(self, arm: Arm, shares: Mapping[str, Floats]) -> list[tuple[str, int, Floats]]:
        poles = self.personas.get(arm.pole, (arm.pole,)) if arm.pole is not None else ()
        return [
            (axis.axis, 1 if axis.poles[0] in poles else -1, shares[axis.axis])
            for axis in self.axes
            if axis.poles[0] in poles or axis.poles[1] in poles
        ]


def _margins(engine: Engine, arm: Arm, contrasts: tuple[Contrast, ...]) -> Floats:
    turns = [(c.prompt, c.positive) for c in contrasts] + [(c.prompt, c.negative) for c in contrasts]
    levels = answer_levels(engine, arm, turns).mean
    return np.asarray(levels[: len(contrasts)] - levels[len(contrasts) :])


@dataclass
class TypeAnswersTask:
    """Answers of types to questions about themselves. `questions` maps a question to its answer by each type.

    `poles` are the letters of the axis in question, such as E and I.
    """

    name: str
    questions: Mapping[str, Mapping[str, str]]
    poles: tuple[str, str]
    kind: Literal["persona"] = "persona"
    _base: Floats | None = field(default=None, init=False, repr=False)

    @property
    def settings(self) -> Settings:
        """Number of questions, the cut, and a digest of the texts and poles."""
        data = digest([list(self.poles), {q: dict(by_type) for q, by_type in self.questions.items()}])
        return {"n_items": len(self.questions), "max_tokens": MAX_ANSWER_TOKENS, "data": data}

    def prepare(self, engine: Engine) -> None:
        """Record the unmodified model's levels."""
        self._base = self._levels(engine, None)

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """Of the axis; and of the arm's own type, when it is one of the sixteen."""
        assert self._base is not None, "prepare comes first"
        gains = self._centred(self._levels(engine, arm) - self._base)
        types = np.array([name for by_type in self.questions.values() for name in by_type])
        positive, negative = (np.array([pole in name for name in types]) for pole in self.poles)
        values = auc_values(gains[positive], gains[negative])
        measures = [Items("types with positive gain more", values, "AUC", "positive")]
        if arm.pole in types:
            measures += self._own_type(gains, str(arm.pole))
        return TaskResult(self.name, tuple(measures))

    def _levels(self, engine: Engine, arm: Arm | None) -> Floats:
        turns: list[Turn] = [(q, answer) for q, by_type in self.questions.items() for answer in by_type.values()]
        return answer_levels(engine, arm, turns, max_tokens=MAX_ANSWER_TOKENS).mean

    def _split(self, values: Floats) -> list[Floats]:
        ends = np.cumsum([len(by_type) for by_type in self.questions.values()])[:-1]
        return list(np.split(values, ends))

    def _centred(self, gains: Floats) -> Floats:
        return np.concatenate([part - part.mean() for part in self._split(gains)])

    def _own_type(self, gains: Floats, own: str) -> list[Items]:
        """Per question: the share of other types that gain less, and whether none gains more. NaN: no answer of it."""
        beaten, first = [], []
        for by_type, part in zip(self.questions.values(), self._split(gains), strict=True):
            if own not in by_type:
                continue
            index = list(by_type).index(own)
            beaten.append(preference(part[index] - np.delete(part, index)).mean())
            first.append(identified(part, index))
        return [
            Items("own type gains more than another", np.array(beaten), SHARE, "better"),
            Items("own type gains most of all", np.array(first), SHARE, "better"),
        ]


def composition_task(spec: PersonaSpec, n: int, seed: int) -> CompositionTask:
    """`n` held-out contrasts of each axis of `spec`."""
    axes = tuple(
        AxisContrasts(item.axis, (item.positive_pole, item.negative_pole), _held_out(item, n, seed))
        for item in spec.sets
    )
    return CompositionTask("compositions", axes, spec.personas)


def _held_out(axis: CalibrationSet, n: int, seed: int) -> tuple[Contrast, ...]:
    return axis.split()[1].limit(n, seed).contrasts


def type_answers_task(folder: Path, poles: tuple[str, str], n: int, seed: int) -> TypeAnswersTask:
    """`n` questions of TYPE_FILE that at least twelve of the types answer; answers that name a type are left out."""
    questions: dict[str, dict[str, str]] = {}
    for row in read_rows(folder / TYPE_FILE, ("type", "instruction", "output", "names_a_type")):
        if not row["names_a_type"] and row["output"].strip():
            questions.setdefault(row["instruction"].strip(), {}).setdefault(row["type"], row["output"].strip())
    asked = [(question, by_type) for question, by_type in questions.items() if len(by_type) >= 12]
    name = f"self-descriptions: {''.join(poles)} (other author)"
    return TypeAnswersTask(name, dict(draw(asked, n, seed)), poles)
