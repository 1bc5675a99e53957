"""The strengths at which poles are composed: against a search of all of them, and with a drift that does not add up."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge.composition import CHOICES, SHARPNESS, UNSEEN, Effects, balanced_strengths, strengths_within

Floats = NDArray[np.float64]


def apart(*alone: float) -> Effects:
    """Poles that stand at zero and do not touch one another."""
    return Effects(np.zeros(len(alone)), np.array(alone), np.zeros((len(alone), len(alone))))


def objective(effects: Effects, strengths: Floats) -> float:
    """The least z, softly: ln of the sum of exp(-3 z), with its sign turned, over 3; one pole after the other."""
    total = 0.0
    for p, s in enumerate(strengths):
        others = sum(strengths[q] * effects.beside[p, q] for q in range(len(strengths)) if q != p)
        total += math.exp(-SHARPNESS * (effects.before[p] + UNSEEN * s * (effects.alone[p] + others)))
    return -math.log(total) / SHARPNESS


def test_nothing_gives_way_within_the_limits() -> None:
    assert balanced_strengths(apart(1, 1), np.array([[0.5, 0.5], [0.2, 0.3]])).tolist() == [1.0, 1.0]


def test_a_pole_with_effect_to_spare_gives_way_first() -> None:
    costs = np.array([[0.6, 0.6]])
    strong, weak = balanced_strengths(apart(4, 1), costs)
    assert strong < weak == 1.0
    assert 0.6 * strong**2 + 0.6 * weak**2 <= 1


def test_of_poles_alike_the_one_that_drifts_more_gives_way() -> None:
    costly, cheap = balanced_strengths(apart(1, 1), np.array([[1.0, 0.3]]))
    assert costly < cheap


def test_a_pole_that_weakens_another_gives_way_though_limits_have_room() -> None:
    effects = Effects(np.zeros(3), np.array([4.0, 1.5, 4.0]), np.array([[0, 0, 0], [-1.0, 0, 0], [0, 0, 0]]))
    taker, weak, bystander = balanced_strengths(effects, np.full((1, 3), 0.1))
    assert taker < weak == bystander == 1.0


def test_a_pole_is_not_weakened_for_what_it_does_to_a_stronger_one() -> None:
    effects = Effects(np.zeros(2), np.array([4.0, 1.0]), np.array([[0, -1.0], [0, 0]]))
    assert balanced_strengths(effects, np.full((1, 2), 0.1)).tolist() == [1.0, 1.0]


def test_a_limit_that_nothing_meets_takes_the_lowest_strengths() -> None:
    assert balanced_strengths(apart(1, 1), np.array([[40.0, 40.0]])).tolist() == [CHOICES[0]] * 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_it_is_nearly_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    effects = Effects(random.normal(0, 0.5, 3), random.uniform(0.8, 3, 3), random.uniform(-0.4, 0.2, (3, 3)))
    costs = random.uniform(0.2, 0.8, (1, 3))
    found = balanced_strengths(effects, costs)
    allowed = [s for s in map(np.array, itertools.product(CHOICES, repeat=3)) if (costs @ s**2 <= 1).all()]
    best = max(objective(effects, s) for s in allowed)
    assert (costs @ found**2 <= 1).all()
    # One multiplier reaches the hull of what is possible, not all of it; a choice of strengths is 0.05 wide.
    assert objective(effects, found) >= best - 0.1


def test_costs_are_brought_to_what_was_measured() -> None:
    """The poles cost half as much again together as alone: the first strengths, at their word, would exceed it."""
    alone = np.array([[0.7, 0.6, 0.4]])
    asked: list[Floats] = []

    def measure(strengths: Floats) -> Floats:
        asked.append(strengths)
        return np.asarray(1.5 * alone @ strengths**2)

    found = strengths_within(measure, alone, apart(2, 1, 1))
    assert measure(found).max() <= 1
    assert asked[0].tolist() == [1, 1, 1]
    assert (found < 1).any()
    assert (alone @ found**2).max() < 0.7


def test_drift_that_grows_otherwise_is_measured_again() -> None:
    alone = np.array([[0.9, 0.9]])
    trials: list[Floats] = []

    def measure(strengths: Floats) -> Floats:  # grows with s, not with its square: harder to get rid of
        trials.append(strengths)
        return np.asarray(alone @ strengths)

    found = strengths_within(measure, alone, apart(1, 1))
    assert (alone @ found <= 1).all()
    assert len(trials) > 2


def test_within_the_limits_one_measurement_is_enough() -> None:
    used = np.array([[0.1, 0.2], [0.3, 0.4]])
    trials: list[Floats] = []

    def measure(strengths: Floats) -> Floats:
        trials.append(strengths)
        return np.asarray(used @ strengths**2)

    assert strengths_within(measure, used, apart(1, 1)).tolist() == [1.0, 1.0]
    assert len(trials) == 1


def test_a_pole_without_drift_divides_by_no_zero() -> None:
    costs = np.array([[0.0, 2.0]])
    found = strengths_within(lambda s: np.asarray(costs @ s**2), costs, apart(1, 1))
    assert found[0] == 1.0
    assert found[1] < 1
