"""How much of each pole a composition takes, so that it keeps within its limits on drift.

Poles are found one by one, and their drift adds up: four poles that are each within a limit are not, together, within
what is wanted of a persona. So a composition takes some of them at a strength below 1, those first that have effect to
spare. At strength s a pole moves its margin by about s times as much and costs about s^2 of its drift, so with

    z_p(s) = before_p + UNSEEN s (after_p - before_p)      mean margin toward pole p over its standard deviation
    sum_p exp(-SHARPNESS z_p(s_p))                         is least
    subject to sum_p cost_lp s_p^2 <= 1                    for every limit l, cost as a share of the limit

The sum is ruled by the pole that is held least, as a persona has to hold all of its poles at once: one that wins all of
its contrasts gives way, one that hardly holds does not. Both sums fall apart into poles, so one Lagrange multiplier,
found by bisection, leaves a search over the strengths of a single pole. NumPy only; docs/method.md has what it gains.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHOICES", "balanced_strengths", "strengths_within"]

Floats = NDArray[np.float64]
CHOICES: Floats = np.arange(30, 101, 5) / 100
"""The strengths to choose from."""
UNSEEN = 0.65
"""How far contrasts that a mask has not seen move, as a share of how far those move that it was found with."""
SHARPNESS = 3.0
"""How much more a pole that is held less counts; infinity would be the least one alone."""
HALVINGS = 40
TRIALS = 4
LEAST_COST = 1e-6  # of a limit, so that a pole without drift divides by no zero


def strengths_within(
    measure: Callable[[Floats], Floats], costs: Floats, reserves: Callable[[], tuple[Floats, Floats]]
) -> Floats:
    """The strengths, (n_poles,), at which poles are composed so that `measure` finds no limit exceeded.

    `measure(strengths)` is the share of each limit that is used, (n_limits,), and `costs` (n_limits, n_poles) what it
    is for each pole alone. What poles cost together is not quite the sum of these, so they are brought to scale with
    every measurement. `reserves` gives `before` and `after` of `balanced_strengths`, and is asked only if need be.
    After `TRIALS` measurements the last strengths stand, whatever they use.
    """
    costs = np.maximum(costs, LEAST_COST)
    strengths = np.ones(costs.shape[1])
    used = measure(strengths)
    if (used <= 1).all():
        return strengths
    before, after = reserves()
    for _ in range(TRIALS):
        costs = costs * (used / (costs @ strengths**2))[:, None]
        strengths = balanced_strengths(before, after, costs)
        used = measure(strengths)
        if (used <= 1).all():
            break
    return strengths


def balanced_strengths(before: Floats, after: Floats, costs: Floats) -> Floats:
    """The strengths above, (n_poles,), each of `CHOICES`; all the lowest where not even these keep within the limits.

    `before` and `after` (n_poles,) are mean margins toward each pole over their standard deviation, without a mask and
    with all poles at strength 1; `costs` (n_limits, n_poles) what a pole at strength 1 uses of each limit.
    """
    if _within(np.ones(len(before)), costs):
        return np.ones(len(before))
    held = -np.exp(-SHARPNESS * (before[:, None] + UNSEEN * (after - before)[:, None] * CHOICES))
    exceeded = costs[costs.sum(1) > 1].sum(0)

    def at(price: float) -> Floats:
        return np.asarray(CHOICES[np.argmax(held - price * exceeded[:, None] * CHOICES**2, axis=1)])

    low, high = -12.0, 12.0  # decimal exponents of the price
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _within(at(10**middle), costs) else (middle, high)
    return at(10**high)


def _within(strengths: Floats, costs: Floats) -> bool:
    return bool((costs @ strengths**2 <= 1).all())
