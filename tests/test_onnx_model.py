"""Reading ONNX folders: names, rows, weights; and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from persona_edge.errors import ModelFileError, ModelMismatchError, ModelNotFoundError, UnsupportedModelError
from persona_edge.exporters.to_onnx import write_onnx_model
from persona_edge.onnx_model import CONFIG_NAME, find_onnx, read_onnx_model
from persona_edge.onnx_weights import check_onnx, dequantize_matrix, dequantize_weight, weights_at
from tests.tiny_models import load, save_folder
from tests.tiny_onnx import TinyOnnx, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]


def _copy(model: TinyOnnx, folder: Path) -> Path:
    shutil.copytree(model.folder, folder)
    return folder


def test_every_maskable_tensor_of_the_gguf_is_there_with_its_shape(tiny_llama: TinyOnnx) -> None:
    assert set(tiny_llama.model.shapes()) == {layer.shape for layer in tiny_llama.torch.layers}
    assert tiny_llama.model.architecture == "llama"


def test_weights_are_the_gguf_s_row_by_row_up_to_quantization(tiny_llama: TinyOnnx) -> None:
    # int4 in blocks of 32: a step is the block's largest magnitude over 8, the error at most one step at the ends.
    for layer in tiny_llama.torch.layers:
        original, found = layer.weights(), dequantize_weight(tiny_llama.model.weights[layer.name])
        step = np.abs(original.reshape(len(original), -1, 32)).max(-1).repeat(32, -1) / 8
        assert (np.abs(found - original) <= 1.01 * step).all(), layer.name


def test_query_and_key_rows_are_permuted_and_lie_in_one_matrix(tiny_llama: TinyOnnx) -> None:
    query, key, value = (tiny_llama.model.weights[f"blk.1.attn_{part}.weight"] for part in "qkv")
    assert query.matrix.name == key.matrix.name == value.matrix.name
    assert query.rows[:4].tolist() == [0, 8, 1, 9]
    assert key.rows[:2].tolist() == [64, 72]
    assert value.rows.tolist() == list(range(96, 128))
    rows = np.concatenate([query.rows, key.rows, value.rows])
    assert sorted(rows.tolist()) == list(range(query.matrix.n_rows))


def test_an_architecture_without_permutation_keeps_its_rows(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "qwen", "qwen2")
    model, torch_model = write_onnx_model(folder, tmp_path / "out"), load(folder)
    check_onnx(torch_model.identity(), model)
    name = "blk.0.attn_q.weight"
    assert (
        np.corrcoef(dequantize_weight(model.weights[name]).ravel(), torch_model.layer(name).weights().ravel())[0, 1]
        > 0.99
    )


def test_single_weights_are_read_as_the_whole(tiny_llama: TinyOnnx) -> None:
    weight = tiny_llama.model.weights["blk.0.attn_k.weight"]
    whole = dequantize_weight(weight)
    positions = np.random.default_rng(0).permutation(whole.size)[:500].astype(np.uint32)
    assert np.array_equal(weights_at(weight, positions), whole.ravel()[positions])
    assert np.array_equal(dequantize_matrix(weight.matrix)[weight.rows], whole)


def test_the_sketch_accepts_this_model_and_refuses_another(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    assert check_onnx(tiny_llama.torch.identity(), tiny_llama.model).agreement > 0.99
    other = load(save_folder(tmp_path / "other", "llama", seed=1))
    with pytest.raises(ModelMismatchError, match="other weights"):
        check_onnx(other.identity(), tiny_llama.model)
    with pytest.raises(ModelMismatchError, match="architecture"):
        check_onnx(replace(tiny_llama.torch.identity(), architecture="qwen2"), tiny_llama.model)


def test_a_wrong_row_order_would_be_refused(tiny_llama: TinyOnnx) -> None:
    model = tiny_llama.model
    plain = {
        name: replace(weight, rows=np.sort(weight.rows)) if "attn_q" in name or "attn_k" in name else weight
        for name, weight in model.weights.items()
    }
    with pytest.raises(ModelMismatchError, match=r"attn_[qk]|other weights"):
        check_onnx(tiny_llama.torch.identity(), replace(model, weights=plain))


def test_a_folder_and_its_graph_stand_for_the_same(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    graph = tiny_llama.folder / "model.onnx"
    assert find_onnx(tiny_llama.folder) == find_onnx(graph) == graph
    assert find_onnx(tmp_path) is None
    assert find_onnx(tiny_llama.gguf) is None


def test_what_is_no_onnx_folder_is_refused(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no ONNX model there"):
        read_onnx_model(tmp_path)
    folder = _copy(tiny_llama, tmp_path / "copy")
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(ModelFileError, match="is missing"):
        read_onnx_model(folder)


@pytest.mark.parametrize("damage", [b"", b"\xff\xff\xff not protobuf"])
def test_a_damaged_graph_is_refused(tiny_llama: TinyOnnx, tmp_path: Path, damage: bytes) -> None:
    folder = _copy(tiny_llama, tmp_path / "copy")
    (folder / "model.onnx").write_bytes(damage)
    with pytest.raises((ModelFileError, UnsupportedModelError), match=r"model\.onnx"):
        read_onnx_model(folder)


def test_missing_data_is_named_when_weights_are_read(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    folder = _copy(tiny_llama, tmp_path / "copy")
    (folder / "model.onnx.data").write_bytes(b"short")
    weight = next(iter(read_onnx_model(folder).weights.values()))
    with pytest.raises(ModelFileError, match="cannot read"):
        dequantize_weight(weight)


def test_data_outside_the_folder_is_refused(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    folder = _copy(tiny_llama, tmp_path / "copy")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    onnx.save(graph, folder / "model.onnx")
    with pytest.raises(ModelFileError, match="outside"):
        read_onnx_model(folder)


def test_an_unknown_kind_of_model_is_refused(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    folder = _copy(tiny_llama, tmp_path / "copy")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["model"]["type"] = "whisper"
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="whisper"):
        read_onnx_model(folder)
