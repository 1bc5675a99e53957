"""Layouts against gguf-py: dequantization bit for bit, exact zeros, and edits that touch nothing but their own unit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.errors import UnsupportedModelError
from persona_edge.masks import Granularity
from persona_edge.runtime import numpy_kernels
from persona_edge.runtime.dequantize import dequantize, dequantize_rows
from persona_edge.runtime.layouts import LAYOUTS, Units, WeightLayout, layout_of, type_name
from persona_edge.runtime.number_formats import F16, UE4M3
from persona_edge.runtime.residue import residue

N_ROWS, N_COLUMNS = 6, 512
QUANTIZED = [layout for layout in LAYOUTS.values() if layout.codes is not None]
GRANULARITIES: tuple[Granularity, ...] = (1, 32)
BY_SCALE = [layout for layout in LAYOUTS.values() if not layout.has_group_codes]

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def random_bytes(layout: WeightLayout, seed: int = 0) -> NDArray[np.uint8]:
    """Memory in which anything may stand: NaN and infinite scales too."""
    return np.random.default_rng(seed).integers(0, 256, N_ROWS * layout.n_bytes(N_COLUMNS), dtype=np.uint8)


def finite_bytes(layout: WeightLayout, seed: int = 0) -> NDArray[np.uint8]:
    """Random memory whose fp16 numbers are all finite: every fp16 scale of a type gets an ordinary value."""
    data = random_bytes(layout, seed)
    if layout.codes is None:
        values = np.random.default_rng(seed).standard_normal(N_ROWS * N_COLUMNS).astype(np.float32)
        units = Units(layout, 1, data, np.arange(values.size, dtype=np.uint32))
        bits = values.view(np.uint32) >> (16 if layout.name == "BF16" else 0)
        raw = values.astype("<f2").view("<u2") if layout.name == "F16" else bits
        numpy_kernels.scatter(units, raw.astype(f"<u{layout.block_bytes}").view(np.uint8).reshape(values.size, -1))
        return data
    blocks = data.reshape(-1, layout.block_bytes)
    starts = {layout.codes.super_scale, layout.codes.super_min} - {-1}
    if not starts and layout.numbers is F16:
        starts = set(range(0, layout.group.n_field_bytes, 2))
    if layout.name == "MXFP4":
        blocks[:, 0] = np.random.default_rng(seed).integers(110, 130, len(blocks))
    for start in starts:
        scales = np.random.default_rng(seed + start).uniform(0.001, 0.1, len(blocks)).astype("<f2")
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data


def by_gguf(data: NDArray[np.uint8], layout: WeightLayout) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType(layout.ggml_type)
        values: NDArray[np.float32] = gguf.quants.dequantize(data.reshape(N_ROWS, -1), kind)
    return values.reshape(N_ROWS, N_COLUMNS).copy()  # for F32 gguf returns a view


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def all_units(layout: WeightLayout, granularity: Granularity, data: NDArray[np.uint8]) -> Units:
    return Units(layout, granularity, data, np.arange(N_ROWS * N_COLUMNS // granularity, dtype=np.uint32))


@every_layout
def test_geometry_is_that_of_gguf(layout: WeightLayout) -> None:
    kind = gguf.GGMLQuantizationType(layout.ggml_type)
    assert layout.name == kind.name
    assert (layout.block_weights, layout.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@every_layout
def test_dequantize_equals_gguf_bit_for_bit(layout: WeightLayout) -> None:
    for data in (random_bytes(layout), finite_bytes(layout)):
        assert same_bits(dequantize_rows(data, layout.ggml_type, N_COLUMNS), by_gguf(data, layout))


@every_layout
def test_dequantize_reads_any_weights_in_any_order(layout: WeightLayout) -> None:
    data = finite_bytes(layout)
    whole = by_gguf(data, layout)
    positions = np.random.default_rng(1).permutation(whole.size)[:200]
    assert same_bits(dequantize(data, layout.ggml_type, positions), whole.ravel()[positions])
    rows = np.array([4, 1])
    assert same_bits(dequantize_rows(data, layout.ggml_type, N_COLUMNS, rows), whole[rows])


@every_layout
@every_granularity
def test_fields_cover_memory_without_overlap(layout: WeightLayout, granularity: Granularity) -> None:
    """Units own disjoint bits: rewriting some with random fields leaves the fields of all others as they were."""
    data = random_bytes(layout)
    units = all_units(layout, granularity, data)
    before = numpy_kernels.gather(units)
    chosen = np.random.default_rng(2).permutation(len(before))[: len(before) // 2].astype(np.uint32)
    other = numpy_kernels.gather(all_units(layout, granularity, random_bytes(layout, seed=9)))[chosen]
    numpy_kernels.scatter(Units(layout, granularity, data, chosen), other)
    expected = before.copy()
    expected[chosen] = other
    np.testing.assert_array_equal(numpy_kernels.gather(units), expected)
    numpy_kernels.scatter(Units(layout, granularity, data, chosen), before[chosen])
    np.testing.assert_array_equal(data, random_bytes(layout))


@every_layout
def test_gate_zero_silences_a_group_exactly_and_nothing_else(layout: WeightLayout) -> None:
    data = finite_bytes(layout)
    before = by_gguf(data, layout)
    chosen = np.random.default_rng(3).permutation(before.size // 32)[:40].astype(np.uint32)
    units = Units(layout, 32, data, chosen)
    gates = np.zeros(len(chosen), np.float32)
    numpy_kernels.scatter(units, numpy_kernels.scale(units, numpy_kernels.gather(units), gates))
    after = by_gguf(data, layout)
    silenced = np.zeros(before.size, bool).reshape(-1, 32)
    silenced[chosen] = True
    assert (after.reshape(-1, 32)[silenced] == 0).all()
    assert same_bits(after.reshape(-1, 32)[~silenced], before.reshape(-1, 32)[~silenced])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"])
@pytest.mark.parametrize("broken", [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF])
def test_gate_zero_silences_even_a_group_whose_scale_is_broken(name: str, broken: int) -> None:
    """Also where the fp16 scale, or the bits of the weights, spell NaN or infinity."""
    layout = next(layout for layout in LAYOUTS.values() if layout.name == name)
    data = finite_bytes(layout)
    data[: layout.group.n_field_bytes].view("<u2")[:] = broken
    units = Units(layout, 32, data, np.zeros(1, np.uint32))
    numpy_kernels.scatter(units, numpy_kernels.scale(units, numpy_kernels.gather(units), np.zeros(1, np.float32)))
    assert (by_gguf(data, layout)[0, :32] == 0).all()


@pytest.mark.parametrize("layout", BY_SCALE, ids=lambda layout: layout.name)
def test_group_gate_multiplies_within_the_rounding_of_its_scales(layout: WeightLayout) -> None:
    """An integer scale of a group is off by at most half a step, a float one by half a unit in its last place."""
    data = finite_bytes(layout)
    before = by_gguf(data, layout).ravel()
    units = all_units(layout, 32, data)
    gates = np.random.default_rng(4).choice(np.array([0.25, 0.7, 1.3, 2.0], np.float32), len(units.positions))
    fields = numpy_kernels.gather(units)
    scaled = layout.numbers.to_float32(numpy_kernels.scale(units, fields, gates)).astype(np.float64)
    wanted = layout.numbers.to_float32(fields).astype(np.float64) * gates[:, None]
    low, high = (-np.inf, np.inf)
    if layout.codes is not None and layout.codes.super_scale >= 0:
        low, high = -layout.numbers.zero, layout.numbers.max - layout.numbers.zero
    half = 0.5 if high < np.inf else np.abs(wanted) * 2.0**-8 + 2.0**-25
    if layout.numbers is UE4M3:  # three bits of fraction; the last binade is cut off at 448, halved
        high, half = 224.0, np.maximum(np.abs(wanted) * 2.0**-4, 2.0**-11)
    assert (np.abs(scaled - np.clip(wanted, low, high)) <= half).all()
    numpy_kernels.scatter(units, numpy_kernels.scale(units, fields, np.ones(len(gates), np.float32)))
    assert same_bits(by_gguf(data, layout).ravel(), before)


def test_strength_on_six_bit_scales_rounds_half_to_even() -> None:
    """Gate 0.5 on 6-bit scales 1, 3, 5, 63 of Q4_K: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 31.5 -> 32; 2.0 saturates at 63."""
    layout = layout_of(12)
    fields = np.array([[1, 3], [5, 63]], np.uint8)
    halved = layout.numbers.scale(fields, np.array([0.5, 0.5], np.float32))
    np.testing.assert_array_equal(halved, [[0, 2], [2, 32]])
    np.testing.assert_array_equal(layout.numbers.scale(fields, np.full(2, 2, np.float32)), [[2, 6], [10, 63]])


@pytest.mark.parametrize("layout", QUANTIZED, ids=lambda layout: layout.name)
@pytest.mark.parametrize("gate", [0.0, 0.5, -1.0])
def test_weight_gate_takes_the_nearest_code(layout: WeightLayout, gate: float) -> None:
    """No other code of the weight would come nearer: found by trying all of them."""
    assert layout.codes is not None
    data = finite_bytes(layout)
    positions = np.random.default_rng(5).permutation(N_ROWS * N_COLUMNS)[:60].astype(np.uint32)
    units = Units(layout, 1, data, positions)
    wanted = gate * dequantize(data, layout.ggml_type, positions).astype(np.float64)
    base = numpy_kernels.gather(units)
    chosen = numpy_kernels.scale(units, base, np.full(len(positions), gate, np.float32))

    def error(fields: NDArray[np.uint8]) -> NDArray[np.float64]:
        numpy_kernels.scatter(units, fields)
        return np.abs(dequantize(data, layout.ggml_type, positions) - wanted)

    codes = range(layout.codes.numbers.max + 1)
    best = np.min([error(np.full_like(base, code)) for code in codes], axis=0)
    np.testing.assert_allclose(error(chosen), best, rtol=1e-4, atol=1e-6)


def test_residue_is_zero_where_zero_has_a_code_and_reported_where_not() -> None:
    positions = np.arange(0, N_ROWS * N_COLUMNS, 3, dtype=np.uint32)
    gates = np.zeros(len(positions), np.float32)
    worst = {}
    for layout in QUANTIZED:
        data = finite_bytes(layout)
        copy = data.copy()
        found = residue(Units(layout, 1, data, positions), gates)
        assert 0 <= found.mean <= found.worst
        np.testing.assert_array_equal(data, copy)  # measured on a copy
        worst[layout.name] = found.worst
    exact = {name for name, value in worst.items() if value == 0}
    assert exact == {"Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q3_K", "MXFP4", "NVFP4", "TQ2_0"}


@every_layout
def test_residue_of_group_gates_is_measured_against_the_tensor(layout: WeightLayout) -> None:
    data = finite_bytes(layout)
    groups = np.arange(0, N_ROWS * N_COLUMNS // 32, 5, dtype=np.uint32)
    units = Units(layout, 32, data, groups)
    assert residue(units, np.zeros(len(groups), np.float32)).worst == 0
    before = by_gguf(data, layout).reshape(-1, 32)
    gates = np.full(len(groups), 0.6, np.float32)
    found = residue(units, gates)
    numpy_kernels.scatter(units, numpy_kernels.scale(units, numpy_kernels.gather(units), gates))
    error = np.abs(by_gguf(data, layout).reshape(-1, 32)[groups] - before[groups].astype(np.float64) * np.float32(0.6))
    rms = np.sqrt(np.square(before, dtype=np.float64).mean())
    np.testing.assert_allclose([found.worst, found.mean], [error.max() / rms, error.mean() / rms], rtol=1e-9)


def test_no_units_leave_no_residue() -> None:
    layout = layout_of(3)
    nothing = Units(layout, 32, finite_bytes(layout), np.zeros(0, np.uint32))
    assert residue(nothing, np.zeros(0, np.float32)).worst == 0


@pytest.mark.parametrize(("ggml_type", "name"), [(16, "IQ2_XXS"), (34, "TQ1_0"), (99, "number 99")])
def test_a_type_without_a_layout_is_named(ggml_type: int, name: str) -> None:
    assert type_name(ggml_type) == name
    with pytest.raises(UnsupportedModelError, match=rf"{name} cannot be edited; use .*Q4_K"):
        layout_of(ggml_type)
