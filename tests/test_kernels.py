"""C kernels = NumPy kernels = the slow reference, on random and on adversarial blocks; and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge.errors import InputError, MissingDependencyError
from persona_edge.masks import Granularity
from persona_edge.runtime import kernels as kernels_module
from persona_edge.runtime import reference
from persona_edge.runtime.kernels import CKernels, Kernels, NumpyKernels, default_kernels, layout_words
from persona_edge.runtime.layouts import LAYOUTS, Units, WeightLayout, layout_of
from persona_edge.runtime.number_formats import E8M0, UE4M3
from persona_edge.runtime.plans import Plan, UndoLog

N_BLOCKS = 3
GRANULARITIES: tuple[Granularity, ...] = (1, 32)
# Zeros, denormals, the ends of the normal range, infinities, quiet and signalling NaN, one: in fp16, and their like in
# the upper halves of fp32 and bf16.
FP16 = (0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF)
FP32 = (0, 0x8000, 1, 0x807F, 0x0080, 0x3F80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF)
# The ends of E8M0, and around one; UE4M3's denormals, its largest number, what is none, and bytes with the top bit.
SCALE_BYTES = (0, 1, 2, 7, 8, 56, 0x7D, 0x7E, 0x7F, 0x80, 0x81, 0xFD, 0xFE, 0xFF)
GATES = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    1.5,
    -0.5,
    1 / 3,
    1e-8,
    -1e-30,
    3e38,
    -3e38,
    float(np.nextafter(np.float32(1), 2)),
)

gates_strategy = st.sampled_from(GATES) | st.floats(-4, 4, width=32)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def _compiled() -> CKernels | None:
    try:
        return CKernels()
    except MissingDependencyError:
        return None


C = _compiled()
NUMPY = NumpyKernels()
BOTH: list[Kernels] = [NUMPY] if C is None else [NUMPY, C]
every_kernels = pytest.mark.parametrize("kernels", BOTH, ids=lambda kernels: kernels.name)
needs_c = pytest.mark.skipif(C is None, reason="the C kernels are not compiled here")


def memory(layout: WeightLayout, seed: int, special: list[int]) -> NDArray[np.uint8]:
    """Blocks of random bytes in which every fp16 scale, or some of the plain floats, are of the `special` bits."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, N_BLOCKS * reference.BLOCK_BYTES[layout.name], dtype=np.uint8)
    if layout.codes is None:
        halves = data.view("<u2")
        where = rng.permutation(np.arange(layout.numbers.n_bytes // 2 - 1, halves.size, layout.numbers.n_bytes // 2))
        halves[where[: halves.size // 4]] = rng.choice(special, len(where[: halves.size // 4]))
        return data
    blocks = data.reshape(N_BLOCKS, -1)
    if layout.numbers in (E8M0, UE4M3):
        blocks[:, : layout.codes.n_scales] = rng.choice(SCALE_BYTES, (N_BLOCKS, layout.codes.n_scales))
        return data
    starts = {layout.codes.super_scale, layout.codes.super_min} - {-1} or range(0, layout.group.n_field_bytes, 2)
    for start in starts:
        blocks[:, start : start + 2] = rng.choice(special, N_BLOCKS).astype("<u2").view(np.uint8).reshape(-1, 2)
    return data


def by_reference(data: NDArray[np.uint8], units: Units, gates: NDArray[np.float32]) -> NDArray[np.uint8]:
    name = units.layout.name
    blocks = [bytes(block) for block in data.reshape(-1, reference.BLOCK_BYTES[name])]
    per_block = reference.BLOCK_WEIGHTS[name] // units.granularity
    gate_unit = reference.gate_weight if units.granularity == 1 else reference.gate_group
    for position, gate in zip(units.positions.tolist(), gates.tolist(), strict=True):
        block, unit = divmod(position, per_block)
        blocks[block] = gate_unit(name, blocks[block], unit, gate)
    return np.frombuffer(b"".join(blocks), np.uint8)


@every_layout
@every_granularity
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_both_equal_the_reference(layout: WeightLayout, granularity: Granularity, data: st.DataObject) -> None:
    special = FP16 if layout.name not in ("F32", "BF16") else FP32
    base = memory(layout, data.draw(st.integers(0, 2**32)), data.draw(st.lists(st.sampled_from(special), min_size=1)))
    n_units = N_BLOCKS * reference.BLOCK_WEIGHTS[layout.name] // granularity
    chosen = data.draw(
        st.lists(st.integers(0, n_units - 1), unique=True, min_size=1, max_size=8 if granularity == 1 else 3)
    )
    gates = np.array(data.draw(st.lists(gates_strategy, min_size=len(chosen), max_size=len(chosen))), np.float32)
    results = []
    for kernels in BOTH:
        edited = base.copy()
        units = Units(layout, granularity, edited, np.array(chosen, np.uint32))
        fields = kernels.gather(units)
        kernels.scatter(units, kernels.scale(units, fields, gates))
        results.append(edited.copy())
        kernels.scatter(units, fields)
        np.testing.assert_array_equal(edited, base)
    expected = by_reference(base, units, gates)
    for result in results:
        np.testing.assert_array_equal(result, expected)


@needs_c
@every_layout
@every_granularity
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_c_equals_numpy_on_many_units(layout: WeightLayout, granularity: Granularity, seed: int) -> None:
    assert C is not None
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, 64 * reference.BLOCK_BYTES[layout.name], dtype=np.uint8)
    n_units = 64 * reference.BLOCK_WEIGHTS[layout.name] // granularity
    positions = rng.permutation(n_units)[: n_units // 2].astype(np.uint32)
    gates = np.where(
        rng.random(len(positions)) < 0.5, rng.choice(GATES, len(positions)), rng.normal(0, 2, len(positions))
    )
    gates = gates.astype(np.float32)
    units = Units(layout, granularity, data, positions)
    fields = C.gather(units)
    np.testing.assert_array_equal(fields, NUMPY.gather(units))
    scaled = C.scale(units, fields, gates)
    np.testing.assert_array_equal(scaled, NUMPY.scale(units, fields, gates))
    copies = data.copy(), data.copy()
    for kernels, copy in zip(BOTH, copies, strict=True):
        kernels.scatter(Units(layout, granularity, copy, positions), scaled)
    np.testing.assert_array_equal(*copies)


@needs_c
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), gate=gates_strategy)
def test_every_fp16_and_bf16_times_a_gate(seed: int, gate: float) -> None:
    """All 65536 bit patterns, C against NumPy, whose fp16 conversion is its own."""
    assert C is not None
    positions = np.arange(65536, dtype=np.uint32)
    bits = np.random.default_rng(seed).permutation(65536).astype("<u2").view(np.uint8)
    for ggml_type in (1, 30):
        units = Units(layout_of(ggml_type), 1, bits, positions)
        gates = np.full(65536, gate, np.float32)
        fields = C.gather(units)
        np.testing.assert_array_equal(C.scale(units, fields, gates), NUMPY.scale(units, fields, gates))


def mxfp4_block(exponent: int, codes: list[int]) -> NDArray[np.uint8]:
    """One block: 16 codes that stand in the first and in the second half alike."""
    return np.array([exponent, *(code | code << 4 for code in codes)], np.uint8)


@every_kernels
@pytest.mark.parametrize(
    ("gate", "exponent", "codes"),
    [
        (0.0, 120, [0] * 8),
        (0.5, 119, [0, 1, 2, 3, 4, 5, 6, 7]),
        (-4.0, 122, [0, 9, 10, 11, 12, 13, 14, 15]),
        (0.75, 120, [0, 1, 1, 2, 3, 4, 5, 6]),  # 0.75 1.5 2.25 3 4.5 6 9 of the values 1 2 3 4 6 8 12
        (1.5, 121, [0, 1, 1, 2, 3, 4, 5, 6]),  # twice as much
        (2.0**-130, 0, [0, 0, 0, 0, 0, 0, 0, 0]),  # below the smallest power: 2^-10 of each is left
        (2.0**127, 247, [0, 1, 2, 3, 4, 5, 6, 7]),
        (2.0**127 * 1.5, 248, [0, 1, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_a_gate_makes_of_an_mxfp4_group(kernels: Kernels, gate: float, exponent: int, codes: list[int]) -> None:
    data = mxfp4_block(120, [*range(8), *range(8)])
    units = Units(layout_of(39), 32, data, np.zeros(1, np.uint32))
    scaled = kernels.scale(units, kernels.gather(units), np.array([gate], np.float32))
    np.testing.assert_array_equal(scaled[0], mxfp4_block(exponent, [*codes, *codes]))


@every_kernels
def test_at_the_end_of_the_exponents_mxfp4_codes_saturate(kernels: Kernels) -> None:
    units = Units(layout_of(39), 32, mxfp4_block(253, [*range(16)]), np.zeros(1, np.uint32))
    scaled = kernels.scale(units, kernels.gather(units), np.array([8.0], np.float32))
    # The exponent takes a factor of 2, the codes one of 4: 1 2 3 4 6 8 12 become 4 8 12 12 12 12 12.
    np.testing.assert_array_equal(scaled[0], mxfp4_block(254, [0, 4, 6, 7, 7, 7, 7, 7, 0, 12, 14, 15, 15, 15, 15, 15]))


@every_kernels
def test_a_ternary_group_is_dropped_kept_or_turned_round(kernels: Kernels) -> None:
    layout = layout_of(35)
    data = np.full(layout.block_bytes, 0b00011000, np.uint8)  # codes 0 2 1 0 in each byte: -1 1 0 -1
    units = Units(layout, 32, data, np.zeros(1, np.uint32))
    fields = kernels.gather(units)
    for gate, code in ((0.0, 1), (0.5, 1), (0.51, 0), (3.0, 0), (-1.0, 2), (-0.4, 1)):  # of a weight of -1
        scaled = kernels.scale(units, fields, np.array([gate], np.float32))
        kernels.scatter(units, scaled)
        np.testing.assert_array_equal(data[:32] & 3, code)
        kernels.scatter(units, fields)


def fixed_program(layout: WeightLayout, positions: list[int], granularity: int = 32) -> tuple[NDArray[np.uint8], Plan]:
    """A tensor of two blocks' worth of groups and a plan that silences the units at `positions`."""
    width = layout.fields(1 if granularity == 1 else 32).n_field_bytes
    n = len(positions)
    plan = Plan(
        np.zeros(1, np.int32),
        np.array([granularity], np.int32),
        np.array([0, n], np.int64),
        np.array([0, n * width], np.int64),
        np.array(positions, np.uint32),
        np.zeros(n, np.uint16),
        np.zeros(1, np.float32),
    )
    return np.arange(2 * reference.BLOCK_BYTES[layout.name], dtype=np.uint32).astype(np.uint8), plan


@every_kernels
@pytest.mark.parametrize("positions", [[0, 2], [1, 1], [1, 0], [0, 4294967295]])
def test_switch_refuses_positions_that_do_not_fit_before_it_writes(kernels: Kernels, positions: list[int]) -> None:
    layout = layout_of(3)
    data, plan = fixed_program(layout, positions)
    tensors = kernels.tensors([layout], [data])
    before = data.copy()
    with pytest.raises(ValueError, match="ascending or exceed"):
        kernels.switch(tensors, UndoLog.blank(Plan.empty()), UndoLog.blank(plan))
    np.testing.assert_array_equal(data, before)


@every_kernels
def test_the_empty_plan_is_a_plan(kernels: Kernels) -> None:
    nothing = UndoLog.blank(Plan.empty())
    assert kernels.switch(kernels.tensors([], []), nothing, nothing) == (0, 0, 0)


@every_kernels
def test_switch_refuses_a_plan_for_other_tensors(kernels: Kernels) -> None:
    layout = layout_of(3)
    data, plan = fixed_program(layout, [0])
    other = Plan(plan.tensors + np.int32(1), *list(vars(plan).values())[1:])
    with pytest.raises(ValueError, match="no such tensor"):
        kernels.switch(kernels.tensors([layout], [data]), UndoLog.blank(Plan.empty()), UndoLog.blank(other))


@every_kernels
def test_primitives_refuse_what_lies_outside(kernels: Kernels) -> None:
    layout = layout_of(12)
    data = np.zeros(layout.block_bytes, np.uint8)
    outside = Units(layout, 32, data, np.array([8], np.uint32))
    for call in (
        lambda: kernels.gather(outside),
        lambda: kernels.scale(outside, np.zeros((1, 2), np.uint8), np.ones(1, np.float32)),
        lambda: kernels.scatter(outside, np.zeros((1, 2), np.uint8)),
    ):
        with pytest.raises(ValueError, match="exceed the tensor"):
            call()
    inside = Units(layout, 32, data, np.array([7], np.uint32))
    with pytest.raises(ValueError, match="not finite"):
        kernels.scale(inside, np.zeros((1, 2), np.uint8), np.array([np.nan], np.float32))


@needs_c
def test_c_refuses_read_only_memory_and_broken_layouts() -> None:
    assert C is not None
    layout = layout_of(12)
    data = np.zeros(layout.block_bytes, np.uint8)
    data.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        C.tensors([layout], [data])
    native = kernels_module._native()
    words = layout_words(layout)
    native.layout(words)
    outside = words.copy()
    outside[4] = layout.block_bytes  # the first piece of the first field, one byte past the block
    too_many = [8, 4096, 4, 1, *[0, 0, 8] * 1024, 0, 4, 4, 1, *[0, 0, 8] * 4, 3, 0, 0, 0, 0]
    for broken in (words[:-1], np.append(words, 0), outside, too_many):
        with pytest.raises(ValueError, match="not a valid layout"):
            native.layout(np.asarray(broken, np.int32))


@needs_c
def test_an_extension_of_older_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("persona_edge.runtime._kernels.unite")
    with pytest.raises(MissingDependencyError, match="older sources; reinstall"):
        CKernels()


@pytest.mark.parametrize(("wanted", "expected"), [("numpy", "numpy"), ("c", "c"), ("", "c")])
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, wanted: str, expected: str) -> None:
    if C is None and expected == "c":
        pytest.skip("the C kernels are not compiled here")
    monkeypatch.setenv("PERSONA_EDGE_KERNELS", wanted)
    default_kernels.cache_clear()
    try:
        assert kernels_module.implementation() == expected
    finally:
        default_kernels.cache_clear()


def test_a_misspelt_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_EDGE_KERNELS", "fast")
    default_kernels.cache_clear()
    with pytest.raises(InputError, match="PERSONA_EDGE_KERNELS is 'fast'"):
        default_kernels()


def test_without_the_extension_numpy_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "persona_edge.runtime._kernels", None)
    monkeypatch.delattr("persona_edge.runtime._kernels", raising=False)
    monkeypatch.delenv("PERSONA_EDGE_KERNELS", raising=False)
    default_kernels.cache_clear()
    try:
        assert kernels_module.implementation() == "numpy"
        monkeypatch.setenv("PERSONA_EDGE_KERNELS", "c")
        default_kernels.cache_clear()
        with pytest.raises(MissingDependencyError, match="not compiled"):
            default_kernels()
    finally:
        default_kernels.cache_clear()


def test_the_editing_core_needs_numpy_alone() -> None:
    """Neither torch nor the backend is imported by the switcher."""
    heavy = "('torch', 'transformers', 'llama_cpp', 'click', 'gguf', 'persona_edge.runtime.reference')"
    code = f"import sys, persona_edge.runtime.switcher; assert not [m for m in {heavy} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)
