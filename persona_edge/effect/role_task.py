"""Role identification: whose answer to a shared question does an arm make likelier, among several characters'?

The data are answers of a few film characters to the same general questions (RoleBench). A pole is a role here, so this
task needs an axis of its own: `role_axis` makes one from a role's answers against another's, or against all others',
and persona-edge treats it as any other axis. On the questions that calibration does not see, the role whose answer
gains most over the unmodified model is the one identified; chance is one over the number of roles.

What it is not: a test of whether replies sound like the role. It says that the arm raises what this character says to a
question more than what others say to the same question, and both come from the same writer (a language model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.effect.answer_levels import Turn, answer_levels
from persona_edge.effect.eval_data import digest, draw, read_rows
from persona_edge.effect.interfaces import SHARE, Arm, Engine, Items, TaskResult
from persona_edge.errors import CalibrationError, InputError

__all__ = ["ROLE_FILE", "RoleItem", "RoleTask", "identified", "role_axis", "role_task", "roles_in"]

ROLE_FILE: Final = "roleplay/rolebench_eng_general_test_shared_questions.jsonl"
OTHERS: Final = "other roles"
MAX_ANSWER_TOKENS: Final = 96
Floats = NDArray[np.float64]
Answers = Mapping[str, Mapping[str, tuple[str, ...]]]  # question -> role -> its answers


@dataclass(frozen=True)
class RoleItem:
    """One answer of each role to one question; `roles` and `answers` correspond."""

    question: str
    roles: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass
class RoleTask:
    """Which role's answers gain most, over `items`; `positive` and `negative` are the axis's poles."""

    name: str
    items: tuple[RoleItem, ...]
    positive: str
    negative: str
    kind: Literal["persona"] = "persona"
    _base: Floats | None = field(default=None, init=False, repr=False)

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        """Number of items, the cut, and a digest of them and the poles."""
        texts = [[item.question, item.roles, item.answers] for item in self.items]
        data = digest([self.positive, self.negative, texts])
        return {"n_items": len(self.items), "max_tokens": MAX_ANSWER_TOKENS, "data": data}

    def prepare(self, engine: Engine) -> None:
        """Record the unmodified model's levels."""
        self._base = self._levels(engine, None)

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """How often the positive role's answer gains most, is likeliest outright, and the negative role's gains most.

        Items that lack a role are NaN in that role's measures.
        """
        assert self._base is not None, "prepare comes first"
        levels = self._levels(engine, arm)
        gains = levels - self._base
        measures = [
            Items("answer of positive gains most", self._identified(gains, self.positive), SHARE, "positive"),
            Items("answer of positive likeliest", self._identified(levels, self.positive), SHARE, "positive"),
        ]
        if any(self.negative in item.roles for item in self.items):
            other = self._identified(gains, self.negative)
            measures.append(Items(f"answer of {self.negative} gains most", other, SHARE, "neutral"))
        return TaskResult(self.name, tuple(measures))

    def _levels(self, engine: Engine, arm: Arm | None) -> Floats:
        turns: list[Turn] = [(item.question, answer) for item in self.items for answer in item.answers]
        return answer_levels(engine, arm, turns, max_tokens=MAX_ANSWER_TOKENS).mean

    def _identified(self, scores: Floats, role: str) -> Floats:
        ends = np.cumsum([len(item.answers) for item in self.items])[:-1]
        return np.array(
            [
                identified(part, item.roles.index(role)) if role in item.roles else np.nan
                for item, part in zip(self.items, np.split(scores, ends), strict=True)
            ]
        )


def identified(scores: Floats, index: int) -> float:
    """1 when `scores[index]` is the largest, 0 when it is not; the largest share the 1 when several are equal."""
    largest = np.flatnonzero(scores >= scores.max() - 1e-9)
    return 1 / len(largest) if index in largest else 0.0


def roles_in(folder: Path) -> tuple[str, ...]:
    """The roles of the data, in alphabetical order."""
    return tuple(sorted({role for by_role in _answers(folder).values() for role in by_role}))


def role_axis(folder: Path, role: str, other: str | None = None) -> CalibrationSet:
    """Contrasts of `role`'s answers against those of `other`, or of each other role in turn, to the same questions.

    The poles are the roles' names. As in every set, which fifth of the questions is held out follows from their text.
    Raises InputError for an unknown role, CalibrationError when the data cannot be read.
    """
    known = roles_in(folder)
    for name in (role, other):
        if name is not None and name not in known:
            raise InputError(f"no role {name!r}; the data has {', '.join(known)}")
    contrasts: dict[Contrast, None] = {}
    for question, by_role in _answers(folder).items():
        rivals = [name for name in sorted(by_role) if name != role and other in (None, name)]
        for i, answer in enumerate(by_role.get(role, ())):
            if not rivals:
                break
            theirs = by_role[rivals[i % len(rivals)]]
            if i < len(theirs) and theirs[i] != answer:
                contrasts[Contrast(question, answer, theirs[i])] = None
    name = f"role-{role.casefold().replace(' ', '-')}"
    return CalibrationSet(name, name, role, other or OTHERS, tuple(contrasts))


def role_task(folder: Path, axis: CalibrationSet, n: int, seed: int) -> RoleTask:
    """At most `n` items over the held-out questions of a role axis. Raises CalibrationError when there is none."""
    held_out = {contrast.prompt for contrast in axis.split()[1].contrasts}
    items = []
    for question, by_role in _answers(folder).items():
        if question in held_out and axis.positive_pole in by_role and len(by_role) > 1:
            for i in range(max(map(len, by_role.values()))):
                roles = tuple(role for role, answers in sorted(by_role.items()) if i < len(answers))
                items.append(RoleItem(question, roles, tuple(by_role[role][i] for role in roles)))
    items = [item for item in items if len(item.roles) > 1]
    if not items:
        raise CalibrationError(
            f"{axis.name}: no held-out question is answered by {axis.positive_pole} and another role"
        )
    return RoleTask(f"role identification: {axis.axis}", draw(items, n, seed), axis.positive_pole, axis.negative_pole)


def _answers(folder: Path) -> Answers:
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for row in read_rows(folder / ROLE_FILE, ("role", "question", "responses")):
        answers = _usable(row["responses"])
        if answers:
            found.setdefault(row["question"].strip(), {}).setdefault(row["role"], answers)
    return found


def _usable(responses: Sequence[str]) -> tuple[str, ...]:
    """The answers without repeats and empty ones."""
    return tuple(dict.fromkeys(text.strip() for text in responses if text.strip()))
