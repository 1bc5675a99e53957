"""`chat` on ONNX models: found by itself or on demand, with the packs beside them, and what cannot be combined."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from persona_edge import cli
from persona_edge.errors import InputError
from persona_edge.exporters.to_onnx import export_onnx
from persona_edge.onnx_start import onnx_model_for
from persona_edge.runtime.open_runtime import open_runtime
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]


@pytest.fixture
def gguf(tiny_llama: TinyOnnx, tmp_path: Path) -> Path:
    """A GGUF file with the ONNX folder beside it, and a pack in that."""
    copy = Path(shutil.copy(tiny_llama.gguf, tmp_path / "tiny.gguf"))
    folder = shutil.copytree(tiny_llama.folder, tmp_path / "tiny.onnx-int4")
    export_onnx(copy, personas_of(tiny_llama.torch), set_name="mbti", folder=folder)
    return copy


def _chat(*arguments: str) -> Result:
    common = ("--message", "A quiet evening?", "--max-tokens", "5", "--seed", "1", "--threads", "1", "--json")
    return CliRunner().invoke(cli.main, ["chat", *arguments, *common])


@pytest.mark.parametrize("name", ["tiny.onnx-int4", "tiny.onnx-int4/model.onnx"])
def test_an_onnx_model_is_known_by_its_file_and_finds_its_pack(gguf: Path, name: str) -> None:
    result = _chat("--model", str(gguf.parent / name), "--persona", "e")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["persona"] == "E"


def test_a_gguf_stands_for_the_folder_beside_it_on_demand(gguf: Path) -> None:
    assert onnx_model_for(str(gguf)) is None
    assert onnx_model_for(str(gguf), "onnx") == gguf.parent / "tiny.onnx-int4" / "model.onnx"
    result = _chat("--model", str(gguf), "--backend", "onnx", "--persona", "both")
    assert result.exit_code == 0, result.output


def test_both_backends_take_the_same_pack(gguf: Path) -> None:
    pack = gguf.parent / "tiny.onnx-int4" / "model.mbti.maskpack"
    for model in (gguf, gguf.parent / "tiny.onnx-int4"):
        with open_runtime(model, pack, n_threads=1) as runtime:
            assert runtime.switch("both").n_units_written > 0


def test_what_does_not_go_together_is_refused(gguf: Path) -> None:
    folder = gguf.parent / "tiny.onnx-int4"
    with pytest.raises(InputError, match="needs a GGUF file"):
        onnx_model_for(str(folder), "gguf")
    with pytest.raises(InputError, match="GGUF files only"):
        open_runtime(folder, weights="heap")
    shutil.rmtree(folder)
    result = _chat("--model", str(gguf), "--backend", "onnx")
    assert result.exit_code == 2
    assert "--format onnx" in result.stderr


def test_a_format_that_does_not_exist_is_refused_before_any_work() -> None:
    result = CliRunner().invoke(cli.main, ["export", "--model", "x", "--personas", "mbti16", "--format", "gguf,tf"])
    assert result.exit_code == 2
    assert "write gguf, onnx or gguf,onnx" in result.stderr
