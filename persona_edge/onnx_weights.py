"""What the numbers in an ONNX matrix mean: dequantizing them, and comparing them with a pack's sign sketch.

A MatMulNBits weight is `scale * (code - zero)`; the zero is `2 ** (bits - 1)` unless the matrix brings zero points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.masks import ModelIdentity
from persona_edge.onnx_model import OnnxMatrix, OnnxModel, OnnxWeight
from persona_edge.sketch import SketchResult, check_identity

__all__ = ["check_onnx", "codes_at", "dequantize_matrix", "dequantize_weight", "weights_at", "zeros_of"]


def check_onnx(identity: ModelIdentity, model: OnnxModel) -> SketchResult:
    """Compare a pack's identity with the model: architecture, shapes, signs. ModelMismatchError when they differ."""
    return check_identity(
        identity, model.architecture, model.shapes(), lambda name, at: weights_at(model.weights[name], at)
    )


def weights_at(weight: OnnxWeight, positions: NDArray[np.integer]) -> NDArray[np.float32]:
    """The weights at flat GGUF `positions` (row * n_columns + column), any order: (n,) float32."""
    matrix = weight.matrix
    row, column = np.divmod(positions.astype(np.int64), matrix.n_columns)
    row = weight.rows[row]
    if matrix.scales is None:
        return np.asarray(matrix.codes.read()[column, row], np.float32)
    block = column // matrix.block_size
    scales = matrix.scales.read().reshape(matrix.n_rows, -1)[row, block].astype(np.float32)
    zeros = zeros_of(matrix)
    zero = zeros if isinstance(zeros, int) else zeros[row, block]
    values: NDArray[np.float32] = scales * (codes_at(matrix, row, column).astype(np.float32) - zero)
    return values


def codes_at(matrix: OnnxMatrix, row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The codes of single weights of a quantized matrix, in its own rows: (n,) uint8."""
    packed = matrix.codes.read().reshape(matrix.n_rows, -1)
    per_byte = 8 // matrix.bits
    shift = ((column % per_byte) * matrix.bits).astype(np.uint8)
    codes: NDArray[np.uint8] = (packed[row, column // per_byte] >> shift) & np.uint8(2**matrix.bits - 1)
    return codes


def zeros_of(matrix: OnnxMatrix) -> int | NDArray[np.float32]:
    """The code that stands for zero: one number for the matrix, or one per block, (n_rows, blocks) float32."""
    if matrix.zero_points is None:
        return int(2 ** (matrix.bits - 1))
    stored: NDArray[Any] = matrix.zero_points.read().reshape(matrix.n_rows, -1)
    if stored.dtype != np.uint8:
        return stored.astype(np.float32)
    per_byte = 8 // matrix.bits
    shifts = np.arange(per_byte, dtype=np.uint8) * matrix.bits
    codes = (stored[:, :, None] >> shifts) & np.uint8(2**matrix.bits - 1)
    return codes.reshape(matrix.n_rows, -1)[:, : matrix.blocks_per_row].astype(np.float32)


def dequantize_matrix(matrix: OnnxMatrix) -> NDArray[np.float32]:
    """All weights in the matrix's own row order: (n_rows, n_columns) float32."""
    if matrix.scales is None:
        return np.ascontiguousarray(matrix.codes.read().T, np.float32)
    rows, columns = np.indices((matrix.n_rows, matrix.n_columns))
    codes = codes_at(matrix, rows, columns).astype(np.float32).reshape(matrix.n_rows, -1, matrix.block_size)
    zeros = zeros_of(matrix)
    zero = zeros if isinstance(zeros, int) else zeros[:, :, None]
    scales = matrix.scales.read().reshape(matrix.n_rows, -1, 1).astype(np.float32)
    return np.asarray((scales * (codes - zero)).reshape(matrix.n_rows, -1))


def dequantize_weight(weight: OnnxWeight) -> NDArray[np.float32]:
    """All weights of one tensor in GGUF row order: (n_rows, n_columns) float32."""
    return dequantize_matrix(weight.matrix)[weight.rows]
