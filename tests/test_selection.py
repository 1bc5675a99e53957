"""Selection against a full sort of Python tuples, and the promises that users of a mask rely on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge import selection
from persona_edge.errors import InputError, SelectionError

Floats = NDArray[np.float32]
Tensors = dict[str, Floats]
EPSILON = 1e-10


def array(*rows: object) -> Floats:
    return np.array(rows, np.float32)


def listed(positions: Mapping[str, NDArray[np.uint32]]) -> dict[str, list[int]]:
    assert all(p.dtype == np.uint32 and np.all(np.diff(p.astype(np.int64)) > 0) for p in positions.values())
    return {name: p.tolist() for name, p in positions.items()}


def negated(tensors: Tensors) -> Tensors:
    return {name: -values for name, values in tensors.items()}


def random_tensors(seed: int, *, n_levels: int = 0) -> tuple[Tensors, Tensors]:
    """Benefits around 0 and damages over six decades; `n_levels` rounds both so that many units tie."""
    rng = np.random.default_rng(seed)
    shapes = {"b": (4, 6), "a": (3, 5), "c": (1, 40)}
    benefit = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    damage = {name: (10 ** rng.uniform(-8, -2, shape)).astype(np.float32) for name, shape in shapes.items()}
    if n_levels:
        benefit = {name: np.round(values * n_levels) / np.float32(n_levels) for name, values in benefit.items()}
        damage = {name: np.full_like(values, 2**-10) for name, values in damage.items()}
    return benefit, damage


def naive_order(benefit: Tensors, damage: Tensors) -> list[tuple[str, int, float]]:
    """(tensor, position, damage) of every helpful unit, best first, by one stable sort."""
    units = [
        (name, position, float(damage[name].flat[position]), float(b) / (float(damage[name].flat[position]) + EPSILON))
        for name, values in benefit.items()
        for position, b in enumerate(values.flat)
        if b > 0
    ]
    return [unit[:3] for unit in sorted(units, key=lambda unit: -np.float32(unit[3]))]


def naive_take(order: list[tuple[str, int, float]], n_taken: int) -> dict[str, list[int]]:
    taken: dict[str, list[int]] = {}
    for name, position, _ in order[:n_taken]:
        taken.setdefault(name, []).append(position)
    return {name: sorted(positions) for name, positions in taken.items()}


@pytest.mark.parametrize("n_levels", [0, 2])
@pytest.mark.parametrize("seed", range(5))
def test_every_cut_equals_a_full_sort(seed: int, n_levels: int) -> None:
    benefit, damage = random_tensors(seed, n_levels=n_levels)
    ranked = selection.rank(benefit, damage, epsilon=EPSILON)
    order = naive_order(benefit, damage)
    assert ranked.n_candidates == len(order)
    spent = np.cumsum([cost for _, _, cost in order])
    for n_taken in range(1, len(order) + 1):
        beyond = spent[n_taken] if n_taken < len(order) else 2 * spent[-1]
        budget = math.sqrt(spent[n_taken - 1] * beyond)  # between two units, so that rounding decides nothing
        assert listed(ranked.take(budget)) == naive_take(order, n_taken)
        assert listed(ranked.take_density(n_taken / ranked.n_units)) == naive_take(order, n_taken)


@given(seed=st.integers(0, 10_000), budgets=st.lists(st.floats(1e-7, 1.0), min_size=2, max_size=4))
def test_cuts_stay_within_budget_are_nested_and_disjoint_between_poles(seed: int, budgets: list[float]) -> None:
    benefit, damage = random_tensors(seed)
    ranked = selection.rank(benefit, damage)
    smaller: Mapping[str, NDArray[np.uint32]] = {}
    for budget in sorted(budgets):
        try:
            positions = ranked.take(budget)
        except SelectionError:
            assert not smaller
            continue
        assert 0 < selection.sum_over(damage, positions) <= budget * (1 + 1e-9)
        assert all(set(at.tolist()) <= set(positions[name].tolist()) for name, at in smaller.items())
        smaller = positions
        selection.check_disjoint(positions, selection.rank(negated(benefit), damage).take(10.0))


def test_budget_by_hand_ranks_over_all_tensors() -> None:
    benefit = {"x": array([4, -9], [1, 0]), "y": array([3, 2])}
    damage = {"x": array([2, 1], [1, 1]), "y": array([1, 8])}  # ratios: x 2, -, 1, -; y 3, 0.25
    assert listed(selection.select_by_budget(benefit, damage, 1)) == {"y": [0]}
    assert listed(selection.select_by_budget(benefit, damage, 2.9)) == {"y": [0]}
    assert listed(selection.select_by_budget(benefit, damage, 3)) == {"x": [0], "y": [0]}
    assert listed(selection.select_by_budget(benefit, damage, 100)) == {"x": [0, 2], "y": [0, 1]}
    assert listed(selection.select_by_budget(negated(benefit), damage, 1)) == {"x": [1]}
    assert selection.sum_over(benefit, selection.select_by_budget(benefit, damage, 3)) == 7


def test_ties_go_to_the_earlier_tensor_then_the_lower_position() -> None:
    same = {"z": array([1, 1]), "a": array([1, 1])}
    assert listed(selection.rank(same, same).take(3)) == {"z": [0, 1], "a": [0]}


def test_ties_keep_their_order_among_thousands() -> None:
    levels = np.random.default_rng(0).integers(0, 2, 20_000)  # two keys that share a bucket, each thousands of times
    values = (1 + levels / 1024).astype(np.float32).reshape(2, 10_000)
    order = np.argsort(-values.ravel(), kind="stable")
    found = selection.select_by_density({"x": values}, 0.25)
    assert np.array_equal(found["x"], np.sort(order[:5000]))


def test_epsilon_outranks_units_that_neither_help_nor_harm() -> None:
    benefit, damage = {"x": array([1e-9, 1])}, {"x": array([1e-14, 1e-3])}  # bare ratios 1e5 and 1e3
    assert listed(selection.rank(benefit, damage, epsilon=1e-7).take_density(0.5)) == {"x": [1]}
    assert listed(selection.rank(benefit, damage, epsilon=1e-20).take_density(0.5)) == {"x": [0]}


def test_a_million_units_equal_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    benefit = {"x": rng.standard_normal((1000, 1000), np.float32)}
    damage = {"x": rng.lognormal(-15, 2, (1000, 1000)).astype(np.float32)}
    order = np.argsort(-(benefit["x"] / (damage["x"] + EPSILON)).ravel(), kind="stable")
    spent = np.cumsum(damage["x"].ravel()[order], dtype=np.float64)
    n_taken = 3000
    budget = float(spent[n_taken - 1] + spent[n_taken]) / 2
    found = selection.rank(benefit, damage).take(budget)["x"]
    # float32 and float64 quotients may order near-equal units differently; at the cut that may swap one unit
    assert len(np.setxor1d(found, order[:n_taken])) <= 2


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.data())
def test_density_takes_the_highest_scores_of_any_sign(values: list[float], data: st.DataObject) -> None:
    n_taken = data.draw(st.integers(1, len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])
    found = selection.select_by_density({"x": array(values)}, n_taken / len(values))
    assert listed(found) == {"x": sorted(order[:n_taken])}


def test_density_over_all_tensors_or_in_each() -> None:
    values = {"x": array([9, 8, 7, 6]), "y": array([1, 2, 3, 4])}
    assert listed(selection.select_by_density(values, 0.5)) == {"x": [0, 1, 2, 3]}
    assert listed(selection.select_by_density(values, 0.5, per_tensor=True)) == {"x": [0, 1], "y": [2, 3]}


def test_top_k_per_row_suppresses_the_rest_of_each_row() -> None:
    values = {"x": array([4, 1, 3, 2], [5, 5, 5, 5], [-1, -2, -4, -3])}
    assert listed(selection.select_top_k_per_row(values, 0.5)) == {"x": [1, 3, 6, 7, 10, 11]}
    assert listed(selection.select_top_k_per_row(values, 0.001)) == {"x": [1, 2, 3, 5, 6, 7, 9, 10, 11]}


@given(st.integers(0, 1000), st.integers(1, 9))
def test_top_k_equals_a_stable_sort_of_each_row(seed: int, k: int) -> None:
    values = np.random.default_rng(seed).integers(-3, 3, (5, 10)).astype(np.float32)
    kept = np.argsort(-values, axis=1, kind="stable")[:, :k] + 10 * np.arange(5)[:, None]
    suppressed = np.setdiff1d(np.arange(50), kept)
    assert listed(selection.select_top_k_per_row({"x": values}, k / 10)) == {"x": suppressed.tolist()}


def test_planes_suppress_what_hurts_the_pole_and_amplify_what_helps_it() -> None:
    benefit, damage = {"x": array([4, -3, 2, -1])}, {"x": array([1, 1, 1, 1])}
    suppress, amplify = selection.select_planes(benefit, damage, 3, amplify_gate=2.0)
    assert (suppress.gate, listed(suppress.positions)) == (0.0, {"x": [0, 2]})
    assert (amplify.gate, listed(amplify.positions)) == (2.0, {"x": [1]})
    assert suppress.granularity == amplify.granularity == 32
    assert selection.n_overlapping(suppress.positions, amplify.positions) == 0


def test_planes_price_a_gate_by_the_square_of_its_distance() -> None:
    benefit, damage = {"x": array([4, -4])}, {"x": array([1, 1])}
    # gate 1.5: gain 2 for 0.25, ratio 8, so it comes first; gate 0: gain 4 for 1
    (only,) = selection.select_planes(benefit, damage, 0.25, amplify_gate=1.5, granularity=1)
    assert (only.gate, only.granularity, listed(only.positions)) == (1.5, 1, {"x": [1]})
    assert len(selection.select_planes(benefit, damage, 1.25, amplify_gate=1.5)) == 2
    # gate -1: gain 8 for 4
    (only,) = selection.select_planes(benefit, damage, 4, suppress_gate=-1.0)
    assert (only.gate, listed(only.positions)) == (-1.0, {"x": [0]})
    with pytest.raises(SelectionError, match="4 nats or more"):
        selection.select_planes(benefit, damage, 3.9, suppress_gate=-1.0)


@given(seed=st.integers(0, 1000), suppress_gate=st.sampled_from([0.0, 0.25]), budget=st.floats(1e-4, 0.1))
def test_planes_without_amplifying_are_the_budget_cut(seed: int, suppress_gate: float, budget: float) -> None:
    benefit, damage = random_tensors(seed)
    ranked = selection.rank_planes(benefit, damage, suppress_gate=suppress_gate, epsilon=1e-30)
    (plane,) = ranked.take(budget * (1 - suppress_gate) ** 2)
    assert listed(plane.positions) == listed(selection.select_by_budget(benefit, damage, budget, epsilon=1e-30))
    (dense,) = ranked.take_density(0.1)
    assert dense.n_positions == round(0.1 * ranked.units.n_units)


def test_overlap_is_counted_and_named() -> None:
    first = {"x": np.array([1, 5], np.uint32), "y": np.array([2], np.uint32)}
    second = {"y": np.array([2, 3], np.uint32), "z": np.array([1], np.uint32)}
    assert selection.n_overlapping(first, second) == 1
    with pytest.raises(SelectionError, match="y: 1 units"):
        selection.check_disjoint(first, second)
    selection.check_disjoint({"x": first["x"]}, second)


ONE = {"blk.0.ffn_up.weight": array([1, 1])}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad: selection.rank(bad, ONE),
        lambda bad: selection.rank(ONE, bad),
        lambda bad: selection.rank_planes(bad, ONE, amplify_gate=2.0),
        lambda bad: selection.select_by_density(bad, 0.5),
        lambda bad: selection.select_top_k_per_row(bad, 0.5),
    ],
)
def test_values_that_are_no_numbers_name_their_tensor(call: Callable[[Tensors], object], bad: float) -> None:
    with pytest.raises(SelectionError, match=r"blk\.0\.ffn_up\.weight: 1 of 2"):
        call({"blk.0.ffn_up.weight": array([1, bad])})


@pytest.mark.parametrize(
    ("call", "error", "shows"),
    [
        (lambda: selection.rank(ONE, {}), SelectionError, "blk.0.ffn_up.weight"),
        (lambda: selection.rank({"x": array([1])}, {"x": array([1, 2])}), SelectionError, "x: benefit is (1, 1)"),
        (lambda: selection.rank({"x": array([1])}, {"x": array([-1])}), SelectionError, "x: damage -1 is below 0"),
        (lambda: selection.rank(ONE, ONE).take(0), InputError, "not 0"),
        (lambda: selection.rank(ONE, ONE).take(math.nan), InputError, "not nan"),
        (lambda: selection.rank(ONE, ONE).take(0.5), SelectionError, "cost 1 nats or more"),
        (lambda: selection.rank(negated(ONE), ONE).take(0.5), SelectionError, "no unit helps this pole"),
        (lambda: selection.rank({"x": array([1, -1])}, {"x": array([1, 1])}).take_density(1), SelectionError, "2 of 2"),
        (lambda: selection.select_by_density(ONE, 0.1), SelectionError, "0 of 2"),
        (lambda: selection.select_by_density(ONE, 1.5), InputError, "1.5"),
        (lambda: selection.select_top_k_per_row(ONE, 1), SelectionError, "suppresses nothing"),
        (lambda: selection.select_top_k_per_row(ONE, 0), InputError, "not 0"),
        (lambda: selection.select_planes(ONE, ONE, 1, suppress_gate=1.0), InputError, "below 1"),
        (lambda: selection.select_planes(ONE, ONE, 1, amplify_gate=0.5), InputError, "above 1"),
    ],
)
def test_what_cannot_be_satisfied_is_said(call: Callable[[], object], error: type[Exception], shows: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert shows in str(raised.value)


NAMES = (
    "token_embd.weight",
    "blk.0.attn_q.weight",
    "blk.0.ffn_up.weight",
    "blk.1.attn_q.weight",
    "blk.10.ffn_up.weight",
)


@pytest.mark.parametrize(
    ("include", "exclude", "layers", "kept"),
    [
        ((), (), None, NAMES),
        (("blk.*.ffn_*",), (), None, (NAMES[2], NAMES[4])),
        (("attn_q",), (), None, (NAMES[1], NAMES[3])),
        (("attn_*", "blk.0.*"), ("ffn_up",), None, (NAMES[1], NAMES[3])),
        ((), ("token_embd.weight",), None, NAMES[1:]),
        ((), (), "1-10", NAMES[3:]),
        ((), (), "0, 10", (NAMES[1], NAMES[2], NAMES[4])),
        (("ffn_up",), (), "1-10", (NAMES[4],)),
    ],
)
def test_filter_keeps_the_named_tensors_in_order(
    include: tuple[str, ...], exclude: tuple[str, ...], layers: str | None, kept: tuple[str, ...]
) -> None:
    assert selection.filter_tensors(NAMES, include, exclude, layers) == kept


@pytest.mark.parametrize(
    ("include", "exclude", "layers", "shows"),
    [
        (("q_proj",), (), None, "'q_proj' matches no tensor"),
        ((), ("ffn_down",), None, "'ffn_down' matches no tensor"),
        (("attn_q",), ("blk.*",), None, "none of 5 tensors"),
        (("attn_q",), (), "10", "none of 5 tensors"),
        ((), (), "2-", "'2-' cannot be read"),
        ((), (), "9-11", "layers 0-10"),
        ((), (), "3-2", "'3-2' are not in the model"),
    ],
)
def test_filter_that_cannot_be_met(
    include: tuple[str, ...], exclude: tuple[str, ...], layers: str | None, shows: str
) -> None:
    with pytest.raises(InputError) as raised:
        selection.filter_tensors(NAMES, include, exclude, layers)
    assert shows in str(raised.value)
