"""How far an edit lands from what its gates asked for: quantized weights cannot take every value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_edge.runtime import numpy_kernels
from persona_edge.runtime.dequantize import dequantize
from persona_edge.runtime.layouts import Units, WeightLayout

__all__ = ["Residue", "residue", "root_mean_square"]

_RMS_CHUNK = 1 << 20  # weights


@dataclass(frozen=True)
class Residue:
    """|w' - gate * w| over the weights that an edit touches, divided by the RMS of the tensor's weights."""

    worst: float
    mean: float


def residue(units: Units, gates: NDArray[np.float32]) -> Residue:
    """How near to `gate * w` the weights would be, were `gates` (n,) applied to `units`. Pure.

    Only the blocks concerned are copied; one pass over the tensor finds its RMS.
    """
    if len(units.positions) == 0:
        return Residue(0.0, 0.0)
    layout, per_block, width = units.layout, units.map.units_per_block, units.granularity
    block, unit = np.divmod(units.positions.astype(np.int64), per_block)
    blocks, at = np.unique(block, return_inverse=True)
    scratch = units.data.reshape(-1, units.map.block_bytes)[blocks].ravel()
    copy = Units(layout, width, scratch, (at * per_block + unit).astype(np.uint32))
    weights = (copy.positions[:, None].astype(np.int64) * width + np.arange(width)).ravel()
    wanted = dequantize(scratch, layout.ggml_type, weights) * np.repeat(gates.astype(np.float64), width)
    numpy_kernels.scatter(copy, numpy_kernels.scale(copy, numpy_kernels.gather(copy), gates))
    scale = root_mean_square(units.data, layout) or 1.0
    error = np.abs(dequantize(scratch, layout.ggml_type, weights) - wanted) / scale
    return Residue(float(error.max()), float(error.mean()))


def root_mean_square(data: NDArray[np.uint8], layout: WeightLayout) -> float:
    """The RMS of all weights of a tensor."""
    n_weights = data.size // layout.block_bytes * layout.block_weights
    total = 0.0
    for start in range(0, n_weights, _RMS_CHUNK):
        chunk = dequantize(data, layout.ggml_type, np.arange(start, min(start + _RMS_CHUNK, n_weights)))
        total += float(np.square(chunk, dtype=np.float64).sum())
    return float(np.sqrt(total / n_weights)) if n_weights else 0.0
