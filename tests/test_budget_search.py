"""The budget search on drift curves of known shape: power laws, bends, floors, noise, and models that break."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_edge.budget_search import BudgetResult, Drift, Trial, search_budget
from persona_edge.errors import InputError, SelectionError

Curve = Callable[[float], Drift]


def power_law(budget_at_limit: float, exponent: float) -> Curve:
    """Chat KL of 0.2 exactly at `budget_at_limit`."""
    return lambda budget: Drift(1.0, 0.2 * (budget / budget_at_limit) ** exponent)


def search(measure: Curve, start: float = 0.003, n_steps: int = 6) -> BudgetResult:
    return search_budget(measure, start=start, max_perplexity_ratio=1.02, max_chat_kl=0.2, n_steps=n_steps)


def assert_settled(result: BudgetResult, limit: float) -> None:
    """Within the limit of 0.2, and 5 % from it in drift or in budget: the two ways in which a search may end early."""
    assert result.drift.chat_kl <= 0.2
    assert result.drift.chat_kl >= 0.95 * 0.2 or result.budget * 1.05 >= limit * (1 - 1e-9)
    assert len(result.trials) <= 5


@given(log_limit=st.floats(-4, 1), exponent=st.floats(0.7, 1.6))
def test_power_laws_take_few_measurements(log_limit: float, exponent: float) -> None:
    """From a start up to 54 times too large or 2.7 times too small."""
    limit = 0.003 * math.exp(log_limit)
    assert_settled(search(power_law(limit, exponent)), limit)


@given(log_limit=st.floats(-0.1, 0.1), exponent=st.floats(0.7, 1.6))
def test_a_start_next_to_the_limit_needs_no_detour(log_limit: float, exponent: float) -> None:
    limit = 0.003 * math.exp(log_limit)
    result = search(power_law(limit, exponent))
    assert_settled(result, limit)
    assert len(result.trials) <= 4


def test_a_start_close_to_the_limit_is_settled_in_two() -> None:
    assert len(search(power_law(0.002, 1.0)).trials) == 2
    assert len(search(power_law(0.00303, 1.0)).trials) == 1


@given(seed=st.integers(0, 10_000), log_limit=st.floats(-4, 3), exponent=st.floats(0.5, 2), noise=st.floats(0, 0.3))
def test_noise_never_yields_a_budget_that_was_not_measured_within(
    seed: int, log_limit: float, exponent: float, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    calls: list[float] = []

    def measure(budget: float) -> Drift:
        calls.append(budget)
        jitter = math.exp(noise * rng.standard_normal())
        ratio = 0.97 + 0.05 * (budget / (0.003 * math.exp(log_limit))) ** exponent  # falls below 1 for small masks
        return Drift(ratio, 0.2 * jitter * (budget / 0.003) ** exponent * math.exp(-log_limit * exponent))

    result = search(measure)
    assert [trial.budget for trial in result.trials] == calls
    assert len(calls) <= 6
    assert len(set(calls)) == len(calls)
    within = [t for t in result.trials if t.drift.perplexity_ratio <= 1.02 and t.drift.chat_kl <= 0.2]
    assert result.budget == max(t.budget for t in within)
    assert Trial(result.budget, result.drift, True) in result.trials


def bent(budget: float) -> Drift:
    """Flat, then a cliff: the model breaks suddenly at twice the start."""
    return Drift(1.0, 0.01 + (0.0 if budget < 0.006 else 100 * (budget - 0.006)))


def test_a_cliff_is_found_by_bisection() -> None:
    result = search(bent, start=0.001, n_steps=10)
    assert 0.004 < result.budget <= 0.0079


def test_a_broken_model_counts_as_beyond_the_limit() -> None:
    result = search(lambda b: Drift(math.inf, math.nan) if b > 1e-3 else Drift(1.0, 150 * b), n_steps=8)
    assert 0.5e-3 < result.budget <= 1e-3
    assert not result.trials[0].within


def test_a_drift_that_is_no_number_counts_as_broken_even_if_the_perplexity_is_fine() -> None:
    result = search(lambda b: Drift(1.0, math.nan) if b > 1e-3 else Drift(1.0, 150 * b), n_steps=8)
    assert [trial.within for trial in result.trials[:2]] == [False, True]
    assert 0.5e-3 < result.budget <= 1e-3


def test_the_exponent_is_learned_from_the_first_two_measurements() -> None:
    """Drift that grows as a square root, from 16 times the limit: a fixed exponent of 1 takes 6 measurements."""
    assert len(search(power_law(0.003 / 16, 0.5)).trials) == 3


def test_secants_that_creep_along_a_steep_curve_give_way_to_bisection() -> None:
    """Drift that grows as the 12th power: secants alone end at two thirds of the limit after 6 measurements."""
    limit = 0.003 / 4
    result = search(lambda budget: Drift(1.0, 0.01 + 0.19 * (budget / limit) ** 12))
    assert 0.95 * limit <= result.budget <= limit


def test_the_tighter_limit_decides() -> None:
    result = search(lambda b: Drift(math.exp(10 * b), b))
    assert 1.018 < result.drift.perplexity_ratio <= 1.02
    only_kl = search_budget(lambda b: Drift(math.exp(10 * b), b), start=0.003, max_chat_kl=0.2)
    assert 0.19 <= only_kl.drift.chat_kl <= 0.2


def test_trials_are_told_as_they_are_made() -> None:
    told: list[Trial] = []
    result = search_budget(power_law(1e-4, 1.0), start=0.003, max_chat_kl=0.2, progress=told.append)
    assert tuple(told) == result.trials


def test_a_single_step_measures_only_the_start() -> None:
    assert search(power_law(1.0, 1.0), n_steps=1).budget == 0.003


def test_a_drift_that_never_falls_is_an_error_with_its_numbers() -> None:
    with pytest.raises(SelectionError, match=r"perplexity ratio 1\.5 \(limit 1\.02\) and chat KL 0\.9 nats \(limit 0"):
        search(lambda budget: Drift(1.5, 0.9))


def test_errors_of_the_measurement_pass_through() -> None:
    def fail(budget: float) -> Drift:
        raise SelectionError("no unit fits")

    with pytest.raises(SelectionError, match="no unit fits"):
        search(fail)


@pytest.mark.parametrize(
    ("start", "ratio", "kl", "n_steps", "tolerance", "shows"),
    [
        (0.003, None, None, 6, 0.05, "needs a limit"),
        (0.003, 1.0, None, 6, 0.05, "above 1, not 1.0"),
        (0.003, None, 0.0, 6, 0.05, "above 0 nats"),
        (0.003, math.nan, None, 6, 0.05, "not nan"),
        (0.0, None, 0.2, 6, 0.05, "not 0.0"),
        (0.003, None, 0.2, 0, 0.05, "at least 1 measurement"),
        (0.003, None, 0.2, 6, 1.0, "between 0 and 1"),
    ],
)
def test_unusable_options(
    *, start: float, ratio: float | None, kl: float | None, n_steps: int, tolerance: float, shows: str
) -> None:
    with pytest.raises(InputError) as raised:
        search_budget(
            power_law(1, 1),
            start=start,
            max_perplexity_ratio=ratio,
            max_chat_kl=kl,
            n_steps=n_steps,
            tolerance=tolerance,
        )
    assert shows in str(raised.value)
