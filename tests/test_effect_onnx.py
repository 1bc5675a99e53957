"""`persona-edge eval` on ONNX models: by themselves, in place of a GGUF file, and beside it, with one pack."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from persona_edge import cli
from persona_edge.effect.interfaces import user_message
from persona_edge.effect.record import Record, from_json
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.encoding import EncodedText
from persona_edge.export import fingerprint
from persona_edge.exporters.to_onnx import export_onnx
from tests.program import RUN_WITHOUT_TORCH
from tests.tiny_models import contrasts
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyOnnx, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf with its ONNX folder and pack beside it, and a calibration set."""
    folder = tmp_path_factory.mktemp("eval")
    gguf = Path(shutil.copy(tiny_llama.gguf, folder / "tiny.gguf"))
    onnx = shutil.copytree(tiny_llama.folder, folder / "tiny.onnx-int4")
    export_onnx(gguf, personas_of(tiny_llama.torch), set_name="mbti", folder=onnx, pack=folder / "tiny.maskpack")
    lines = [{"axis": "EI", "positive": "E", "negative": "I"}, *(vars(item) for item in contrasts(12))]
    (folder / "ei.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def _words(folder: Path, model: str, output: Path, *more: str, pack: bool = True) -> list[str]:
    words = ["eval", "--model", str(folder / model), "--personas", str(folder / "ei.jsonl"), "--poles", "E"]
    words += ["--tasks", "contrasts", "--n-items", "2", "--threads", "1", "--output", str(output), *more]
    return [*words, *(("--pack", str(folder / "tiny.maskpack")) if pack else ())]


def _run(folder: Path, model: str, output: Path, *more: str, pack: bool = True) -> Result:
    return CliRunner().invoke(cli.main, _words(folder, model, output, *more, pack=pack))


def _read(prefix: Path) -> Record:
    record = from_json(prefix.with_name(f"{prefix.name}.json").read_text(encoding="utf-8"))
    assert not [arm.error for arm in record.arms if arm.error]
    assert not [o.error for arm in record.arms for o in arm.outcomes if o.error]
    return record


def _values(record: Record, engine: str, name: str, pole: str | None) -> bytes:
    arm = record.arm(engine, name, pole)
    assert arm is not None
    return b"".join(items.values.tobytes() for outcome in arm.outcomes for items in outcome.measures)


def test_an_onnx_folder_is_measured_with_a_pack_and_without_torch(folder: Path, tmp_path: Path) -> None:
    words = _words(folder, "tiny.onnx-int4", tmp_path / "effect", "--engine", "runtime")
    done = subprocess.run([*RUN_WITHOUT_TORCH, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "need the GGUF file" in done.stderr
    record = _read(tmp_path / "effect")
    assert [(arm.engine, arm.name, arm.pole) for arm in record.arms] == [
        ("onnx", "base", None),
        ("onnx", "contrastive-fisher", "E"),
    ]
    assert (record.model, record.fingerprint) == ("tiny.onnx-int4", fingerprint(folder / "tiny.onnx-int4/model.onnx"))
    assert _values(record, "onnx", "base", None) != _values(record, "onnx", "contrastive-fisher", "E")


def test_one_record_shows_the_gguf_and_the_onnx_model_beside_it(folder: Path, tmp_path: Path) -> None:
    both = ("--engine", "runtime", "--backend", "both", "--arms", "contrastive-fisher")
    assert _run(folder, "tiny.gguf", tmp_path / "both", *both).exit_code == 0
    record = _read(tmp_path / "both")
    assert record.fingerprint == fingerprint(folder / "tiny.gguf")
    assert [arm.engine for arm in record.arms] == ["runtime", "runtime", "onnx", "onnx"]
    of_onnx = fingerprint(folder / "tiny.onnx-int4/model.onnx")
    assert record.settings["ONNX model"] == f"tiny.onnx-int4, SHA-256 {of_onnx}"
    assert "Engine onnx" in (tmp_path / "both.md").read_text(encoding="utf-8")

    alone = ("--engine", "runtime", "--backend", "onnx", "--arms", "contrastive-fisher")
    assert _run(folder, "tiny.gguf", tmp_path / "alone", *alone).exit_code == 0
    again = _read(tmp_path / "alone")
    assert {arm.engine for arm in again.arms} == {"onnx"}
    for name, pole in (("base", None), ("contrastive-fisher", "E")):
        assert _values(again, "onnx", name, pole) == _values(record, "onnx", name, pole)
        assert _values(record, "runtime", name, pole) != _values(record, "onnx", name, pole)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("tiny.onnx-int4", ("--engine", "both"), "runs on --engine runtime alone"),
        ("tiny.onnx-int4", ("--engine", "runtime", "--backend", "both"), "pass its GGUF file"),
        ("tiny.onnx-int4", ("--engine", "runtime", "--backend", "gguf"), "needs a GGUF file"),
        ("tiny.gguf", ("--backend", "onnx"), "add --engine runtime"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    folder: Path, tmp_path: Path, model: str, more: tuple[str, ...], message: str
) -> None:
    _is_refused(_run(folder, model, tmp_path / "effect", *more), message, tmp_path)


def test_an_onnx_folder_without_a_pack_is_refused(folder: Path, tmp_path: Path) -> None:
    result = _run(folder, "tiny.onnx-int4", tmp_path / "effect", "--engine", "runtime", pack=False)
    _is_refused(result, "is measured with a pack; add --pack", tmp_path)


def _is_refused(result: Result, message: str, output: Path) -> None:
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(output.iterdir())


def test_wearing_a_persona_leaves_nothing_behind(folder: Path, tiny_llama: TinyOnnx) -> None:
    with RuntimeEngine.open(folder / "tiny.onnx-int4", n_ctx=128, n_threads=1) as engine:
        assert engine.name == "onnx"
        prompt = engine.chat_tokens(user_message("What now?"))
        given = [EncodedText((*prompt, *engine.text_tokens(text)), 3) for text in (" the river", " a book, or wait")]
        before = engine.log_probabilities(given)
        with engine.wearing(personas_of(tiny_llama.torch), "E"):
            assert not np.array_equal(engine.log_probabilities(given)[0], before[0])
        assert all(np.array_equal(a, b) for a, b in zip(engine.log_probabilities(given), before, strict=True))
