"""Per-item values whose mean is the statistic and whose standard error is the statistic's, so that one report fits all.

Intervals are taken over items (`Items.values`). A share or a mean is a mean of items by itself. An area under a curve
is not, so items here are its linearisation: their mean is the statistic exactly, and the standard error of that mean
is the usual one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["auc_values", "bias_free_values", "preference"]

Floats = NDArray[np.float64]


def preference(margin: Floats) -> Floats:
    """1 where the margin is above zero, 0 where it is below, a half where it is zero; same shape."""
    return np.asarray((np.sign(margin) + 1) / 2, dtype=np.float64)


def auc_values(positive: Floats, negative: Floats) -> Floats:
    """Values (n_positive + n_negative,) whose mean is P(a positive score > a negative one); ties count a half.

    The standard error of their mean is that of DeLong, DeLong and Clarke-Pearson (1988); single values may leave 0 to
    1. ValueError when either side is empty.
    """
    if not len(positive) or not len(negative):
        raise ValueError("an area under the curve needs scores on both sides")
    wins = preference(positive[:, None] - negative[None, :])
    area, n = wins.mean(), len(positive) + len(negative)
    return np.concatenate(
        [
            area + n / len(positive) * (wins.mean(axis=1) - area),
            area + n / len(negative) * (wins.mean(axis=0) - area),
        ]
    )


def bias_free_values(scores: Floats, keys: NDArray[np.int64]) -> Floats:
    """How far each score (n,) lies on its key's side (n,), +1 or -1, of the bias: key * (score - bias).

    The bias is the midpoint of the mean score of items keyed +1 and of those keyed -1, so a model that says yes (or
    `accurate`) to everything gets zero, whatever the balance of keys. ValueError when a key has no item.
    """
    if not (keys == 1).any() or not (keys == -1).any():
        raise ValueError("a bias can only be removed when items of both keys are there")
    bias = (scores[keys == 1].mean() + scores[keys == -1].mean()) / 2
    return np.asarray(keys * (scores - bias), dtype=np.float64)
