"""Arms x tasks to a record: order, what fails, what an interrupted run repeats, and what the record's JSON keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.effect.interfaces import SHARE, Arm, ChatMessage, Engine, EngineName, Items, TaskResult, user_message
from persona_edge.effect.journal import Journal, key_of
from persona_edge.effect.record import Axis, Record, from_json, merged, to_json
from persona_edge.effect.run import PlannedArm, Runner, Subject, run
from persona_edge.encoding import EncodedText
from persona_edge.errors import GenerationError, InputError, OutputError

EI = Axis("EI", "E", "I")
SN = Axis("SN", "S", "N")


@dataclass
class ToyEngine:
    """An engine whose weights are one number, which arms change; it keeps a log of what happens."""

    weight: float = 0.0
    log: list[str] = field(default_factory=list)
    name: EngineName = "pytorch"

    def chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        return [len(message["content"]) for message in messages]

    def text_tokens(self, text: str) -> list[int]:
        return [*text.encode()]

    def start_tokens(self) -> list[int]:
        return []

    def log_probabilities(self, texts: Sequence[EncodedText]) -> list[NDArray[np.float64]]:
        return [np.full(text.n_scored, self.weight) for text in texts]

    def distributions(self, texts: Sequence[EncodedText]) -> Iterator[NDArray[np.float32]]:
        return iter(())

    def generate(self, conversations: Sequence[Sequence[ChatMessage]], *, max_tokens: int) -> list[str]:
        return [f"I am {self.weight}." for _ in conversations]


def arm(name: str, pole: str | None = None, weight: float = 0.0, *, breaks: bool = False) -> Arm:
    @contextmanager
    def active(engine: Engine) -> Iterator[None]:
        assert isinstance(engine, ToyEngine)
        if breaks:
            raise GenerationError(f"{name} does not fit")
        engine.log.append(f"open {name}")
        before, engine.weight = engine.weight, weight
        yield
        engine.weight = before

    toward = {"E": 1, "I": -1, "S": 1}.get(pole or "", 0)
    return Arm(name, pole, toward, user_message, active, {"strength": weight, "seconds_to_make": 1.5})


@dataclass
class ToyTask:
    """Reads the engine's weight, relative to what it was when the task was prepared."""

    name: str
    kind: Literal["persona", "side effect", "replies"] = "persona"
    breaks_for: float | None = None
    breaks_preparing: bool = False
    n_items: int = 3
    base: float | None = None

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        return {"n_items": self.n_items}

    def prepare(self, engine: Engine) -> None:
        assert isinstance(engine, ToyEngine)
        engine.log.append(f"prepare {self.name}")
        if self.breaks_preparing:
            raise ValueError("no such data")
        self.base = engine.weight

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        assert isinstance(engine, ToyEngine)
        assert self.base is not None
        engine.log.append(f"{arm.name}: {self.name}")
        if engine.weight == self.breaks_for:
            raise RuntimeError("out of\nrange")
        values = engine.weight - self.base + np.arange(self.n_items) / 7
        transcripts = {"Who are you?": engine.generate([arm.messages("Who are you?")], max_tokens=3)[0]}
        return TaskResult(self.name, (Items("level", values, SHARE, "positive"),), transcripts)


def level(record: Record, arm_name: str, pole: str | None, task: str, axis: str | None) -> float:
    found = record.arm("pytorch", arm_name, pole)
    assert found is not None
    outcome = found.outcome(task, axis)
    assert outcome is not None
    return float(outcome.measures[0].values[0])


