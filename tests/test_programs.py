"""Poles become programs: overlaps multiply, strength interpolates, and what cannot be flattened is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from persona_edge.errors import InputError
from persona_edge.masks import Granularity, Plane, Pole
from persona_edge.runtime import numpy_kernels
from persona_edge.runtime.kernels import NumpyKernels, default_kernels
from persona_edge.runtime.programs import CompositionCache, compile_program, compose


def pole(gate: float, positions: Mapping[str, Sequence[int]], granularity: Granularity = 32) -> Pole:
    plane = Plane(gate, {name: np.array(p, np.uint32) for name, p in positions.items()}, granularity)
    return Pole("pole", "axis", (plane,))


def test_overlapping_planes_multiply() -> None:
    program = compile_program([pole(0.5, {"Q4_1": [1, 2]}), pole(3.0, {"Q4_1": [2, 5]}), pole(0.0, {"Q8_0": [7]})])
    assert program.names == ("Q4_1", "Q8_0")
    granularity, positions, gates = program.units("Q4_1")
    assert granularity == 32
    np.testing.assert_array_equal(positions, [1, 2, 5])
    np.testing.assert_array_equal(gates, np.array([0.5, 1.5, 3.0], np.float32))
    assert program.n_units == 4


def test_units_whose_gates_cancel_are_dropped_at_that_strength_only() -> None:
    composition = compose(
        [pole(0.5, {"Q4_1": [1, 2]}), pole(2.0, {"Q4_1": [2], "Q8_0": [3]}), pole(0.5, {"Q8_0": [3]})]
    )
    whole = composition.at(1.0)
    assert whole.names == ("Q4_1",)
    np.testing.assert_array_equal(whole.units("Q4_1")[1], [1])
    half = composition.at(0.5)
    np.testing.assert_array_equal(half.units("Q4_1")[2], np.array([0.75, 0.75 * 1.5], np.float32))
    np.testing.assert_array_equal(half.units("Q8_0")[1], [3])


@pytest.mark.parametrize(("strength", "expected"), [(0.25, [0.75, 1.25]), (1.0, [0.0, 2.0]), (1.5, [-0.5, 2.5])])
def test_strength_scales_the_distance_from_one(strength: float, expected: list[float]) -> None:
    program = compile_program([pole(0.0, {"Q8_0": [0]}), pole(2.0, {"Q8_0": [1]})], strength)
    np.testing.assert_array_equal(program.units("Q8_0")[2], np.array(expected, np.float32))


def test_strength_zero_is_the_base_model() -> None:
    assert compile_program([pole(0.0, {"Q8_0": [0]}), pole(2.0, {"Q4_K": [3]})], 0.0).n_units == 0


@pytest.mark.parametrize("gate", [0.1, 0.3, 1.7, 3.3e-5])
def test_strength_one_gives_exactly_the_gate_of_the_pack(gate: float) -> None:
    assert compile_program([pole(gate, {"Q8_0": [0]})]).units("Q8_0")[2][0] == np.float32(gate)


def test_many_planes_compose_as_few_do() -> None:
    """More than 16 planes take another way to number their overlaps."""
    poles = [pole(1 + i / 64, {"Q4_K": list(range(i, 40))}) for i in range(20)]
    _, positions, gates = compile_program(poles).units("Q4_K")
    expected = [np.prod([1 + i / 64 for i in range(20) if i <= p]) for p in range(40)]
    np.testing.assert_array_equal(positions, np.arange(1, 40))
    np.testing.assert_allclose(gates, expected[1:], rtol=1e-7)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_an_impossible_strength_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match="strength"):
        compile_program([], strength)


def test_compose_refuses_what_it_cannot_flatten() -> None:
    with pytest.raises(InputError, match="Q4_1: group masks and weight masks cannot be combined"):
        compose([pole(0.0, {"Q4_1": [1]}), pole(0.0, {"Q4_1": [1]}, 1)])
    with pytest.raises(InputError, match="strictly ascending"):
        compose([pole(0.0, {"Q4_1": [2, 1]})])
    with pytest.raises(InputError, match="not all finite"):
        compose([pole(float("nan"), {"Q4_1": [1]})])
    with pytest.raises(InputError, match="65 planes"):
        compose([pole(0.0, {"Q4_1": [1]})] * 65)
    with pytest.raises(InputError, match="overflows"):
        compile_program([pole(1e30, {"Q4_1": [1]})] * 2)


@pytest.mark.parametrize("seed", range(5))
def test_c_and_numpy_unite_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = [np.flatnonzero(rng.random(300) < share).astype(np.uint32) for share in rng.random(seed + 1)]
    bits = [1 << 13 * i for i in range(len(runs))]
    expected, expected_sets = numpy_kernels.unite(runs, bits)
    room = sum(map(len, runs))
    for kernels in (NumpyKernels(), default_kernels()):
        positions, sets = np.zeros(room, np.uint32), np.zeros(room, np.uint64)
        n = kernels.unite(runs, bits, positions, sets)
        np.testing.assert_array_equal(positions[:n], expected)
        np.testing.assert_array_equal(sets[:n], expected_sets)
        with pytest.raises(ValueError, match="ascending"):
            kernels.unite([np.array([3, 3], np.uint32)], [1], positions, sets)


def test_the_cache_keeps_what_fits_and_strengths_share_arrays() -> None:
    asked: list[str] = []

    def poles_of(name: str) -> list[Pole]:
        asked.append(name)
        return [pole(0.0, {"Q4_K": range(100)})]

    cache = CompositionCache(poles_of, max_bytes=2 * 600)
    whole, half = cache.program("a", 1.0), cache.program("a", 0.5)
    assert whole.positions is half.positions
    assert whole.mixes is half.mixes
    cache.program("b", 1.0)
    cache.program("a", 0.3)
    assert (asked, cache.n_bytes) == (["a", "b"], 1200)
    cache.program("c", 1.0)  # b, used longest ago, goes
    cache.program("a", 1.0)
    cache.program("b", 1.0)
    assert asked == ["a", "b", "c", "b"]
    assert cache.n_bytes == 1200


def test_a_persona_that_returns_is_the_same_program_and_need_not_be_checked_again() -> None:
    cache = CompositionCache(lambda name: [pole(0.0, {"Q4_K": range(100) if name == "a" else range(50)})])
    first = cache.program("a", 1.0)
    cache.program("b", 1.0)
    assert cache.program("a", 1.0) is first
    half = cache.program("a", 0.5)
    assert (half.strength, first.strength) == (0.5, 1.0)
    assert cache.program("a", 0.5) is half


def test_a_program_goes_with_its_composition() -> None:
    cache = CompositionCache(lambda _: [pole(0.0, {"Q4_K": range(100)})], max_bytes=10)
    gone = weakref.ref(cache.program("a", 1.0))
    cache.program("b", 1.0)
    gc.collect()
    assert gone() is None


def test_a_composition_larger_than_the_cache_is_kept_alone() -> None:
    cache = CompositionCache(lambda _: [pole(0.0, {"Q4_K": range(100)})], max_bytes=10)
    assert cache.program("a", 1.0).positions is cache.program("a", 0.5).positions
    assert cache.n_bytes == 600
