"""Means with 95 % bootstrap intervals, and differences between arms paired item by item.

Resamples are drawn once per number of items and seed, so that the same record always gives the same intervals, and arms
are compared on the same resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.interfaces import SHARE, Items

__all__ = ["Estimate", "estimate", "oriented", "paired_difference"]

N_RESAMPLES: Final = 4000
LEVEL: Final = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n_items`, and the interval that holds it with 95 % confidence; in the items' unit."""

    mean: float
    low: float
    high: float
    n_items: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def estimate(items: Items, *, toward: int = 1, seed: int = 0) -> Estimate | None:
    """The mean of `items` as seen from the pole `toward` (`oriented`); None when no item could be measured.

    Percentile bootstrap. Shares that are all 0 or all 1 get the exact binomial interval (Clopper & Pearson, 1934):
    resampling them shows no spread.
    """
    values = oriented(items, toward)
    values = values[~np.isnan(values)]
    found = _bootstrap(values, seed)
    if found is None or items.unit != SHARE or values.min() != values.max() or values[0] not in (0, 1):
        return found
    margin = 1 - ((1 - LEVEL) / 2) ** (1 / len(values))
    return Estimate(found.mean, max(0.0, found.mean - margin), min(1.0, found.mean + margin), len(values))


def paired_difference(items: Items, other: Items, *, toward: int = 1, seed: int = 0) -> Estimate | None:
    """The mean of `items` minus `other`, item by item, as seen from the pole `toward`; None when items do not pair."""
    if items.values.shape != other.values.shape:
        return None
    difference = oriented(items, toward) - oriented(other, toward)
    return _bootstrap(difference[~np.isnan(difference)], seed)


def oriented(items: Items, toward: int) -> Floats:
    """The values as the pole `toward` sees them: those that are high at the positive pole are mirrored for the other.

    A share or an area under a curve p becomes 1 - p, a score of 1 to 5 points 6 - p, any other value -p.
    """
    if items.higher_is != "positive" or toward >= 0:
        return items.values
    middle = {SHARE: 0.5, "AUC": 0.5, "points 1-5": 3.0}.get(items.unit, 0.0)
    return 2 * middle - items.values


def _bootstrap(values: Floats, seed: int) -> Estimate | None:
    if not len(values):
        return None
    means = _weights(len(values), seed) @ values
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(float(values.mean()), float(low), float(high), len(values))


@lru_cache(maxsize=16)
def _weights(n: int, seed: int) -> Floats:
    """How often each of `n` items is drawn in each resample, over n; (N_RESAMPLES, n)."""
    random = np.random.default_rng((seed, n))
    return random.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
