"""Layers by their GGUF names, rows in GGUF's order: on tiny models of each architecture, and on the real one."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona_edge import modeling
from persona_edge.errors import InputError, MissingDependencyError, ModelFileError, UnsupportedModelError
from persona_edge.modeling import TorchModel, choose_device, choose_dtype, load_torch_model, require_offline
from tests.tiny_models import (
    ARCHITECTURES,
    FEED_FORWARD,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KEY_VALUE_HEADS,
    N_BLOCKS,
    SENTENCES,
    interleaved,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
    save_gguf,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def gguf_path(folder: Path) -> Path:
    return save_gguf(folder.with_name("tiny.gguf"), folder)


def dequantized(path: Path) -> dict[str, NDArray[np.float32]]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors if t.name.startswith("blk.")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_of_a_block_has_its_gguf_name_and_shape(architecture: str, tmp_path: Path) -> None:
    model = load(save_folder(tmp_path, architecture))
    shapes = {
        "attn_q": (HEADS * HEAD_SIZE, HIDDEN),
        "attn_k": (KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
        "attn_v": (KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_SIZE),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    expected = {f"blk.{i}.{name}.weight": shape for i in range(N_BLOCKS) for name, shape in shapes.items()}
    assert {ly.name: (ly.shape.n_rows, ly.shape.n_columns) for ly in model.layers} == expected
    assert model.architecture == {"llama": "llama", "qwen2": "qwen2", "gemma3_text": "gemma3"}[architecture]
    assert model.n_blocks == N_BLOCKS
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_only_query_and_key_of_the_llama_architecture_are_permuted(folder: Path, tmp_path: Path) -> None:
    permuted = {layer.name for layer in load(folder).layers if layer.row_order is not None}
    assert permuted == {f"blk.{i}.attn_{part}.weight" for i in range(N_BLOCKS) for part in ("q", "k")}
    assert all(layer.row_order is None for layer in load(save_folder(tmp_path, "qwen2")).layers)


def test_original_weights_come_out_in_the_rows_of_a_converted_file(folder: Path, gguf_path: Path) -> None:
    model, in_file = load(folder), dequantized(gguf_path)
    for layer in model.layers:
        np.testing.assert_array_equal(layer.weights(), in_file[layer.name])
    query = model.layer("blk.0.attn_q.weight")
    stored = query.module.weight.detach().numpy()
    np.testing.assert_array_equal(query.weights(), interleaved(stored, HEADS))
    assert not np.array_equal(query.weights(), stored)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_gguf_loads_with_its_own_rows(kind: str, folder: Path, tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "a.gguf", folder, quantization=gguf.GGMLQuantizationType[kind])
    model, in_file = load(path), dequantized(path)
    for layer in model.layers:
        np.testing.assert_array_equal(layer.weights(), in_file[layer.name])
    assert [layer.name for layer in model.layers] == [name for name, w in in_file.items() if w.ndim == 2]


def test_a_gguf_speaks_as_the_folder_it_was_made_from(folder: Path, gguf_path: Path) -> None:
    original, converted = load(folder), load(gguf_path)
    tokens = [original.tokenizer(text)["input_ids"] for text in SENTENCES]
    assert tokens == [converted.tokenizer(text)["input_ids"] for text in SENTENCES]
    with torch.no_grad():
        logits = [m.model(torch.tensor(tokens[:1])).logits for m in (original, converted)]
    torch.testing.assert_close(logits[0], logits[1])
    assert original.tokenizer.chat_template == converted.tokenizer.chat_template
    sketches = [m.identity().sketch for m in (original, converted)]
    for name, sample in sketches[0].items():
        np.testing.assert_array_equal(sample.positions, sketches[1][name].positions)
        np.testing.assert_array_equal(sample.negative, sketches[1][name].negative)


def test_bfloat16_weights_are_recognised_in_the_file_too(gguf_path: Path) -> None:
    model = load_torch_model(gguf_path, name="tiny", device="cpu", dtype="bfloat16")
    assert model.dtype_name == "bfloat16"
    assert {layer.name for layer in model.layers if layer.row_order is not None} == {
        f"blk.{i}.attn_{part}.weight" for i in range(N_BLOCKS) for part in ("q", "k")
    }


def with_rows(model: TorchModel, name: str, rows: NDArray[np.int64]) -> None:
    weight = model.layer(name).module.weight
    weight.data = weight.data[torch.from_numpy(rows)]


def test_the_order_is_read_from_the_file_not_assumed(folder: Path, gguf_path: Path) -> None:
    # As if a loader had not undone the permutation: the module's rows are then the file's.
    model = load(folder)
    query = model.layer("blk.1.attn_q.weight")
    assert query.row_order is not None
    with_rows(model, query.name, query.row_order)
    found = {layer.name: layer for layer in modeling._ordered_as_in_file(model.layers, gguf_path)}
    assert found[query.name].row_order is None
    assert found["blk.0.attn_q.weight"].row_order is not None


def test_rows_in_no_known_order_are_refused(folder: Path, gguf_path: Path) -> None:
    for name in ("blk.0.attn_k.weight", "blk.1.ffn_up.weight"):
        model = load(folder)
        with_rows(model, name, np.random.default_rng(0).permutation(model.layer(name).shape.n_rows))
        with pytest.raises(UnsupportedModelError, match=rf"the rows of {name} are stored in an order"):
            modeling._ordered_as_in_file(model.layers, gguf_path)


def test_a_file_without_one_of_the_layers_is_refused(folder: Path, gguf_path: Path) -> None:
    model = load(folder)
    extra = replace(model.layers[0], name="blk.9.attn_q.weight")
    with pytest.raises(UnsupportedModelError, match=r"no tensor blk\.9\.attn_q\.weight"):
        modeling._ordered_as_in_file((*model.layers, extra), gguf_path)


def test_a_layer_is_found_by_name(folder: Path) -> None:
    model = load(folder)
    assert model.layer("blk.1.ffn_up.weight").name == "blk.1.ffn_up.weight"
    with pytest.raises(KeyError):
        model.layer("blk.2.ffn_up.weight")


def test_an_unknown_architecture_names_those_that_are_known(tmp_path: Path) -> None:
    import transformers

    from tests.tiny_models import tokenizer

    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*qwen2"):
        load(tmp_path)


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights at all")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("damage", [break_weights, break_config, remove_weights, remove_tokenizer])
def test_a_damaged_folder_is_a_one_line_error(damage: object, folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    assert callable(damage)
    damage(damaged)
    with pytest.raises(ModelFileError) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("n_bytes", [0, 10, 3000, -1000])
def test_a_truncated_gguf_is_a_one_line_error(n_bytes: int, gguf_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_path.read_bytes()[:n_bytes])
    with pytest.raises(ModelFileError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(MissingDependencyError, match=r"needs gguf.*persona-edge\[offline\]"):
        require_offline()


def test_device_and_dtype_are_those_asked_for() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_dtype("float32", "cpu") == "float32"
    assert choose_dtype("auto", "mps") == "float32"
    assert choose_dtype("auto", "cpu") in ("float32", "bfloat16")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            choose_device("cuda:1")


@pytest.mark.model
def test_the_real_model_has_exactly_the_files_weights(smollm2_path: Path, smollm2_torch: TorchModel) -> None:
    model = smollm2_torch
    assert len(model.layers) == 7 * model.n_blocks == 210
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    for layer in model.layers:
        tensor = tensors[layer.name]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(layer.weights(), expected, err_msg=layer.name)
        assert (layer.row_order is not None) == layer.name.endswith(("attn_q.weight", "attn_k.weight"))
