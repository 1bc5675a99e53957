"""A pole's mask leaves the other axes where they are, at the least cost to its own; with none, nothing changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.masks import Gates, Plane
from persona_edge.selection import rank_planes, sum_over
from persona_edge.separation import MOST, NO_OTHERS, Others, priced, prices

Arrays = dict[str, NDArray[np.float32]]
EPSILON = 1e-6


def arrays(rng: np.random.Generator, *, positive: bool = False) -> Arrays:
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("a", (60, 40)), ("b", (50, 30)))}
    return {name: np.abs(values) + np.float32(0.05) for name, values in drawn.items()} if positive else drawn


def mixed(first: Arrays, second: Arrays, share: float) -> Arrays:
    """Arrays that correlate with `second`."""
    return {name: first[name] + np.float32(share) * second[name] for name in first}


def chosen(own: Arrays, others: Others, damage: Arrays, budget: float, gates: Gates) -> tuple[Plane, ...]:
    price = prices(own, others, damage, budget, moved=np.zeros(len(others.benefits)), gates=gates, epsilon=EPSILON)
    return rank_planes(
        priced(own, others, price),
        damage,
        suppress_gate=gates.suppress,
        amplify_gate=gates.amplify,
        epsilon=EPSILON,
    ).take(budget)


@pytest.mark.parametrize("gates", [Gates(), Gates(0.5), Gates(0, 1.5)], ids=str)
def test_the_other_axes_stay_where_they_are(gates: Gates) -> None:
    rng = np.random.default_rng(1)
    own, damage = arrays(rng), arrays(rng, positive=True)
    others = Others([mixed(arrays(rng), own, 0.5), mixed(arrays(rng), own, -0.3), arrays(rng)])
    mine = Others([own])
    apart = chosen(own, others, damage, 100, gates)
    close = chosen(own, NO_OTHERS, damage, 100, gates)
    gain = mine.moved(apart)[0]
    assert np.abs(others.moved(close)).max() > 0.3 * mine.moved(close)[0]
    assert np.abs(others.moved(apart)).max() < 0.02 * gain
    assert 0.5 * mine.moved(close)[0] < gain < mine.moved(close)[0]


def test_noisy_benefits_are_balanced_on_other_contrasts() -> None:
    """What ranks was measured with noise, of which a choice takes what makes its own sum small."""
    rng = np.random.default_rng(2)
    own, damage, gates = arrays(rng), arrays(rng, positive=True), Gates()
    truth = mixed(arrays(rng), own, 0.5)
    first, second = (mixed(arrays(rng), truth, 1) for _ in range(2))
    moved = {
        name: abs(Others([truth]).moved(chosen(own, others, damage, 100, gates))[0])
        for name, others in (
            ("not apart", NO_OTHERS),
            ("one half", Others([first])),
            ("both", Others([first], [second])),
        )
    }
    assert moved["one half"] > 0.3 * moved["not apart"]
    assert moved["both"] < 0.2 * moved["one half"]


def test_contrasts_that_have_nothing_in_common_do_no_harm() -> None:
    rng = np.random.default_rng(4)
    own, damage, gates = arrays(rng), arrays(rng, positive=True), Gates()
    first = arrays(rng)
    opposite = {name: -values for name, values in first.items()}
    others = Others([mixed(first, own, 0.5)], [mixed(opposite, own, 0.5)])
    (apart,), (close,) = (chosen(own, each, damage, 100, gates) for each in (others, NO_OTHERS))
    assert list(apart.positions["a"]) == list(close.positions["a"])


def test_no_better_choice_leaves_the_other_axis_alone() -> None:
    """Against every choice there is, on a dozen units: none gains more within the budget without moving the other."""
    rng = np.random.default_rng(3)
    own = {"a": rng.uniform(0.5, 1, (3, 4)).astype(np.float32)}
    other = {"a": rng.uniform(-1, 1, (3, 4)).astype(np.float32)}
    damage = {"a": np.ones((3, 4), np.float32)}
    (plane,) = chosen(own, Others([other]), damage, 6.5, Gates())
    moved, gain = sum_over(other, plane.positions), sum_over(own, plane.positions)
    flat, x = own["a"].ravel(), other["a"].ravel()
    for size in range(7):
        for units in itertools.combinations(range(12), size):
            at = list(units)
            if abs(x[at].sum()) <= abs(moved):
                assert flat[at].sum() <= gain + 1e-6


def test_what_was_moved_before_is_undone() -> None:
    rng = np.random.default_rng(5)
    own, damage, free = arrays(rng), arrays(rng, positive=True), arrays(rng)
    before = 40.0
    price = prices(own, Others([free]), damage, 200, moved=np.array([before]), gates=Gates(), epsilon=EPSILON)
    planes = rank_planes(priced(own, Others([free]), price), damage, epsilon=EPSILON).take(200)
    assert Others([free]).moved(planes)[0] == pytest.approx(-before, abs=8)


def test_an_axis_that_is_the_same_one_costs_no_more_than_the_highest_price() -> None:
    rng = np.random.default_rng(7)
    own, damage = arrays(rng), arrays(rng, positive=True)
    price = prices(own, Others([own]), damage, 50, moved=np.zeros(1), gates=Gates(), epsilon=EPSILON)
    assert abs(price[0]) <= MOST
    assert chosen(own, Others([own]), damage, 50, Gates())


def test_a_budget_that_nothing_fits_into_has_no_prices() -> None:
    rng = np.random.default_rng(13)
    own, other, damage = arrays(rng), arrays(rng), arrays(rng, positive=True)
    price = prices(own, Others([other]), damage, 1e-6, moved=np.ones(1), gates=Gates(), epsilon=EPSILON)
    assert not price.any()


def test_gated_units_stay_out_and_without_others_nothing_has_a_price() -> None:
    rng = np.random.default_rng(9)
    own, damage = arrays(rng), arrays(rng, positive=True)
    own["a"][:30] = 0
    other = arrays(rng)
    (plane,) = chosen(own, Others([other]), damage, 100, Gates())
    assert plane.positions["a"].min() >= 30 * 40
    assert priced(own, NO_OTHERS, np.zeros(0)) is own


@pytest.mark.parametrize("size", [0.05, 20.0])
def test_benefits_of_a_later_step_may_be_smaller_than_those_of_the_other_axes(size: float) -> None:
    """They are weighted by what is not won yet, the other axes' are not."""
    rng = np.random.default_rng(11)
    own, damage = arrays(rng), arrays(rng, positive=True)
    others = Others([mixed(arrays(rng), own, 0.8), mixed(arrays(rng), own, -0.4)])
    small = {name: np.float32(size) * values for name, values in own.items()}
    assert (
        np.abs(others.moved(chosen(small, others, damage, 100, Gates()))).max()
        < 0.03 * others.moved(chosen(own, NO_OTHERS, damage, 100, Gates())).max()
    )
