"""Names to tasks: which measurements there are, and which of them fit an axis and the data at hand.

A name may stand for no task, one or several (`statements` is one per file that fits the axis). Where it stands for
none, `skipped_tasks` says why, and the report shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from persona_edge.contrasts import CalibrationSet
from persona_edge.effect import (
    choice_tasks,
    composition_task,
    contrast_tasks,
    drift_tasks,
    reply_tasks,
    role_task,
    statement_tasks,
)
from persona_edge.effect.eval_data import draw
from persona_edge.effect.interfaces import Task
from persona_edge.errors import InputError
from persona_edge.persona_sets import PersonaSpec, load_persona_set, shipped_sets

__all__ = ["QUICK_TASKS", "TASK_NAMES", "Skipped", "TaskContext", "make_tasks", "skipped_tasks"]

NO_DATA: Final = "no evaluation data: set PERSONA_EDGE_DATA to its folder"
SN: Final = {"S", "N"}


@dataclass(frozen=True)
class TaskContext:
    """What tasks are made for.

    `axis_set` is the whole set of one axis; tasks take its held-out fifth. `spec` is the set of several axes it belongs
    to, for compositions. `data` is the folder of the evaluation data, None without. `n_items` is how many items a task
    draws, by `seed`, where it has that many; tasks whose items are dearer take fewer (docs/evaluation-tasks.md).
    """

    axis_set: CalibrationSet
    spec: PersonaSpec | None = None
    data: Path | None = None
    n_items: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Skipped:
    """A name that stands for no task here, and why."""

    name: str
    reason: str


def make_tasks(names: Sequence[str], context: TaskContext) -> list[Task]:
    """The tasks of `names` that fit `context`, in order. InputError for a name that is none of TASK_NAMES.

    Raises CalibrationError when a data file is there but malformed.
    """
    return [made for made in _resolved(names, context) if not isinstance(made, Skipped)]


def skipped_tasks(names: Sequence[str], context: TaskContext) -> list[Skipped]:
    """What `make_tasks` leaves out, with the reasons; raises as it does."""
    return [made for made in _resolved(names, context) if isinstance(made, Skipped)]


Made = Task | Skipped


def _resolved(names: Sequence[str], context: TaskContext) -> list[Made]:
    unknown = [name for name in names if name not in _MAKERS]
    if unknown:
        raise InputError(f"no task {unknown[0]!r}; the tasks are {', '.join(TASK_NAMES)}")
    return [made for name in dict.fromkeys(names) for made in _MAKERS[name](name, context)]


def _contrasts(name: str, context: TaskContext) -> list[Made]:
    held_out = context.axis_set.split()[1]
    if not len(held_out):
        return [Skipped(name, f"no contrast of {context.axis_set.name} is held out; add contrasts")]
    chosen = held_out.limit(context.n_items, context.seed)
    return [contrast_tasks.ContrastTask(f"held-out contrasts: {context.axis_set.axis}", chosen.contrasts)]


def _external(name: str, context: TaskContext) -> list[Made]:
    axis = context.axis_set
    if {axis.positive_pole, axis.negative_pole} == SN:
        absent = _absent(name, context, "mbti/unpaired_SN.jsonl")
        if absent is not None:
            return [absent]
        return [contrast_tasks.unpaired_answers(_folder(context), axis, context.n_items, context.seed)]
    source = contrast_tasks.external_source(axis)
    if source is None:
        return [Skipped(name, f"no other author's pairs are known for the axis {axis.axis}")]
    absent = _absent(name, context, source.file)
    if absent is not None:
        return [absent]
    return [contrast_tasks.external_pairs(_folder(context), axis, source, context.n_items, context.seed)]


def _statements(name: str, context: TaskContext) -> list[Made]:
    topics = statement_tasks.statement_topics(context.axis_set)
    if not topics:
        return [Skipped(name, f"no yes/no statements are known for the axis {context.axis_set.axis}")]
    made: list[Made] = []
    for topic, sign in topics:
        absent = _absent(name, context, f"anthropic_persona/{topic}.jsonl")
        if absent is not None:
            made.append(absent)
            continue
        task = statement_tasks.statement_task(_folder(context), topic, sign, context.n_items, context.seed)
        made += [task, statement_tasks.spoken_items(task)]
    return made


def _questionnaire(name: str, context: TaskContext) -> list[Made]:
    trait = statement_tasks.trait_of(context.axis_set)
    if trait is None:
        return [Skipped(name, f"no trait of the Big Five stands for the axis {context.axis_set.axis}")]
    absent = _absent(name, context, "mbti/ipip_neo_120_items.jsonl")
    if absent is not None:
        return [absent]
    task = statement_tasks.likert_task(_folder(context), *trait)
    return [task, statement_tasks.spoken_items(task)]


def _self_descriptions(name: str, context: TaskContext) -> list[Made]:
    axis = context.axis_set
    poles = (axis.positive_pole, axis.negative_pole)
    if "".join(sorted(poles)) not in {"EI", "NS", "FT", "JP"}:
        return [Skipped(name, f"the sixteen types say nothing about the axis {axis.axis}")]
    absent = _absent(name, context, composition_task.TYPE_FILE)
    n = max(context.n_items // 8, 1)
    return [absent or composition_task.type_answers_task(_folder(context), poles, n, context.seed)]


def _compositions(name: str, context: TaskContext) -> list[Made]:
    spec = context.spec
    if spec is None or len(spec.sets) < 2:
        return [Skipped(name, "the persona set has one axis; there is nothing to compose")]
    return [composition_task.composition_task(spec, max(context.n_items // 2, 1), context.seed)]


def _roles(name: str, context: TaskContext) -> list[Made]:
    absent = _absent(name, context, role_task.ROLE_FILE)
    if absent is not None:
        return [absent]
    axis = context.axis_set
    if axis.positive_pole not in role_task.roles_in(_folder(context)):
        return [
            Skipped(name, f"{axis.positive_pole} is no role of the data; role_task.role_axis makes an axis of roles")
        ]
    return [role_task.role_task(_folder(context), axis, context.n_items, context.seed)]


def _wikitext(name: str, context: TaskContext) -> list[Made]:
    absent = _absent(name, context, "capability/wikitext2_raw_test.txt")
    return [absent or drift_tasks.wikitext_task(_folder(context), max(context.n_items // 4, 8))]


def _web_kl(name: str, context: TaskContext) -> list[Made]:
    absent = _absent(name, context, "capability/c4_demo_300.jsonl")
    return [absent or drift_tasks.web_kl_task(_folder(context), max(context.n_items // 2, 1), context.seed)]


def _chat_kl(name: str, context: TaskContext) -> list[Made]:
    absent = _absent(name, context, "prompts/mt_bench_questions.jsonl")
    return [absent or drift_tasks.chat_kl_task(_folder(context), max(context.n_items // 2, 1), context.seed)]


def _choice(name: str, context: TaskContext) -> list[Made]:
    plain = name.removesuffix(CHAT_SUFFIX)
    absent = _absent(name, context, f"capability/{choice_tasks.CHOICE_FILES[plain].file}")
    chat = name != plain
    return [absent or choice_tasks.choice_task(_folder(context), plain, context.n_items, context.seed, chat=chat)]


def _lambada(name: str, context: TaskContext) -> list[Made]:
    absent = _absent(name, context, f"capability/{choice_tasks.LAST_WORD_FILE}")
    return [absent or choice_tasks.last_word_task(_folder(context), context.n_items, context.seed)]


def _replies(name: str, context: TaskContext) -> list[Made]:
    vocabulary = _shipped_words(context.data) | reply_tasks.ordinary_words([context.axis_set], None)
    prompts = draw(reply_tasks.REPLY_PROMPTS, max(context.n_items, 1), context.seed)
    return [reply_tasks.ReplyTask(prompts, vocabulary)]


@lru_cache(maxsize=1)
def _shipped_words(data: Path | None) -> frozenset[str]:
    """The same for every axis that ships, so that replies are measured once for all of them."""
    axes = {axis.axis: axis for item in shipped_sets() for axis in load_persona_set(item.name).sets}
    return reply_tasks.ordinary_words(axes.values(), data)


def _absent(name: str, context: TaskContext, file: str) -> Skipped | None:
    if context.data is None:
        return Skipped(name, NO_DATA)
    return None if (context.data / file).is_file() else Skipped(name, f"{file} is not in {context.data}")


def _folder(context: TaskContext) -> Path:
    """The data folder; only asked for once `_absent` has said that the file is there."""
    return context.data if context.data is not None else Path()


CHAT_SUFFIX: Final = "_chat"
_MAKERS: Final[Mapping[str, Callable[[str, TaskContext], list[Made]]]] = {
    "contrasts": _contrasts,
    "external": _external,
    "statements": _statements,
    "questionnaire": _questionnaire,
    "self_descriptions": _self_descriptions,
    "roles": _roles,
    "compositions": _compositions,
    "wikitext": _wikitext,
    "web_kl": _web_kl,
    "chat_kl": _chat_kl,
    "lambada": _lambada,
    **dict.fromkeys(choice_tasks.CHOICE_FILES, _choice),
    **{f"{name}{CHAT_SUFFIX}": _choice for name in ("hellaswag", "mmlu", "arc_easy")},
    "replies": _replies,
}
TASK_NAMES: Final[tuple[str, ...]] = tuple(_MAKERS)
QUICK_TASKS: Final[tuple[str, ...]] = (
    "contrasts",
    "external",
    "statements",
    "questionnaire",
    "wikitext",
    "chat_kl",
    "hellaswag",
    "replies",
)
