"""The sign sketch: every quantization of a model passes, every other model fails and is told why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.errors import ModelMismatchError
from persona_edge.masks import ModelIdentity, SignSample, TensorShape
from persona_edge.sketch import check_identity, check_sketch, sample_signs

Weights = dict[str, NDArray[np.float32]]


def random_weights(seed: int, n_tensors: int = 4) -> Weights:
    rng = np.random.default_rng(seed)
    return {f"blk.{i}.ffn_up.weight": rng.normal(size=(96, 64)).astype(np.float32) for i in range(n_tensors)}


def identity_of(weights: Weights) -> ModelIdentity:
    shapes = tuple(TensorShape(name, *w.shape) for name, w in weights.items())
    return ModelIdentity("llama", shapes, {name: sample_signs(w) for name, w in weights.items()})


def reader(weights: Weights) -> Callable[[str, NDArray[np.uint32]], NDArray[np.float32]]:
    return lambda name, positions: weights[name].ravel()[positions]


@pytest.mark.parametrize(
    "shape", [(576, 96), (64, 64), (100, 32), (65, 1), (16, 64), (3, 1000), (1, 64), (1, 5), (7, 3)]
)
def test_samples_are_large_distinct_and_spread(shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sample = sample_signs(weights)
    n = min(64, weights.size)
    assert len(sample.positions) == n
    assert sample.positions.dtype == np.uint32
    assert np.all(np.diff(sample.positions.astype(np.int64)) > 0)
    assert np.array_equal(sample.negative, weights.ravel()[sample.positions] < 0)
    per_row = np.bincount(sample.positions // shape[1], minlength=shape[0])
    assert per_row.max() <= -(-64 // min(64, shape[0]))
    assert np.count_nonzero(per_row) == min(64, shape[0], n)


def test_takes_the_largest_weight_of_a_row() -> None:
    weights = np.full((64, 10), 0.1, dtype=np.float32)
    columns = np.arange(64) * 7 % 10
    weights[np.arange(64), columns] = np.where(np.arange(64) % 3 == 0, -1.0, 1.0)
    sample = sample_signs(weights)
    assert np.array_equal(sample.positions % 10, columns)
    assert np.array_equal(sample.negative, np.arange(64) % 3 == 0)


def test_never_samples_what_has_no_sign() -> None:
    weights = np.zeros((64, 8), dtype=np.float32)
    weights[5, 2], weights[6, 3] = np.nan, -1.0
    sample = sample_signs(weights)
    assert sample.positions.tolist() == [6 * 8 + 3]
    assert sample.negative.tolist() == [True]
    assert len(sample_signs(np.zeros((64, 8), dtype=np.float32)).positions) == 0


def test_the_same_weights_pass() -> None:
    weights = random_weights(0)
    result = check_sketch(identity_of(weights), reader(weights))
    assert (result.n_samples, result.n_agreeing, result.agreement) == (256, 256, 1.0)


def test_other_weights_of_the_same_shapes_fail_near_one_half() -> None:
    with pytest.raises(ModelMismatchError, match=r"only (4\d|5\d)\.\d% of 256 sampled weights have the sign") as caught:
        check_sketch(identity_of(random_weights(0)), reader(random_weights(1)))
    assert "\n" not in str(caught.value)
    assert "export one for this model" in str(caught.value)


def test_one_foreign_tensor_among_many_fails_although_the_whole_agrees() -> None:
    weights = random_weights(0, n_tensors=40)
    identity = identity_of(weights)
    weights["blk.7.ffn_up.weight"] = random_weights(1, n_tensors=1)["blk.0.ffn_up.weight"]
    with pytest.raises(ModelMismatchError, match=r"in blk\.7\.ffn_up\.weight only \d\d\.\d% of 64"):
        check_sketch(identity, reader(weights))


@pytest.mark.parametrize(("n_flipped", "passes"), [(5, True), (6, False)])
def test_the_overall_limit(n_flipped: int, passes: bool) -> None:
    weights = random_weights(0)
    identity = identity_of(weights)
    for i in range(n_flipped):  # spread over the tensors, so that the limit per tensor plays no part
        name = f"blk.{i % 4}.ffn_up.weight"
        weights[name].ravel()[identity.sketch[name].positions[i]] *= -1
    if passes:
        assert check_sketch(identity, reader(weights)).n_agreeing == 256 - n_flipped
    else:
        with pytest.raises(ModelMismatchError, match=r"only 97\.7%"):
            check_sketch(identity, reader(weights))


def test_a_zero_disagrees() -> None:
    weights = random_weights(0)
    zeros = {name: np.zeros_like(w) for name, w in weights.items()}
    with pytest.raises(ModelMismatchError, match=r"only 0\.0% of 256"):
        check_sketch(identity_of(weights), reader(zeros))


def test_a_pack_without_samples_matches_nothing() -> None:
    with pytest.raises(ModelMismatchError, match="no sign sketch"):
        check_sketch(ModelIdentity("llama", (TensorShape("a", 1, 1),), {}), reader({}))
    empty = SignSample(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.bool_))
    with pytest.raises(ModelMismatchError, match="no sign sketch"):
        check_sketch(
            ModelIdentity("llama", (TensorShape("a", 1, 1),), {"a": empty}),
            reader({"a": np.zeros((1, 1), dtype=np.float32)}),
        )


def test_names_the_first_difference() -> None:
    weights = random_weights(0)
    identity = identity_of(weights)
    tensors = identity.tensors
    extra = TensorShape("output.weight", 8, 8)
    assert check_identity(identity, "llama", [*tensors, extra], reader(weights)).agreement == 1
    with pytest.raises(ModelMismatchError, match="for the architecture llama, this model is qwen2; use the pack with"):
        check_identity(identity, "qwen2", tensors, reader(weights))
    with pytest.raises(ModelMismatchError, match=r"blk\.0\.ffn_up\.weight is missing here"):
        check_identity(identity, "llama", tensors[1:], reader(weights))
    turned = [TensorShape(tensors[0].name, 64, 96), *tensors[1:]]
    with pytest.raises(ModelMismatchError, match="has 96 x 64 weights there and 64 x 96 here"):
        check_identity(identity, "llama", turned, reader(weights))


@pytest.mark.model
def test_every_quantization_of_the_real_model_agrees_and_other_weights_do_not(smollm2_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kinds = gguf.GGMLQuantizationType
    blocks = [t for t in gguf.GGUFReader(smollm2_path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    weights: Weights = {}
    for tensor in blocks[::6]:  # 6 and the 7 tensors of a block have no common factor: every kind is there
        weights[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    identity = identity_of(weights)
    assert len({name.split(".", 2)[2] for name in weights}) == 7
    for kind in (kinds.Q4_0, kinds.Q4_1, kinds.Q5_0, kinds.Q5_1, kinds.Q8_0, kinds.BF16):
        requantized = {n: gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind) for n, w in weights.items()}
        assert check_sketch(identity, reader(requantized)).agreement == 1.0
    rng = np.random.default_rng(0)
    shuffled = {name: w[:, rng.permutation(w.shape[1])] for name, w in weights.items()}
    with pytest.raises(ModelMismatchError, match=r"only (4[89]|5[012])\.\d% of 2,240"):
        check_sketch(identity, reader(shuffled))
