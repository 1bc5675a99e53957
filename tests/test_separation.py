"""A pole's mask leaves the other axes where they are, at the least cost to its own; with none, nothing changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.masks import Gates, Plane
from persona_edge.selection import rank_planes, sum_over
from persona_edge.separation import MOST, MOST_ONE_WAY, NO_OTHERS, Other, Others, priced, prices

Arrays = dict[str, NDArray[np.float32]]
EPSILON = 1e-6


def arrays(rng: np.random.Generator, *, positive: bool = False) -> Arrays:
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("a", (60, 40)), ("b", (50, 30)))}
    return {name: np.abs(values) + np.float32(0.05) for name, values in drawn.items()} if positive else drawn


def mixed(first: Arrays, second: Arrays, share: float) -> Arrays:
    """Arrays that correlate with `second`."""
    return {name: first[name] + np.float32(share) * second[name] for name in first}


def others_of(*axes: Arrays) -> Others:
    """Other axes, balanced on what ranks."""
    return [Other(x, x) for x in axes]


def moved(others: Others, planes: Sequence[Plane]) -> NDArray[np.float64]:
    return np.array([other.moved_by(planes) for other in others])


def chosen(own: Arrays, others: Others, damage: Arrays, budget: float, gates: Gates) -> tuple[Plane, ...]:
    price = prices(own, others, damage, budget, gates=gates, epsilon=EPSILON)
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
    others = others_of(mixed(arrays(rng), own, 0.5), mixed(arrays(rng), own, -0.3), arrays(rng))
    mine = others_of(own)
    apart = chosen(own, others, damage, 100, gates)
    close = chosen(own, NO_OTHERS, damage, 100, gates)
    gain = moved(mine, apart)[0]
    assert np.abs(moved(others, close)).max() > 0.3 * moved(mine, close)[0]
    assert np.abs(moved(others, apart)).max() < 0.02 * gain
    assert 0.5 * moved(mine, close)[0] < gain < moved(mine, close)[0]


def test_noisy_benefits_are_balanced_on_other_contrasts() -> None:
    """What ranks was measured with noise, of which a choice takes what makes its own sum small."""
    rng = np.random.default_rng(2)
    own, damage, gates = arrays(rng), arrays(rng, positive=True), Gates()
    truth = mixed(arrays(rng), own, 0.5)
    first, second = (mixed(arrays(rng), truth, 1) for _ in range(2))
    by = {
        name: abs(moved(others_of(truth), chosen(own, others, damage, 100, gates))[0])
        for name, others in (
            ("not apart", NO_OTHERS),
            ("one half", others_of(first)),
            ("both", [Other(first, second)]),
        )
    }
    assert by["one half"] > 0.3 * by["not apart"]
    assert by["both"] < 0.2 * by["one half"]


def test_contrasts_that_have_nothing_in_common_do_no_harm() -> None:
    rng = np.random.default_rng(4)
    own, damage, gates = arrays(rng), arrays(rng, positive=True), Gates()
    first = arrays(rng)
    opposite = {name: -values for name, values in first.items()}
    others = [Other(mixed(first, own, 0.5), mixed(opposite, own, 0.5))]
    (apart,), (close,) = (chosen(own, each, damage, 100, gates) for each in (others, NO_OTHERS))
    assert list(apart.positions["a"]) == list(close.positions["a"])


def test_no_better_choice_leaves_the_other_axis_alone() -> None:
    """Against every choice there is, on a dozen units: none gains more within the budget without moving the other."""
    rng = np.random.default_rng(3)
    own = {"a": rng.uniform(0.5, 1, (3, 4)).astype(np.float32)}
    other = {"a": rng.uniform(-1, 1, (3, 4)).astype(np.float32)}
    damage = {"a": np.ones((3, 4), np.float32)}
    (plane,) = chosen(own, others_of(other), damage, 6.5, Gates())
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
    planes = chosen(own, [Other(free, free, before)], damage, 200, Gates())
    assert moved(others_of(free), planes)[0] == pytest.approx(-before, abs=8)


@pytest.mark.parametrize("share", [0.5, -0.5])
def test_what_may_be_moved_one_way_is_kept_from_the_other_only(share: float) -> None:
    rng = np.random.default_rng(6)
    own, damage = arrays(rng), arrays(rng, positive=True)
    x = mixed(arrays(rng), own, share)
    free, held = (chosen(own, others, damage, 100, Gates()) for others in (NO_OTHERS, [Other(x, x, one_way=True)]))
    before, after = (moved(others_of(x), planes)[0] for planes in (free, held))
    assert before * share > 0
    assert after == before if share > 0 else abs(after) < 0.02 * abs(before)


def test_one_that_went_the_wrong_way_before_is_brought_back_only() -> None:
    rng = np.random.default_rng(8)
    own, damage, x = arrays(rng), arrays(rng, positive=True), arrays(rng)
    planes = chosen(own, [Other(x, x, -40.0, one_way=True)], damage, 200, Gates())
    assert moved(others_of(x), planes)[0] == pytest.approx(40, abs=8)


def test_an_axis_that_is_the_same_one_costs_no_more_than_the_highest_price() -> None:
    rng = np.random.default_rng(7)
    own, damage = arrays(rng), arrays(rng, positive=True)
    price = prices(own, others_of(own), damage, 50, gates=Gates(), epsilon=EPSILON)
    assert abs(price[0]) <= MOST
    assert chosen(own, others_of(own), damage, 50, Gates())


def test_what_may_be_moved_one_way_may_cost_more() -> None:
    rng = np.random.default_rng(10)
    own, damage = arrays(rng), arrays(rng, positive=True)
    x = mixed(arrays(rng), own, -1)
    both, one = (
        prices(own, [Other(x, x, -4000.0, one_way=one_way)], damage, 100, gates=Gates(), epsilon=EPSILON)[0]
        for one_way in (False, True)
    )
    size = [np.sqrt(sum(np.square(v, dtype=np.float64).sum() for v in each.values())) for each in (own, x)]
    assert both / (size[0] / size[1]) == pytest.approx(-MOST, rel=0.01)
    assert one / (size[0] / size[1]) == pytest.approx(-MOST_ONE_WAY, rel=0.01)


def test_a_budget_that_nothing_fits_into_has_no_prices() -> None:
    rng = np.random.default_rng(13)
    own, other, damage = arrays(rng), arrays(rng), arrays(rng, positive=True)
    price = prices(own, [Other(other, other, 1.0)], damage, 1e-6, gates=Gates(), epsilon=EPSILON)
    assert not price.any()


def test_gated_units_stay_out_and_without_others_nothing_has_a_price() -> None:
    rng = np.random.default_rng(9)
    own, damage = arrays(rng), arrays(rng, positive=True)
    own["a"][:30] = 0
    other = arrays(rng)
    (plane,) = chosen(own, others_of(other), damage, 100, Gates())
    assert plane.positions["a"].min() >= 30 * 40
    assert priced(own, NO_OTHERS, np.zeros(0)) is own


@pytest.mark.parametrize("size", [0.05, 20.0])
def test_benefits_of_a_later_step_may_be_smaller_than_those_of_the_other_axes(size: float) -> None:
    """They are weighted by what is not won yet, the other axes' are not."""
    rng = np.random.default_rng(11)
    own, damage = arrays(rng), arrays(rng, positive=True)
    others = others_of(mixed(arrays(rng), own, 0.8), mixed(arrays(rng), own, -0.4))
    small = {name: np.float32(size) * values for name, values in own.items()}
    assert (
        np.abs(moved(others, chosen(small, others, damage, 100, Gates()))).max()
        < 0.03 * moved(others, chosen(own, NO_OTHERS, damage, 100, Gates())).max()
    )