def test_every_arm_is_measured_on_every_task_with_the_base_as_it_was() -> None:
    engine, seen = ToyEngine(), []
    tasks = [ToyTask("a"), ToyTask("b", "side effect")]
    record = run(
        engine,
        [arm("base"), arm("mask", "E", 0.5)],
        tasks,
        lambda *step: seen.append(step),
        axis=EI,
        subject=Subject("tiny", "f00"),
    )
    assert engine.log == [
        *("prepare a", "prepare b", "open base", "base: a", "base: b", "open mask", "mask: a", "mask: b")
    ]
    assert (record.model, record.fingerprint, record.axes) == ("tiny", "f00", (EI,))
    assert level(record, "mask", "E", "a", "EI") == 0.5
    assert level(record, "mask", "E", "b", None) == 0.5
    assert level(record, "base", None, "a", "EI") == 0.0
    mask = record.arms[1]
    assert mask.facts == {"strength": 0.5, "seconds_to_make": 1.5}
    assert [(o.kind, o.axis, o.toward) for o in mask.outcomes] == [("persona", "EI", 1), ("side effect", None, 0)]
    assert mask.outcomes[0].transcripts == {"Who are you?": "I am 0.5."}
    assert seen[-3:] == [("pytorch: mask E", 0, 2), ("pytorch: mask E", 1, 2), ("pytorch: mask E", 2, 2)]


def test_what_fails_is_recorded_and_the_rest_goes_on() -> None:
    def unmakeable() -> Arm:
        raise ImportError("no module")

    tasks = [ToyTask("a", breaks_for=0.5), ToyTask("b"), ToyTask("c", breaks_preparing=True)]
    arms: list[Arm | PlannedArm] = [
        arm("mask", "E", 0.5),
        arm("broken", "E", breaks=True),
        PlannedArm("lora", "E", 1, unmakeable),
        arm("other", "E", 0.25),
    ]
    record = run(ToyEngine(), arms, tasks, axis=EI)
    mask, broken, lora, other = record.arms
    assert [o.error for o in mask.outcomes] == [
        "RuntimeError: out of range",
        None,
        "preparing: ValueError: no such data",
    ]
    assert [o.error for o in other.outcomes] == [None, None, "preparing: ValueError: no such data"]
    assert (broken.error, broken.outcomes) == ("broken does not fit", ())
    assert (lora.error, lora.outcomes) == ("ImportError: no module", ())
    assert mask.error is other.error is None


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "effect.journal.jsonl"

    class Interrupting(ToyTask):
        def measure(self, engine: Engine, arm: Arm) -> TaskResult:
            if arm.name == "mask":
                raise KeyboardInterrupt
            return super().measure(engine, arm)

    arms = [arm("base"), arm("mask", "E", 0.5)]
    with pytest.raises(KeyboardInterrupt):
        run(ToyEngine(), arms, [ToyTask("a"), Interrupting("b")], axis=EI, journal=Journal(path))
    with path.open("a", encoding="utf-8") as file:
        file.write('\n{"key": "cut o')
    engine = ToyEngine()
    resumed = run(engine, arms, [ToyTask("a"), ToyTask("b")], axis=EI, journal=Journal(path))
    assert engine.log == ["prepare b", "open mask", "mask: b"]
    assert _values(resumed) == _values(run(ToyEngine(), arms, [ToyTask("a"), ToyTask("b")], axis=EI))


def _values(record: Record) -> object:
    return [
        (
            arm.name,
            arm.pole,
            arm.facts,
            [(o.task, o.axis, o.toward, o.measures[0].values.round(5).tolist()) for o in arm.outcomes],
        )
        for arm in record.arms
    ]


