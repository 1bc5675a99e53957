"""How much of each pole a composition takes, so that it keeps within its limits on drift and holds all of its poles.

Poles are found one by one. Together their drifts add up, and they weaken one another: on its own axis a pole does less
beside others than it does alone. So a composition takes some poles at a strength below 1. To first order a pole's
effect grows with its strength s and its drift with s^2, and what another takes from it grows with both, so with

    z_p(s) = before_p + UNSEEN s_p (alone_p + sum_q s_q beside_pq)    mean margin toward pole p, in its spread
    sum_p exp(-SHARPNESS z_p(s))                                      is least
    subject to sum_p cost_lp s_p^2 <= 1                               for every limit l, cost as a share of it

The sum is ruled by the pole that is held least, as a persona has to hold all of its poles at once: one that wins all of
its contrasts gives way, one that hardly holds does not, and whatever weakens it does. One Lagrange multiplier, found by
bisection, leaves strengths that are bettered one at a time. NumPy only; docs/method.md has what it gains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHOICES", "Effects", "balanced_strengths", "strengths_within"]

Floats = NDArray[np.float64]
CHOICES: Floats = np.arange(30, 101, 5) / 100
"""The strengths to choose from."""
UNSEEN = 0.65
"""How far contrasts that a mask has not seen move, as a share of how far those move that it was found with."""
SHARPNESS = 3.0
"""How much more a pole that is held less counts; infinity would be the least one alone."""
HALVINGS = 30
TRIALS = 4
LARGEST_SWEEPS = 20  # two or three are usual
LEAST_COST = 1e-6  # of a limit, so that a pole without drift divides by no zero


@dataclass(frozen=True)
class Effects:
    """Mean margins toward each pole on its own axis, over the spread of these margins in the unmodified model.

    `before` (n_poles,) is without a mask, `alone` (n_poles,) how far the pole moves it by itself at strength 1, and
    `beside` (n_poles, n_poles) how much further, where negative less far, pole p moves it with pole q at strength 1
    beside it; its diagonal is not read.
    """

    before: Floats
    alone: Floats
    beside: Floats

    def held(self, strengths: Floats) -> Floats:
        """z_p(s) above at `strengths` (..., n_poles), of the same shape."""
        beside = self.beside - np.diag(np.diag(self.beside))
        return np.asarray(self.before + UNSEEN * strengths * (self.alone + strengths @ beside.T))


def strengths_within(measure: Callable[[Floats], Floats], costs: Floats, effects: Effects) -> Floats:
    """The strengths, (n_poles,), at which poles are composed so that `measure` finds no limit exceeded.

    `measure(strengths)` is the share of each limit that is used, (n_limits,), and `costs` (n_limits, n_poles) what it
    is for each pole alone. What poles cost together is not quite the sum of these, so they are brought to scale with
    every measurement. After `TRIALS` measurements the last strengths stand, whatever they use.
    """
    costs = np.maximum(costs, LEAST_COST)
    strengths = np.ones(costs.shape[1])
    used = measure(strengths)
    for _ in range(TRIALS):
        costs = costs * (used / (costs @ strengths**2))[:, None]
        found = balanced_strengths(effects, costs)
        if (found == strengths).all():
            break
        strengths, used = found, measure(found)
        if (used <= 1).all():
            break
    return strengths


def balanced_strengths(effects: Effects, costs: Floats) -> Floats:
    """The strengths above, (n_poles,), each of `CHOICES`; all the lowest where not even these keep within the limits.

    `costs` (n_limits, n_poles) is what a pole at strength 1 uses of each limit.
    """
    free = _bettered(effects, np.zeros(costs.shape[1]))
    if _within(free, costs):
        return free
    exceeded = costs[costs @ free**2 > 1].sum(0)
    low, high = -12.0, 12.0  # decimal exponents of the price of drift
    found = np.full(costs.shape[1], CHOICES[0])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        strengths = _bettered(effects, 10**middle * exceeded)
        if _within(strengths, costs):
            high, found = middle, strengths
        else:
            low = middle
    return found


def _bettered(effects: Effects, prices: Floats) -> Floats:
    """From all poles whole, each strength in turn set to what is best beside the others, until none changes."""
    strengths = np.ones(len(prices))
    for _ in range(LARGEST_SWEEPS):
        before = strengths.copy()
        for pole in range(len(prices)):
            tried = np.tile(strengths, (len(CHOICES), 1))
            tried[:, pole] = CHOICES
            lost = np.exp(-SHARPNESS * effects.held(tried)).sum(1) + tried**2 @ prices
            strengths[pole] = CHOICES[len(CHOICES) - 1 - np.argmin(lost[::-1])]  # the higher of equals
        if (strengths == before).all():
            break
    return strengths


def _within(strengths: Floats, costs: Floats) -> bool:
    return bool((costs @ strengths**2 <= 1).all())
