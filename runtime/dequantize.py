"""From quantized bytes to float32 values: bit for bit what GGML's reference dequantization gives.

For reading samples (the sign sketch) and for tests; it is not a fast path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from persona_edge.masks import GROUP_SIZE
from persona_edge.runtime.layouts import CodeFormat, WeightLayout, layout_of
from persona_edge.runtime.number_formats import F16

__all__ = ["CodeTerms", "code_terms", "code_values", "dequantize", "dequantize_rows"]


@dataclass(frozen=True)
class CodeTerms:
    """What the weights' codes are measured in: weight = scale * value(code) + minimum. Each (n,)."""

    scale: NDArray[np.floating]
    minimum: NDArray[np.floating]


def dequantize(data: NDArray[np.uint8], ggml_type: int, positions: NDArray[np.integer]) -> NDArray[np.float32]:
    """The weights at flat `positions` (row * n_columns + column), any order: (n,) float32.

    `data` is the tensor's memory, flat uint8. Raises UnsupportedModelError for a type without a layout.
    """
    layout = layout_of(ggml_type)
    fields = layout.weight.read(data, positions)
    if layout.codes is None:
        return layout.numbers.to_float32(fields)[:, 0]
    terms = code_terms(layout, data, positions, np.float32)
    with np.errstate(all="ignore"):
        values = terms.scale * code_values(layout.codes, fields[:, 0])
        return (values if layout.codes.min_sign == 0 else values + terms.minimum).astype(np.float32)


def dequantize_rows(
    data: NDArray[np.uint8], ggml_type: int, n_columns: int, rows: NDArray[np.integer] | None = None
) -> NDArray[np.float32]:
    """Whole rows, all of them unless `rows` (n,) are given: (n, n_columns) float32."""
    if rows is None:
        layout = layout_of(ggml_type)
        rows = np.arange(data.size // layout.n_bytes(n_columns))
    positions = rows.astype(np.int64)[:, None] * n_columns + np.arange(n_columns)
    return dequantize(data, ggml_type, positions.ravel()).reshape(len(rows), n_columns)


def code_values(codes: CodeFormat, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The number that each raw code (n,) stands for, before scale and minimum."""
    if codes.codebook:
        return np.array(codes.codebook, np.float32)[raw]
    return codes.numbers.to_float32(raw[:, None])[:, 0]


def code_terms(
    layout: WeightLayout, data: NDArray[np.uint8], positions: NDArray[np.integer], dtype: DTypeLike
) -> CodeTerms:
    """Scale and signed minimum of the weights at `positions`, as they are in `data` now, computed in `dtype`.

    In float64 every product is exact; in float32 it rounds as GGML does. Only for layouts with codes.
    """
    codes = layout.codes
    assert codes is not None
    flat = positions.astype(np.int64)
    block = flat // layout.block_weights * layout.block_bytes
    if codes.n_scales == 0:
        return CodeTerms(
            _times_super(np.ones(len(flat), dtype), data, block, codes.super_scale), np.zeros(len(flat), dtype)
        )
    numbers = layout.numbers.to_float32(layout.group.read(data, flat // GROUP_SIZE))
    with np.errstate(invalid="ignore"):  # a signalling NaN
        group = numbers.astype(dtype)
    sub = flat % GROUP_SIZE * codes.n_scales // GROUP_SIZE
    each = np.arange(len(flat))
    scale = _times_super(group[each, sub], data, block, codes.super_scale)
    if codes.min_sign == 0:
        return CodeTerms(scale, np.zeros(len(flat), dtype))
    minimum = _times_super(group[each, codes.n_scales + sub], data, block, codes.super_min)
    return CodeTerms(scale, minimum if codes.min_sign > 0 else -minimum)


def _times_super(
    values: NDArray[np.floating], data: NDArray[np.uint8], block: NDArray[np.int64], byte: int
) -> NDArray[np.floating]:
    if byte < 0:
        return values
    with np.errstate(all="ignore"):
        factor = F16.to_float32(data[(block + byte)[:, None] + np.arange(2)])[:, 0].astype(values.dtype)
        product: NDArray[np.floating] = factor * values
    return product
