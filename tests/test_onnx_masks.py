"""Masked initializers, compared with gates multiplied onto the dequantized weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.errors import ModelMismatchError, UnsupportedModelError
from persona_edge.masks import Granularity, Plane, Pole
from persona_edge.onnx_model import OnnxMatrix, OnnxWeight, StoredTensor
from persona_edge.onnx_weights import dequantize_weight
from persona_edge.runtime.onnx_masks import check_program, gated_blocks, gates_scales_only, masked_initializers
from persona_edge.runtime.programs import PersonaProgram, compile_program

ROWS, COLUMNS = 6, 96


def _inline(name: str, values: NDArray[np.generic]) -> StoredTensor:
    return StoredTensor(name, values.dtype.str, values.shape, inline=np.ascontiguousarray(values).tobytes())


def _quantized(*, bits: int = 4, block_size: int = 32, zero_points: bool = False) -> OnnxWeight:
    random = np.random.default_rng(bits + block_size)
    blocks = COLUMNS // block_size
    codes = random.integers(0, 256, (ROWS, blocks, block_size * bits // 8), dtype=np.uint8)
    scales = random.standard_normal((ROWS, blocks)).astype(np.float32)
    zeros = random.integers(0, 256, (ROWS, -(-blocks * bits // 8)), dtype=np.uint8)
    matrix = OnnxMatrix(
        "w", ROWS, COLUMNS, _inline("codes", codes), _inline("scales", scales),
        _inline("zeros", zeros) if zero_points else None, bits, block_size, 4,
    )  # fmt: skip
    return OnnxWeight("blk.0.ffn_up.weight", matrix, np.array([0, 3, 1, 4, 2, 5]))


def _float() -> OnnxWeight:
    values = np.random.default_rng(1).standard_normal((COLUMNS, ROWS)).astype(np.float32)
    return OnnxWeight(
        "blk.0.ffn_up.weight", OnnxMatrix("w", ROWS, COLUMNS, _inline("w", values)), np.arange(ROWS)[::-1]
    )


def _program(gate: float, granularity: Granularity, positions: list[int]) -> PersonaProgram:
    plane = Plane(gate, {"blk.0.ffn_up.weight": np.array(positions, np.uint32)}, granularity)
    return compile_program([Pole("p", "a", (plane,))])


def _masked(weight: OnnxWeight, program: PersonaProgram) -> NDArray[np.float32]:
    changed = masked_initializers(program, {weight.name: weight})
    matrix = weight.matrix

    def after(stored: StoredTensor) -> StoredTensor:
        return _inline(stored.name, changed.get(stored.name, stored.read()))

    scales = None if matrix.scales is None else after(matrix.scales)
    return dequantize_weight(replace(weight, matrix=replace(matrix, codes=after(matrix.codes), scales=scales)))


@pytest.mark.parametrize("gate", [0.0, 0.5, 1.5, -1.0])
@pytest.mark.parametrize(
    "weight",
    [_quantized(), _quantized(block_size=16), _quantized(bits=8), _quantized(zero_points=True), _float()],
    ids=["int4", "block 16", "int8", "zero points", "float"],
)
def test_gated_groups_are_multiplied_and_all_others_kept(weight: OnnxWeight, gate: float) -> None:
    base, positions = dequantize_weight(weight), [0, 4, 5, 17]
    expected = base.reshape(-1, 32).copy()
    expected[positions] *= gate
    found = _masked(weight, _program(gate, 32, positions))
    assert np.allclose(found, expected.reshape(base.shape), rtol=1e-6, atol=0)
    if gate == 0:
        assert (found.reshape(-1, 32)[positions] == 0).all()


@pytest.mark.parametrize("weight", [_quantized(), _quantized(bits=8)], ids=["int4", "int8"])
@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_single_weights_take_the_nearest_code(weight: OnnxWeight, gate: float) -> None:
    base, positions = dequantize_weight(weight), [0, 1, 7, 100, 101, 575]
    found = _masked(weight, _program(gate, 1, positions)).ravel()
    assert weight.matrix.scales is not None
    scale = np.abs(weight.matrix.scales.read())[weight.rows].repeat(32, -1).ravel()
    kept = np.setdiff1d(np.arange(base.size), positions)
    assert np.array_equal(found[kept], base.ravel()[kept])
    error = np.abs(found[positions] - gate * base.ravel()[positions])
    assert (error <= scale[positions] * (0 if gate == 0 else 0.501)).all()


def test_gates_scales_only_tells_groups_of_quantized_matrices() -> None:
    weights, floats = {"blk.0.ffn_up.weight": _quantized()}, {"blk.0.ffn_up.weight": _float()}
    assert gates_scales_only(_program(0, 32, [1]), weights)
    assert not gates_scales_only(_program(0, 1, [1]), weights)
    assert not gates_scales_only(_program(0, 32, [1]), floats)


def test_gated_blocks_are_ascending_in_the_matrix_s_rows() -> None:
    weight = _quantized()
    (found,) = gated_blocks(_program(0.5, 32, [3, 7]), {weight.name: weight})  # rows 1 and 2 are the matrix's 3 and 1
    assert found.blocks.tolist() == [4, 9]
    assert np.array_equal(found.masked_scales(), found.base_scales() * np.float32(0.5))


def test_what_cannot_be_applied_is_refused() -> None:
    weight, program = _quantized(), _program(0, 32, [1])
    wide = replace(weight, matrix=replace(weight.matrix, block_size=96))
    with pytest.raises(ModelMismatchError, match="no weight"):
        check_program(program, {})
    with pytest.raises(ModelMismatchError, match="the model has 18"):
        check_program(_program(0, 32, [18]), {weight.name: weight})
    with pytest.raises(UnsupportedModelError, match="blocks of 96"):
        check_program(program, {weight.name: wide})
    with pytest.raises(UnsupportedModelError, match="2-bit"):
        check_program(_program(0, 1, [1]), {weight.name: replace(weight, matrix=replace(weight.matrix, bits=2))})
