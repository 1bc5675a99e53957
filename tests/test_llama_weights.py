"""Loading a model so that its weights can be edited, and finding them in memory."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from persona_edge.errors import (
    ModelError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightAccessError,
)
from persona_edge.runtime import llama_library, llama_lookup, llama_weights
from persona_edge.runtime.llama_library import GgmlTensor, check_tensor_layout, load_library
from persona_edge.runtime.llama_weights import LlamaModel, TensorLookup, find_tensors, weights_digest
from persona_edge.runtime.placement import Placement
from tests.tiny_chat import N_TOKENS, WIDTH, add_byte_vocabulary

Q4_1, Q5_0, Q8_0, Q4_K, Q6_K, F32 = 3, 6, 8, 12, 14, 0


class ShiftedTensor(ctypes.Structure):
    """`ggml_tensor` as it would be read if a field had been added in front of the shape."""

    _fields_ = (GgmlTensor._fields_[0], GgmlTensor._fields_[1], ("new", ctypes.c_int64), *GgmlTensor._fields_[2:])


def write_tiny_llama(path: Path, *, architecture: str = "llama", n_parts: int = 1) -> Path:
    """A llama of one layer with random Q8_0 weights and a vocabulary of single bytes."""
    tensors_per_part = 0 if n_parts == 1 else -(-12 // n_parts)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    add_byte_vocabulary(writer)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (N_TOKENS, WIDTH), "output": (N_TOKENS, WIDTH), "output_norm": (WIDTH,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
    shapes |= {"blk.0.ffn_gate": (2 * WIDTH, WIDTH), "blk.0.ffn_up": (2 * WIDTH, WIDTH)}
    shapes |= {"blk.0.ffn_down": (WIDTH, 2 * WIDTH), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
    for name, shape in shapes.items():
        weights = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weights)
        else:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def tiny(tiny_path: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(tiny_path)
    yield model
    model.close()


def assert_memory_is_the_file(model: LlamaModel) -> None:
    """Every tensor: found, of the file's type and shape, and with the file's bytes."""
    tensors = find_tensors(model)
    in_file = gguf.GGUFReader(model.path).tensors
    assert list(tensors) == [str(t.name) for t in in_file]
    for expected in in_file:
        found = tensors[str(expected.name)]
        assert found.ggml_type == int(expected.tensor_type)
        assert [found.n_columns, found.n_rows] == [int(expected.shape[0]), int(np.prod(expected.shape[1:]))]
        assert np.array_equal(found.data, expected.data.reshape(-1).view(np.uint8))
        assert found.data.flags.writeable


def test_a_small_model_is_found_whole(tiny: LlamaModel) -> None:
    assert tiny.architecture == "llama"
    assert tiny.metadata("llama.block_count") == "1"
    assert tiny.metadata("no.such.key") is None
    assert_memory_is_the_file(tiny)


@pytest.mark.model
def test_smollm2_is_found_whole(smollm2_path: Path) -> None:
    model = LlamaModel(smollm2_path)
    assert_memory_is_the_file(model)
    assert {t.ggml_type for t in find_tensors(model).values()} == {F32, Q4_1, Q8_0}
    model.close()


@pytest.mark.big
@pytest.mark.parametrize("which", ["qwen_path", "gemma_path"])
def test_k_quants_and_their_neighbours_are_found(which: str, request: pytest.FixtureRequest) -> None:
    model = LlamaModel(request.getfixturevalue(which))
    tensors = find_tensors(model)
    assert {t.ggml_type for t in tensors.values()} == {F32, Q5_0, Q8_0, Q6_K, Q4_K}
    in_graph = find_tensors(model, lookup="graph")
    assert {n: t.data.ctypes.data for n, t in tensors.items()} == {n: t.data.ctypes.data for n, t in in_graph.items()}
    model.close()


def assert_same_views(model: LlamaModel) -> None:
    first, second = find_tensors(model, lookup="symbol"), find_tensors(model, lookup="graph")
    assert list(first) == list(second) == list(model.file_tensor_names)
    for name in first:
        assert first[name].data.ctypes.data == second[name].data.ctypes.data
        assert first[name].data.size == second[name].data.size


def test_both_lookups_find_the_same_addresses(tiny: LlamaModel) -> None:
    assert_same_views(tiny)


@pytest.mark.model
def test_both_lookups_find_the_same_addresses_in_smollm2(smollm2_path: Path) -> None:
    model = LlamaModel(smollm2_path)
    assert_same_views(model)
    model.close()


def test_what_is_written_to_a_view_is_what_the_model_has(tiny: LlamaModel) -> None:
    tensors = find_tensors(tiny)
    before = weights_digest(tensors.values())
    data = tensors["blk.0.ffn_down.weight"].data
    data[70] ^= 1
    assert weights_digest(find_tensors(tiny, lookup="graph").values()) != before
    data[70] ^= 1
    assert weights_digest(find_tensors(tiny).values()) == before


def test_the_digest_tells_tensors_apart(tiny: LlamaModel) -> None:
    tensors = list(find_tensors(tiny).values())
    assert weights_digest(tensors) != weights_digest(reversed(tensors))


def test_a_view_keeps_a_forgotten_model_alive(tiny_path: Path) -> None:
    tensors = find_tensors(LlamaModel(tiny_path))
    owner = tensors["output.weight"].data.base
    assert owner is not None
    assert weights_digest(tensors.values()) == weights_digest(find_tensors(LlamaModel(tiny_path)).values())


def test_a_closed_model_hands_out_nothing(tiny: LlamaModel) -> None:
    tiny.close()
    tiny.close()
    with pytest.raises(WeightAccessError, match=r"tiny\.gguf is closed"):
        find_tensors(tiny)


def test_an_unknown_layout_is_refused_before_a_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml = load_library().ggml
    check_tensor_layout(ggml)
    monkeypatch.setattr(llama_library, "GgmlTensor", ShiftedTensor)
    with pytest.raises(WeightAccessError, match="layout that persona-edge does not know; install"):
        check_tensor_layout(ggml)


@pytest.mark.parametrize("lookup", ["symbol", "graph"])
def test_a_tensor_that_disagrees_with_the_library_is_refused(
    tiny: LlamaModel, monkeypatch: pytest.MonkeyPatch, lookup: TensorLookup
) -> None:
    monkeypatch.setattr(llama_weights, "GgmlTensor", ShiftedTensor)
    monkeypatch.setattr(llama_lookup, "GgmlTensor", ShiftedTensor)
    with pytest.raises(WeightAccessError, match="install llama-cpp-python"):
        find_tensors(tiny, lookup=lookup)


def test_mapped_weights_are_refused_unless_they_were_made_writable(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editable = llama_weights._editable_params

    def mapped(api: SimpleNamespace, placement: Placement, *, n_gpu_layers: int) -> ctypes.Structure:
        assert placement.kind == "heap"
        return editable(api, Placement("mmap", ""), n_gpu_layers=n_gpu_layers)

    monkeypatch.setattr(llama_weights, "_editable_params", mapped)
    with pytest.raises(WeightAccessError, match="CPU_Mapped buffer, whose weights cannot be edited"):
        find_tensors(LlamaModel(tiny_path, weights="heap"))


def test_a_split_model_is_one_model(tiny_path: Path, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf", n_parts=2)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [p.name for p in parts] == ["tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"]
    whole, split = LlamaModel(tiny_path), LlamaModel(parts[0])
    assert weights_digest(find_tensors(split).values()) == weights_digest(find_tensors(whole).values())
    with pytest.raises(ModelFileError, match="is part 2 of a split model; give the path of part 1"):
        LlamaModel(parts[1])
    parts[1].unlink()
    with pytest.raises(ModelNotFoundError, match="tiny-00002-of-00002"):
        LlamaModel(parts[0])


def assert_one_line_error(kind: type[ModelError], path: Path, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        LlamaModel(path)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind


def test_no_such_file(tmp_path: Path) -> None:
    assert_one_line_error(ModelNotFoundError, tmp_path / "none.gguf", "no model file at .*none.gguf; check the path")


def test_a_folder(tmp_path: Path) -> None:
    assert_one_line_error(ModelFileError, tmp_path, "is a folder; give the path of a .gguf file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 a zip", "begins with b'PK"),
        (b"GGUF", "damaged or incomplete"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "damaged or incomplete"),
        (b"GGUF" + np.random.default_rng(1).bytes(4096), "damaged or incomplete"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "damaged or incomplete"),
    ],
    ids=["empty", "zip", "magic only", "absurd counts", "noise", "zeros"],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert_one_line_error(ModelFileError, path, message)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.999])
def test_truncated_files(tiny_path: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "short.gguf"
    whole = tiny_path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert_one_line_error(ModelFileError, path, "damaged or incomplete: .*; download it again")


def test_a_tensor_name_that_is_no_text(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "flipped.gguf"
    path.write_bytes(tiny_path.read_bytes().replace(b"blk.0.attn_q", b"blk.\xff.attn_q"))
    assert_one_line_error(ModelFileError, path, "a tensor's name is not UTF-8")


@pytest.mark.model
def test_a_truncated_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    shutil.copyfile(smollm2_path, path)
    with path.open("r+b") as file:
        file.truncate(60_000_000)
    assert_one_line_error(ModelFileError, path, "not within the file bounds")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "new.gguf", architecture="unheard-of")
    assert_one_line_error(UnsupportedModelError, path, "unknown model architecture: 'unheard-of'")


def test_the_library_says_nothing_on_stderr(tiny_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LlamaModel(tiny_path).close()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(ModelFileError):
        LlamaModel(bad)
    assert capfd.readouterr() == ("", "")
