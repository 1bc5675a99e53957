"""From logits to natural log-probabilities: float32 for the vocabulary, float64 for what is summed over it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["log_p_of_targets", "log_softmax"]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Along the vocabulary: (n_rows, n_vocab) to the same shape."""
    return logits - _log_normalizers(logits)[:, None].astype(np.float32)


def log_p_of_targets(parts: Iterable[NDArray[np.float32]], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probabilities of `targets` (n,), whose rows of logits come in parts that have n rows together."""
    found, start = [np.empty(0)], 0
    for logits in parts:
        rows = np.arange(len(logits))
        chosen = logits[rows, targets[start : start + len(logits)]].astype(np.float64)
        found.append(chosen - _log_normalizers(logits))
        start += len(logits)
    return np.concatenate(found)


def _log_normalizers(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """log of the sum of exp along the vocabulary, (n_rows,)."""
    highest = logits.max(-1, keepdims=True)
    total = np.exp(logits - highest).sum(-1, dtype=np.float64)
    return np.asarray(np.log(total) + highest[:, 0])
