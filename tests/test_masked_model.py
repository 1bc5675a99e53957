"""Gates act on the rows and groups that they name, multiply, and leave no bit behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona_edge.masked_model import masked
from persona_edge.masks import Granularity, Plane
from persona_edge.modeling import TorchModel, load_torch_model
from tests.tiny_models import load, save_folder

QUERY = "blk.0.attn_q.weight"  # permuted
DOWN = "blk.1.ffn_down.weight"  # not permuted, three groups per row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder: Path) -> Iterator[TorchModel]:
    """A model whose every weight must be as before when the test is over, bit for bit."""
    model = load(folder)
    before = bits(model)
    yield model
    assert bits(model) == before


def bits(model: TorchModel) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in model.model.state_dict().items()}


def plane(gate: float, positions: Sequence[int], *, name: str = DOWN, granularity: Granularity = 32) -> Plane:
    return Plane(gate, {name: np.array(positions, np.uint32)}, granularity)


def weights(model: TorchModel, name: str = DOWN) -> NDArray[np.float32]:
    return model.layer(name).weights().copy()


def test_the_named_group_of_the_gguf_row_is_zeroed(model: TorchModel) -> None:
    for name, n_groups in ((QUERY, 2), (DOWN, 3)):
        expected = weights(model, name)
        expected[5, 32:64] = 0
        with masked(model, [plane(0.0, [5 * n_groups + 1], name=name)]):
            np.testing.assert_array_equal(weights(model, name), expected)


def test_a_masked_gguf_row_is_another_row_of_the_module(model: TorchModel) -> None:
    # GGUF row 1 of a head of 16 is the module's row 8: the first row of the head's second half.
    with masked(model, [plane(0.0, [2, 3], name=QUERY)]):
        rows = model.layer(QUERY).module.weight.detach()
        assert [row for row in range(64) if not rows[row].any()] == [8]


def test_a_suppressed_weight_is_a_positive_zero(model: TorchModel) -> None:
    layer = model.layer(DOWN)
    with masked(model, [plane(0.0, range(192))]):
        assert not torch.signbit(layer.module.weight).any()


@pytest.mark.parametrize("granularity", [32, 1])
def test_gates_multiply_at_either_granularity(model: TorchModel, granularity: Granularity) -> None:
    expected = weights(model).reshape(-1, granularity)
    expected[[3, 70]] *= np.float32(1.5)
    with masked(model, [plane(1.5, [3, 70], granularity=granularity)]):
        np.testing.assert_array_equal(weights(model).reshape(-1, granularity), expected)


@pytest.mark.parametrize(
    ("gate", "strength", "factor"), [(0.0, 0.25, 0.75), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (2.0, 0.5, 1.5), (-1, 1, -1)]
)
def test_strength_goes_from_one_to_the_gate(model: TorchModel, gate: float, strength: float, factor: float) -> None:
    expected = weights(model).reshape(-1, 32)
    expected[7] *= np.float32(factor)
    with masked(model, [plane(gate, [7])], strength=strength):
        np.testing.assert_array_equal(weights(model).reshape(-1, 32), expected)


def test_overlapping_planes_multiply_also_across_granularities(model: TorchModel) -> None:
    expected = weights(model).reshape(-1)
    expected[32:96] *= np.float32(0.5)
    expected[64:96] *= np.float32(3.0)
    expected[70] *= np.float32(0.25)
    planes = [plane(0.5, [1, 2]), plane(3.0, [2]), plane(0.25, [70], granularity=1)]
    for order in (planes, planes[::-1]):
        with masked(model, order):
            np.testing.assert_allclose(weights(model).reshape(-1), expected, rtol=1e-6)


def test_masks_nest(model: TorchModel) -> None:
    with masked(model, [plane(0.5, [4])]):
        outer = weights(model)
        with masked(model, [plane(0.0, [4, 5])]):
            assert not weights(model).reshape(-1, 32)[[4, 5]].any()
        np.testing.assert_array_equal(weights(model), outer)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_inside_restores_every_bit(model: TorchModel, error: type[BaseException]) -> None:
    with pytest.raises(error), masked(model, [plane(0.3, range(192)), plane(0.0, range(10, 20), name=QUERY)]):
        raise error


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (plane(0.0, [192]), IndexError),
        (plane(0.0, [128], name=QUERY), IndexError),
        (plane(0.0, [0], name="x"), KeyError),
    ],
    ids=["beyond the end", "beyond the end of a permuted tensor", "no such tensor"],
)
def test_a_mask_of_another_shape_changes_nothing(model: TorchModel, bad: Plane, error: type[Exception]) -> None:
    before = bits(model)
    with pytest.raises(error), masked(model, [plane(0.5, [1]), bad]):
        pytest.fail("the mask was applied")
    assert bits(model) == before


def test_no_planes_are_no_mask(model: TorchModel) -> None:
    before = bits(model)
    with masked(model, []):
        assert bits(model) == before


def test_bfloat16_weights_come_back_too(folder: Path) -> None:
    model = load_torch_model(folder, name="tiny", device="cpu", dtype="bfloat16")
    before = bits(model)
    with masked(model, [plane(0.3, range(192)), plane(1.7, range(96))]):
        assert bits(model) != before
    assert bits(model) == before
