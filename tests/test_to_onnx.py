"""The exporter: the folder that comes out, the pack in it, and that failures leave nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import transformers

from persona_edge.errors import ModelError, ModelMismatchError, OutputError, UnsupportedModelError
from persona_edge.exporters.to_gguf import check_gguf
from persona_edge.exporters.to_onnx import export_onnx, onnx_folder, write_onnx_model
from persona_edge.find_packs import packs_beside
from persona_edge.maskpack import MaskPack
from persona_edge.onnx_weights import check_onnx
from tests.tiny_models import load, save_folder, tokenizer
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]


def test_the_folder_holds_model_and_tokenizer_in_blocks_of_32(tiny_llama: TinyOnnx) -> None:
    names = {path.name for path in tiny_llama.folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {(m.bits, m.block_size, m.zero_points) for m in tiny_llama.model.matrices()} == {(4, 32, None)}


def test_one_pack_fits_the_gguf_and_the_onnx_folder(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama.folder, tmp_path / "tiny.onnx-int4")
    done = export_onnx(tiny_llama.gguf, personas_of(tiny_llama.torch), set_name="mbti", folder=folder)
    assert packs_beside(done.model) == (done.pack,)
    identity = MaskPack.open(done.pack).identity
    check_onnx(identity, tiny_llama.model)
    check_gguf(tiny_llama.gguf, MaskPack.open(done.pack).load())


def test_personas_of_another_model_are_not_written(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama.folder, tmp_path / "copy")
    personas = personas_of(load(save_folder(tmp_path / "other", "llama", seed=1)))
    with pytest.raises(ModelMismatchError):
        export_onnx(tiny_llama.gguf, personas, set_name="mbti", folder=folder)
    assert not list(folder.glob("*.maskpack"))


def test_an_existing_folder_is_not_overwritten(tiny_llama: TinyOnnx) -> None:
    with pytest.raises(OutputError, match="exists already"):
        write_onnx_model(tiny_llama.gguf, tiny_llama.folder)


def test_a_failed_conversion_leaves_nothing(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    damaged = tmp_path / "in" / "damaged.gguf"
    damaged.parent.mkdir()
    damaged.write_bytes(tiny_llama.gguf.read_bytes()[:5000])
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(ModelError):
        write_onnx_model(damaged, target / "model")
    assert not list(target.iterdir())


def test_a_model_that_the_builder_does_not_know_is_named(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=len(tokenizer()), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(UnsupportedModelError) as caught:
        write_onnx_model(tmp_path / "small", tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("onnxruntime-genai cannot convert small (GPT2LMHeadModel): NotImplementedError: ")
    assert said.endswith("; use the GGUF file")
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_any_other_failure_of_the_builder_is_one_line_with_the_architecture(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "small", "llama")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError) as caught:
        write_onnx_model(folder, tmp_path / "out")
    assert type(caught.value) is ModelError
    said = str(caught.value)
    assert re.match(r"onnxruntime-genai could not convert small \(LlamaForCausalLM\): \w+: .+; run again, or use", said)
    assert "\n" not in said


def test_the_folder_s_name_says_model_and_precision() -> None:
    assert onnx_folder(Path("models/a.Q4_1.gguf")) == Path("models/a.Q4_1.onnx-int4")