def test_a_planned_arm_of_which_all_is_known_is_not_made(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> Arm:
        made.append("mask")
        return arm("mask", "E", 0.5)

    journal = Journal(tmp_path / "journal.jsonl")
    plan = PlannedArm("mask", "E", 1, make, {"set": "abc"})
    first = run(ToyEngine(), [plan], [ToyTask("a")], axis=EI, journal=journal)
    again = run(ToyEngine(), [plan], [ToyTask("a")], axis=EI, journal=Journal(tmp_path / "journal.jsonl"))
    assert made == ["mask"]
    assert _values(again) == _values(first)
    other = PlannedArm("mask", "E", 1, make, {"set": "abd"})
    run(ToyEngine(), [other], [ToyTask("a")], axis=EI, journal=journal)
    run(ToyEngine(), [plan], [ToyTask("a", n_items=4)], axis=EI, journal=journal)
    assert made == ["mask"] * 3


def test_failures_are_tried_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    arms = [arm("mask", "E", 0.5)]
    assert run(ToyEngine(), arms, [ToyTask("a", breaks_for=0.5)], journal=journal).arms[0].outcomes[0].error
    assert run(ToyEngine(), arms, [ToyTask("a")], journal=journal).arms[0].outcomes[0].error is None


def test_side_effects_are_measured_once_for_all_axes() -> None:
    engine = ToyEngine()
    runner = Runner(engine)
    for axis in (EI, SN):
        tasks = [ToyTask(f"contrasts {axis.name}"), ToyTask("drift", "side effect")]
        record = runner.measure(arm("base"), tasks, axis)
        assert [(o.task, o.axis) for o in record.outcomes] == [(f"contrasts {axis.name}", axis.name), ("drift", None)]
    assert engine.log.count("prepare drift") == engine.log.count("base: drift") == 1


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "nowhere" / "journal.jsonl")
    with pytest.raises(OutputError, match=r"cannot write .*journal\.jsonl: No such file"):
        run(ToyEngine(), [arm("base")], [ToyTask("a")], journal=journal)


def test_keys_tell_contents_apart() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 1.5}), key_of({"b": 1}), key_of({"a": [1]})}) == 4


def test_a_finished_journal_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.put("k", [1])
    assert len(Journal(tmp_path / "journal.jsonl")) == 1
    journal.remove()
    assert list(tmp_path.iterdir()) == []
    Journal().remove()


# The record


def sample() -> Record:
    return run(ToyEngine(), [arm("base"), arm("mask", "E", 0.5)], [ToyTask("a")], axis=EI, subject=Subject("m", "1"))


def test_json_keeps_everything_to_six_digits() -> None:
    record = sample()
    record.arms[1].outcomes[0].measures[0].values[1] = np.nan
    text = to_json(record)
    back = from_json(text)
    assert to_json(back) == text
    values = back.arms[1].outcomes[0].measures[0].values
    np.testing.assert_allclose(values, [0.5, np.nan, 0.5 + 2 / 7], rtol=1e-5)
    assert "[0.0, 0.142857, 0.285714]" in text
    assert back.conditions == record.conditions
    assert back.axes == (EI,)


def test_json_leaves_texts_alone() -> None:
    record = sample()
    odd = "a list [ 1, 2 ]\n[\n 1,\n 2\n] and \u2028 \U0001f642"
    assert isinstance(record.arms[0].outcomes[0].transcripts, dict)
    record.arms[0].outcomes[0].transcripts["odd"] = odd
    assert from_json(to_json(record)).arms[0].outcomes[0].transcripts["odd"] == odd


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', '{"format": "persona-edge evaluation 1"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not an evaluation"):
        from_json(text)


def test_records_of_one_model_merge() -> None:
    engine = ToyEngine()
    subject = Subject("m", "1")
    first = run(engine, [arm("base"), arm("mask", "E", 0.5)], [ToyTask("a")], axis=EI, subject=subject)
    second = run(engine, [arm("base"), arm("mask", "S", 0.7)], [ToyTask("b")], axis=SN, subject=subject)
    both = merged([first, second])
    assert both.axes == (EI, SN)
    assert [(a.name, a.pole, [o.task for o in a.outcomes]) for a in both.arms] == [
        ("base", None, ["a", "b"]),
        ("mask", "E", ["a"]),
        ("mask", "S", ["b"]),
    ]
    renewed = run(engine, [arm("mask", "E", 0.9)], [ToyTask("a")], axis=EI, subject=subject)
    assert level(merged([both, renewed]), "mask", "E", "a", "EI") == 0.9
    with pytest.raises(InputError, match="of m and of n do not go into one record"):
        merged([first, run(engine, [], [], subject=Subject("n", "2"))])
    with pytest.raises(InputError, match="at least one"):
        merged([])
