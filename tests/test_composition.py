"""The strengths at which poles are composed: against a search of all of them, and with a drift that does not add up."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge.composition import CHOICES, SHARPNESS, UNSEEN, balanced_strengths, strengths_within

Floats = NDArray[np.float64]


def objective(before: Floats, after: Floats, strengths: Floats) -> float:
    """The least z, softly: ln of the sum of exp(-3 z), with its sign turned, over 3."""
    z = before + UNSEEN * strengths * (after - before)
    return -math.log(float(np.exp(-SHARPNESS * z).sum())) / SHARPNESS


def test_nothing_gives_way_within_the_limits() -> None:
    one = np.ones(2)
    assert balanced_strengths(0 * one, one, np.array([[0.5, 0.5], [0.2, 0.3]])).tolist() == [1.0, 1.0]


def test_a_pole_with_effect_to_spare_gives_way_first() -> None:
    costs = np.array([[0.6, 0.6]])
    strong, weak = balanced_strengths(np.zeros(2), np.array([4.0, 1.0]), costs)
    assert strong < weak == 1.0
    assert 0.6 * strong**2 + 0.6 * weak**2 <= 1


def test_of_poles_alike_the_one_that_drifts_more_gives_way() -> None:
    costly, cheap = balanced_strengths(np.zeros(2), np.ones(2), np.array([[1.0, 0.3]]))
    assert costly < cheap


def test_a_limit_that_nothing_meets_takes_the_lowest_strengths() -> None:
    assert balanced_strengths(np.zeros(2), np.ones(2), np.array([[40.0, 40.0]])).tolist() == [CHOICES[0]] * 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_it_is_nearly_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    before, after = random.normal(0, 0.5, 3), random.uniform(0.3, 3, 3)
    costs = random.uniform(0.2, 0.8, (1, 3))
    found = balanced_strengths(before, after, costs)
    allowed = [s for s in map(np.array, itertools.product(CHOICES, repeat=3)) if (costs @ s**2 <= 1).all()]
    best = max(objective(before, after, s) for s in allowed)
    assert (costs @ found**2 <= 1).all()
    # One multiplier reaches the hull of what is possible, not all of it; a choice of strengths is 0.05 wide.
    assert objective(before, after, found) >= best - 0.1


def test_costs_are_brought_to_what_was_measured() -> None:
    """The poles cost half as much again together as alone: the first strengths, at their word, would exceed it."""
    alone = np.array([[0.7, 0.6, 0.4]])
    asked: list[Floats] = []

    def measure(strengths: Floats) -> Floats:
        asked.append(strengths)
        return np.asarray(1.5 * alone @ strengths**2)

    found = strengths_within(measure, alone, lambda: (np.zeros(3), np.array([2.0, 1.0, 1.0])))
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

    found = strengths_within(measure, alone, lambda: (np.zeros(2), np.ones(2)))
    assert (alone @ found <= 1).all()
    assert len(trials) > 2


def test_effects_are_not_asked_for_when_nothing_has_to_give_way() -> None:
    def never() -> tuple[Floats, Floats]:
        pytest.fail("measured for nothing")

    used = np.array([[0.1, 0.2], [0.3, 0.4]])
    assert strengths_within(lambda s: np.asarray(used @ s**2), used, never).tolist() == [1.0, 1.0]


def test_a_pole_without_drift_divides_by_no_zero() -> None:
    costs = np.array([[0.0, 2.0]])
    found = strengths_within(lambda s: np.asarray(costs @ s**2), costs, lambda: (np.zeros(2), np.ones(2)))
    assert found[0] == 1.0
    assert found[1] < 1
