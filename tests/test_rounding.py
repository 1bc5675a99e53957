"""How strength is rounded where scales are coarse: the table in docs/runtime.md is what GGML's own weights show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.masks import Granularity
from persona_edge.runtime import numpy_kernels
from persona_edge.runtime.dequantize import dequantize_rows
from persona_edge.runtime.layouts import LAYOUTS, Units, WeightLayout
from tests.ggml_quantizer import quantized

PAGE = Path(__file__).parents[1] / "docs" / "runtime.md"
N_ROWS, N_COLUMNS = 64, 2048
QUANTIZED = [layout for layout in LAYOUTS.values() if layout.codes is not None]


def gaussian_weights() -> NDArray[np.float32]:
    """Normal weights whose groups differ in size by some 30 %."""
    rng = np.random.default_rng(0)
    sizes = 0.02 * np.exp(rng.normal(0, 0.3, (N_ROWS, N_COLUMNS // 32))).repeat(32, 1)
    return (rng.standard_normal((N_ROWS, N_COLUMNS)) * sizes).astype(np.float32)


def error(layout: WeightLayout, gate: float, granularity: Granularity = 32) -> float:
    """RMS of w' - gate * w over the RMS of gate * w (of w for gate 0) when all units take the gate, in percent."""
    weights = gaussian_weights()
    if layout.name == "NVFP4":  # such models have a scale per tensor, which brings the largest group's to 448
        weights *= 448 * 6 / np.abs(weights).max()
    data = quantized(weights, layout.ggml_type, N_ROWS * layout.n_bytes(N_COLUMNS))
    before = dequantize_rows(data, layout.ggml_type, N_COLUMNS).astype(np.float64)
    units = Units(layout, granularity, data, np.arange(weights.size // granularity, dtype=np.uint32))
    gates = np.full(len(units.positions), gate, np.float32)
    numpy_kernels.scatter(units, numpy_kernels.scale(units, numpy_kernels.gather(units), gates))
    after = dequantize_rows(data, layout.ggml_type, N_COLUMNS)
    wanted = before * np.float32(gate)
    reference = wanted if gate else before
    return float(100 * np.sqrt(np.square(after - wanted).mean() / np.square(reference).mean()))


def documented() -> dict[str, dict[str, float]]:
    """The page's table: type, then column, then percent."""
    lines = re.findall(r"^\|(.*)\|$", PAGE.read_text(encoding="utf-8").split("<!-- rounding -->")[1], re.MULTILINE)
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    return {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}


@pytest.mark.parametrize("layout", QUANTIZED, ids=lambda layout: layout.name)
def test_the_table_of_rounding_errors_holds(layout: WeightLayout) -> None:
    for column, percent in documented()[layout.name].items():
        measured = error(layout, 0.0, 1) if column == "weight 0" else error(layout, float(column))
        assert measured == pytest.approx(percent, rel=0.1, abs=0.1), column


@pytest.mark.parametrize("layout", QUANTIZED, ids=lambda layout: layout.name)
def test_a_group_of_real_weights_becomes_exactly_zero(layout: WeightLayout) -> None:
    assert error(layout, 0.0) == 0
