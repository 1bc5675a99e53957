"""A pack goes next to the weights it belongs to, and nowhere else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from persona_edge.errors import ModelFileError, ModelMismatchError, OutputError, UnsupportedModelError
from persona_edge.exporters.to_gguf import check_gguf, export_gguf, pack_path, read_gguf, require_writable
from persona_edge.maskpack import MaskPack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, TensorShape
from persona_edge.modeling import TorchModel
from tests.tiny_models import load, save_folder, save_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny") / "original")


@pytest.fixture(scope="module")
def gguf_path(folder: Path) -> Path:
    return save_gguf(folder.with_name("tiny.gguf"), folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> TorchModel:
    return load(folder)


@pytest.fixture(scope="module")
def personas(model: TorchModel) -> PersonaSet:
    plane = Plane(0.0, {"blk.0.attn_q.weight": np.array([0, 5, 77], np.uint32)})
    return PersonaSet(model.identity(), (Pole("E", "EI", (plane,)),), {"E": ("E",)}, {"note": 1})


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_0", "Q4_0", "Q4_1"])
def test_every_quantization_of_the_same_weights_is_recognised(
    kind: str, folder: Path, personas: PersonaSet, tmp_path: Path
) -> None:
    path = save_gguf(tmp_path / "a.gguf", folder, quantization=gguf.GGMLQuantizationType[kind])
    result = check_gguf(path, personas)
    assert result.n_samples == 64 * len(personas.identity.tensors)
    assert result.agreement == 1


def test_the_pack_lies_next_to_the_weights(gguf_path: Path, folder: Path, personas: PersonaSet, tmp_path: Path) -> None:
    summary = export_gguf(gguf_path, personas, set_name="mbti")
    path = gguf_path.with_name("tiny.mbti.maskpack")
    assert path == pack_path(gguf_path, "mbti")
    assert summary.n_bytes == path.stat().st_size
    assert MaskPack.open(path).load().report == {"note": 1}
    assert pack_path(folder, "mbti") == folder / "original.mbti.maskpack"
    export_gguf(gguf_path, personas, set_name="mbti", output=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").read_bytes() == path.read_bytes()


def test_a_folder_of_original_weights_gets_its_pack_inside(folder: Path, personas: PersonaSet) -> None:
    export_gguf(folder, personas, set_name="mbti")
    assert MaskPack.open(folder / "original.mbti.maskpack").personas == {"E": ("E",)}


def test_other_weights_of_the_same_shapes_are_refused_and_nothing_is_written(
    personas: PersonaSet, tmp_path: Path
) -> None:
    path = save_gguf(tmp_path / "other.gguf", save_folder(tmp_path / "other", seed=1))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelMismatchError, match="other weights"):
        export_gguf(path, personas, set_name="mbti")
    assert sorted(tmp_path.iterdir()) == before


def test_rows_in_another_order_are_other_weights(model: TorchModel, gguf_path: Path, personas: PersonaSet) -> None:
    # The sketch of a mask whose maker forgot llama's permutation.
    forgetful = replace(model, layers=tuple(replace(layer, row_order=None) for layer in model.layers))
    with pytest.raises(ModelMismatchError, match="other weights"):
        check_gguf(gguf_path, replace(personas, identity=forgetful.identity()))


def changed(identity: ModelIdentity, **first: object) -> ModelIdentity:
    tensor = replace(identity.tensors[0], **first)  # type: ignore[arg-type]
    return replace(identity, tensors=(tensor, *identity.tensors[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: replace(i, architecture="qwen2"), "architecture qwen2, this model is llama"),
        (lambda i: changed(i, name="blk.9.attn_q.weight"), r"blk\.9\.attn_q\.weight is missing"),
        (lambda i: changed(i, n_rows=65), "65 x 64 weights"),
    ],
    ids=["architecture", "tensor", "shape"],
)
def test_another_model_is_named_by_its_first_difference(
    change: object, message: str, gguf_path: Path, personas: PersonaSet
) -> None:
    assert callable(change)
    with pytest.raises(ModelMismatchError, match=message):
        check_gguf(gguf_path, replace(personas, identity=change(personas.identity)))


def test_shapes_and_weights_are_those_of_the_model(gguf_path: Path, model: TorchModel) -> None:
    file = read_gguf(gguf_path)
    assert file.architecture == "llama"
    assert {layer.shape for layer in model.layers} < set(file.shapes())
    assert TensorShape("token_embd.weight", 360, 64) in file.shapes()
    positions = np.array([0, 63, 64, 70, 2047], np.uint32)
    for layer in model.layers:
        expected = layer.weights().ravel()[positions]
        np.testing.assert_array_equal(file.read_weights(layer.name, positions), expected)


@pytest.mark.parametrize("n_bytes", [0, 10, 3000, -1000])
def test_a_damaged_file_is_a_one_line_error_and_gets_no_pack(
    n_bytes: int, gguf_path: Path, personas: PersonaSet, tmp_path: Path
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_path.read_bytes()[:n_bytes])
    with pytest.raises(ModelFileError, match="download it again") as caught:
        export_gguf(path, personas, set_name="mbti")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_gets_no_pack(personas: PersonaSet, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        export_gguf(tmp_path / "none.gguf", personas, set_name="mbti")
    assert not list(tmp_path.iterdir())


def test_a_quantization_that_cannot_be_read_is_named(gguf_path: Path, personas: PersonaSet) -> None:
    file = read_gguf(gguf_path)
    tensor = file.tensors["blk.0.ffn_up.weight"]._replace(tensor_type=gguf.GGMLQuantizationType.Q8_K)
    odd = replace(file, tensors={**file.tensors, "blk.0.ffn_up.weight": tensor})
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ffn_up\.weight is stored as Q8_K"):
        odd.read_weights("blk.0.ffn_up.weight", np.array([0], np.uint32))


def test_a_target_is_tried_before_the_work_and_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.maskpack"
    target.write_bytes(b"an earlier pack")
    require_writable(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.maskpack"]
    assert target.read_bytes() == b"an earlier pack"
    missing = tmp_path / "none" / "a.maskpack"
    with pytest.raises(OutputError, match=rf"cannot write {missing}: .*Create the folder"):
        require_writable(missing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(gguf_path: Path, personas: PersonaSet, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="may write to"):
        require_writable(tmp_path / "a.maskpack")
    with pytest.raises(OutputError, match="nothing was written"):
        export_gguf(gguf_path, personas, set_name="mbti", output=tmp_path / "a.maskpack")
