"""Arms x tasks on an engine, to a record.

    record = run(TorchEngine(model), make_arms(…), make_tasks(…), axis=Axis.of(axis_set))

Each task is prepared once, on the unmodified model; then every arm is opened in turn and every task measured. What
goes wrong with one arm or one task is recorded and the rest goes on. With a journal, what was measured before is not
measured again, and an arm of which everything is known is not even made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from persona_edge import __version__
from persona_edge.calibration import Progress, silent
from persona_edge.conditions import Conditions, conditions
from persona_edge.effect.interfaces import Arm, Engine, Task
from persona_edge.effect.journal import Journal, key_of
from persona_edge.effect.record import (
    ArmRecord,
    Axis,
    Outcome,
    Record,
    outcome_from_plain,
    outcome_to_plain,
)
from persona_edge.errors import OutputError, PersonaEdgeError

__all__ = ["PlannedArm", "Runner", "Subject", "planned", "run"]

# Raised whenever the same arms and tasks would give other outcomes.
RUN_VERSION: Final = 1


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the model by its name, the SHA-256 of its weights, and how it is loaded (number format)."""

    model: str = "model"
    fingerprint: str = ""
    loaded_as: str = ""


@dataclass(frozen=True)
class PlannedArm:
    """An arm that is made when it is needed. `key` says what it is made from, JSON-compatible."""

    name: str
    pole: str | None
    toward: int
    make: Callable[[], Arm]
    key: Mapping[str, object] = field(default_factory=dict)


def planned(arm: Arm) -> PlannedArm:
    """`arm`, already made, as a plan; its facts tell it from others, save how long making it took."""
    facts = {name: value for name, value in arm.facts.items() if not name.startswith("seconds")}
    return PlannedArm(arm.name, arm.pole, arm.toward, lambda: arm, facts)


def run(
    engine: Engine,
    arms: Iterable[Arm | PlannedArm],
    tasks: Sequence[Task],
    progress: Progress = silent,
    *,
    axis: Axis | None = None,
    subject: Subject = Subject(),
    journal: Journal | None = None,
    settings: Mapping[str, object] | None = None,
    measured: Conditions | None = None,
) -> Record:
    """Measure every arm on every task. `axis` is the one that persona tasks and the arms' poles belong to.

    Raises OutputError when the journal cannot be written; whatever an arm or a task raises becomes its `error` in the
    record.
    """
    runner = Runner(engine, progress=progress, subject=subject, journal=journal)
    records = tuple(runner.measure(arm, tasks, axis) for arm in arms)
    return Record(
        model=subject.model,
        fingerprint=subject.fingerprint,
        axes=() if axis is None else (axis,),
        arms=records,
        settings={} if settings is None else settings,
        conditions=conditions() if measured is None else measured,
    )


class Runner:
    """Measures arms on one engine. What it knows of the unmodified model serves all axes, and so does the journal."""

    def __init__(
        self,
        engine: Engine,
        *,
        progress: Progress = silent,
        subject: Subject = Subject(),
        journal: Journal | None = None,
    ) -> None:
        self.engine, self.progress, self.subject = engine, progress, subject
        self.journal = Journal() if journal is None else journal
        self._tasks: dict[str, Task] = {}
        self._prepared: dict[str, str | None] = {}  # what went wrong, None for nothing

    def measure(self, arm: Arm | PlannedArm, tasks: Sequence[Task], axis: Axis | None = None) -> ArmRecord:
        """Everything about one arm: from the journal, or made and measured now. Raises OutputError."""
        plan = arm if isinstance(arm, PlannedArm) else planned(arm)
        bench = _Bench(plan, axis, [self._tasks.setdefault(_key_of_task(task), task) for task in tasks])
        outcomes = {task.name: self._known(bench, task) for task in bench.tasks}
        missing = [task for task in bench.tasks if outcomes[task.name] is None]
        facts = self.journal.get(self._key(plan))
        error = None
        if missing or facts is None:
            try:
                made = plan.make()
                facts = {**made.facts}
                self.journal.put(self._key(plan), facts)
                outcomes |= self._measured(bench, made, missing)
            except OutputError:
                raise
            except Exception as failure:  # an arm may fail in any library's way; the others must not
                error = _one_line(failure)
        known = tuple(outcome for outcome in outcomes.values() if outcome is not None)
        return ArmRecord(self.engine.name, plan.name, plan.pole, facts or {}, known, error)

    def _measured(self, bench: _Bench, arm: Arm, missing: Sequence[Task]) -> dict[str, Outcome | None]:
        found: dict[str, Outcome | None] = {}
        for task in missing:
            self._prepare(task)
        if not missing:
            return found
        label = f"{self.engine.name}: {arm.name}" + (f" {arm.pole}" if arm.pole else "")
        with arm.active(self.engine):
            for i, task in enumerate(missing):
                self.progress(label, i, len(missing))
                found[task.name] = outcome = self._outcome(bench, task, arm)
                if outcome.error is None:
                    self.journal.put(self._key(bench.plan, task), outcome_to_plain(outcome))
        self.progress(label, len(missing), len(missing))
        return found

    def _prepare(self, task: Task) -> None:
        """Record what `task` needs of the unmodified model, the first time that it is needed."""
        key = _key_of_task(task)
        if key in self._prepared:
            return
        self.progress(f"{self.engine.name}: preparing {task.name}", 0, 1)
        try:
            task.prepare(self.engine)
            self._prepared[key] = None
        except Exception as error:
            self._prepared[key] = _one_line(error)
        self.progress(f"{self.engine.name}: preparing {task.name}", 1, 1)

    def _outcome(self, bench: _Bench, task: Task, arm: Arm) -> Outcome:
        outcome = bench.empty(task)
        failure = self._prepared[_key_of_task(task)]
        if failure is not None:
            return replace(outcome, error=f"preparing: {failure}")
        started = time.perf_counter()
        try:
            result = task.measure(self.engine, arm)
        except Exception as error:
            return replace(outcome, error=_one_line(error))
        seconds = time.perf_counter() - started
        return replace(outcome, measures=result.measures, transcripts=dict(result.transcripts), seconds=seconds)

    def _known(self, bench: _Bench, task: Task) -> Outcome | None:
        """What the journal holds; axis and side are those of now: side effects are the same for every axis."""
        plain = self.journal.get(self._key(bench.plan, task))
        if plain is None:
            return None
        empty = bench.empty(task)
        return replace(outcome_from_plain(plain), axis=empty.axis, toward=empty.toward)

    def _key(self, plan: PlannedArm, task: Task | None = None) -> str:
        what: dict[str, object] = {
            "version": [RUN_VERSION, __version__],
            "model": [self.subject.fingerprint, self.subject.loaded_as],
            "engine": self.engine.name,
            "arm": [plan.name, plan.pole, dict(plan.key)],
        }
        return key_of(what if task is None else {**what, "task": _key_of_task(task)})


@dataclass(frozen=True)
class _Bench:
    """One arm, the axis it is measured on and the tasks."""

    plan: PlannedArm
    axis: Axis | None
    tasks: Sequence[Task]

    def empty(self, task: Task) -> Outcome:
        """The outcome of `task` before anything is measured."""
        if task.kind != "persona" or self.axis is None:
            return Outcome(task.name, task.kind, None, 0)
        return Outcome(task.name, task.kind, self.axis.name, self.plan.toward)


def _key_of_task(task: Task) -> str:
    return key_of({"name": task.name, "settings": dict(task.settings)})


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PersonaEdgeError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
