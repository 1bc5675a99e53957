"""`persona-edge eval` as typed: every arm and task on a tiny model and tiny data, on both engines, and refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner, Result

from persona_edge import calibration, cli
from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.arm_registry import ARM_NAMES, RUNTIME_ARMS
from persona_edge.effect.eval_plan import QUICK_CONTRASTS, EvalRequest, sections_of
from persona_edge.effect.record import Record, from_json
from persona_edge.effect.task_registry import TASK_NAMES, TaskContext, make_tasks
from persona_edge.maskpack import write_pack
from persona_edge.persona_sets import load_persona_set, neutral_prompts, neutral_texts
from tests import tiny_models
from tests.program import RUN_WITHOUT_TORCH
from tests.tiny_chat import personas_for
from tests.tiny_eval_data import write_folder
from tests.tiny_models import (
    contrasts,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
    save_gguf,
)

FEW: Final = ("--n-items", "2", "--dtype", "float32", "--threads", "1")
LIMITS: Final = ("--max-chat-kl", "0.5", "--max-perplexity-ratio", "2")  # so small a model changes a lot with each row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, a calibration set and evaluation data; less neutral text than usual, and a cache of its own."""
    folder = tmp_path_factory.mktemp("eval")
    prompts, texts = neutral_prompts()[:8], neutral_texts()[:8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONA_EDGE_CACHE", str(folder / "cache"))
        patch.delenv("PERSONA_EDGE_DATA", raising=False)
        patch.setattr(calibration, "neutral_prompts", lambda: prompts)
        patch.setattr(calibration, "neutral_texts", lambda: texts)
        patch.setitem(tiny_models._CONFIG, "max_position_embeddings", 2048)
        save_gguf(folder / "tiny.gguf", save_folder(folder / "original"))
        write_set(folder / "ei.jsonl", contrasts(24))
        write_folder(folder)
        yield folder


def write_set(path: Path, items: Sequence[object]) -> None:
    lines = [{"axis": "EI", "positive": "E", "negative": "I"}, *(vars(item) for item in items)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run_eval(folder: Path, *arguments: str) -> Result:
    words = ["eval", "--model", str(folder / "tiny.gguf"), "--personas", str(folder / "ei.jsonl"), *FEW, *arguments]
    return CliRunner().invoke(cli.main, words)


def read(prefix: Path) -> Record:
    return from_json(prefix.with_name(f"{prefix.name}.json").read_text(encoding="utf-8"))


def failures(record: Record) -> list[object]:
    arms = [(arm.engine, arm.name, arm.pole, arm.error) for arm in record.arms if arm.error]
    return [*arms, *((arm.name, o.task, o.error) for arm in record.arms for o in arm.outcomes if o.error)]


def axis_set(folder: Path) -> CalibrationSet:
    return load_persona_set(folder / "ei.jsonl").sets[0]


def test_every_arm_on_every_task(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "effect"
    result = run_eval(folder, "--data", str(folder), *LIMITS, "--poles", "E", "--output", str(prefix))
    assert result.exit_code == 0, result.output
    record = read(prefix)
    assert failures(record) == []
    assert [(arm.name, arm.pole) for arm in record.arms] == [(n, None if n == "base" else "E") for n in ARM_NAMES]
    context = TaskContext(axis_set(folder), load_persona_set(folder / "ei.jsonl"), folder, 2, 0)
    tasks = [task.name for task in make_tasks(TASK_NAMES, context)]
    assert len(tasks) > 15
    for arm in record.arms:
        assert [outcome.task for outcome in arm.outcomes] == tasks
        assert all(items.values.size for outcome in arm.outcomes for items in outcome.measures)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html", ".svg"}
    assert str(folder) not in "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert result.stdout.split(", ")[0] == f"{prefix}.json"


def test_the_runtime_measures_masks_and_prompts(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "effect"
    tasks = "contrasts,chat_kl,hellaswag"
    result = run_eval(
        *(folder, "--data", str(folder), *LIMITS, "--engine", "both", "--poles", "e", "--tasks", tasks),
        *("--arms", "system-prompt,contrastive-fisher,control-vector", "--output", str(prefix)),
    )
    assert result.exit_code == 0, result.output
    record = read(prefix)
    assert failures(record) == []
    names = {engine: [arm.name for arm in record.arms if arm.engine == engine] for engine in ("pytorch", "runtime")}
    assert names["pytorch"] == ["base", "system-prompt", "contrastive-fisher", "control-vector"]
    assert names["runtime"] == [name for name in names["pytorch"] if name in RUNTIME_ARMS]
    assert "note: on PyTorch only" in result.stderr
    assert {arm.pole for arm in record.arms} == {None, "E"}
    masked, base = record.arm("runtime", "contrastive-fisher", "E"), record.arm("runtime", "base", None)
    assert masked is not None
    assert base is not None
    drift, none = masked.outcome("chat KL", None), base.outcome("chat KL", None)
    assert drift is not None
    assert none is not None
    assert drift.measures[0].values.mean() > none.measures[0].values.mean() == pytest.approx(0, abs=1e-4)


def test_a_pack_is_measured_as_it_is(folder: Path, tmp_path: Path) -> None:
    personas = personas_for(folder / "tiny.gguf", personas={"E": ("E",), "INFP": ("I", "N")})
    write_pack(tmp_path / "tiny.maskpack", personas)
    arguments = ("--pack", str(tmp_path / "tiny.maskpack"), "--arms", "contrastive-fisher", "--tasks", "contrasts")
    result = run_eval(folder, *arguments, "--output", str(tmp_path / "effect"))
    assert result.exit_code == 0, result.output
    record = read(tmp_path / "effect")
    assert [(arm.name, arm.pole, arm.error) for arm in record.arms] == [
        ("base", None, None),
        ("contrastive-fisher", "E", None),
    ]
    assert record.arms[1].facts["source"] == "pack"
    assert str(record.settings["pack"]).startswith("tiny.maskpack, SHA-256 ")


def test_arms_beside_a_pack_are_made_from_as_few_contrasts(folder: Path, tmp_path: Path) -> None:
    used = {"sha256": axis_set(folder).content_hash(), "n_contrasts": 24}
    report = {"poles": {"E": {"calibration_set": used}}}
    write_pack(tmp_path / "tiny.maskpack", personas_for(folder / "tiny.gguf", personas={"E": ("E",)}, report=report))
    stored, asked = [], []
    for n in (24, 12):
        result = run_eval(
            *(folder, "--pack", str(tmp_path / "tiny.maskpack"), "--arms", "contrastive-fisher,retrieval"),
            *("--tasks", "contrasts", "--contrasts", str(n), "--n-items", "50", "--output", str(tmp_path / "effect")),
        )
        assert result.exit_code == 0, result.output
        record = read(tmp_path / "effect")
        assert failures(record) == []
        assert record.settings["contrasts that arms are made from, at most"] == n
        assert ("note: axis EI: the pack's masks were found in 24 of" in result.stderr) == (n < 24)
        retrieval = record.arm("pytorch", "retrieval", "E")
        assert retrieval is not None
        stored.append(float(retrieval.facts["artefact_bytes"]))
        asked.append(retrieval.outcomes[0].measures[0].values.size)
    assert stored[1] < stored[0]
    assert asked == [len(axis_set(folder).split()[1])] * 2


def test_a_pack_on_the_runtime_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    personas = personas_for(folder / "tiny.gguf", personas={"E": ("E",), "I": ("I",)})
    write_pack(tmp_path / "tiny.maskpack", personas)
    words = [
        *("eval", "--model", folder / "tiny.gguf", "--personas", folder / "ei.jsonl", "--engine", "runtime", *FEW),
        *("--pack", tmp_path / "tiny.maskpack", "--arms", "contrastive-fisher", "--tasks", "contrasts"),
        *("--output", tmp_path / "effect"),
    ]
    done = subprocess.run([*RUN_WITHOUT_TORCH, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = read(tmp_path / "effect")
    assert failures(record) == []
    assert [(arm.engine, arm.pole) for arm in record.arms] == [("runtime", None), ("runtime", "E"), ("runtime", "I")]


def test_without_data_what_needs_none_is_measured(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "effect"
    result = run_eval(folder, "--quick", "--arms", "base", "--output", str(prefix))
    assert result.exit_code == 0, result.output
    assert "no hellaswag: no evaluation data: set PERSONA_EDGE_DATA" in result.stderr
    assert [outcome.task for outcome in read(prefix).arms[0].outcomes] == ["held-out contrasts: EI", "free replies"]


def test_quick_takes_the_first_axis_and_fewer_contrasts_and_only_where_nothing_is_asked_for() -> None:
    request = EvalRequest("smollm2-135m", Path("effect"), personas=("mbti16", "power"), quick=True)
    found, whole = sections_of(request, None), sections_of(replace(request, quick=False), None)
    assert [section.axis_set.axis for section in found] == [whole[0].axis_set.axis, whole[-1].axis_set.axis]
    assert len(found[0].made_from) == QUICK_CONTRASTS < len(whole[0].made_from)
    assert found[0].axis_set == whole[0].axis_set  # what is asked is held out of all of them
    (given, _power) = sections_of(replace(request, n_contrasts=60), None)
    assert len(given.made_from) == 60
    asked = sections_of(replace(request, poles=("I", "S")), None)
    assert [len(section.made_from) for section in asked] == [len(section.made_from) for section in whole[:2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arms", "base,prompting"), "no arm 'prompting'; choose from base, system-prompt"),
        (("--arms", ","), "give at least one name"),
        (("--tasks", "mml"), "no task 'mml'; choose from contrasts"),
        (("--poles", "X"), "no pole or persona 'X'; these sets have E, I"),
        (("--personas", "mbti16", "--poles", "INFP"), "INFP is composed of several poles; give --pack"),
        (("--personas", "nobody"), "no persona set 'nobody'"),
        (("--engine", "both", "--model", "{folder}/original"), "the engine runtime needs a .gguf file"),
        (("--pack", "{folder}/ei.jsonl"), "ei.jsonl"),
        (("--data", "{folder}/nowhere"), "does not exist"),
        (("--output", "{folder}/nowhere/effect"), "Create the folder"),
    ],
)
def test_refusals_are_one_line_before_any_work(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [argument.format(folder=folder) for argument in arguments]
    result = run_eval(folder, "--output", str(folder / "refused"), *given)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.startswith("persona-edge: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(folder.glob("refused*"))


def test_another_models_pack_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_gguf(tmp_path / "other.gguf", save_folder(tmp_path / "original", seed=5))
    write_pack(tmp_path / "other.maskpack", personas_for(other, personas={"E": ("E",)}))
    result = run_eval(folder, "--pack", str(tmp_path / "other.maskpack"), "--output", str(tmp_path / "effect"))
    assert result.exit_code == 1
    assert "the pack was made from other weights" in result.stderr
