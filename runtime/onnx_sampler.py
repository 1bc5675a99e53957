"""Choosing the next token from logits, in NumPy: the same filters in the same order as the GGUF backend's.

Repetition penalty, then greedy; or top-k, top-p and min-p, each on what the one before left, then temperature and a
draw. Equal options and seed give equal draws on one backend; the two backends use different generators.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from persona_edge.runtime.values import SamplingOptions

__all__ = ["OnnxSampler"]

_PENALTY_WINDOW = 64  # tokens that repeat_penalty looks back


class OnnxSampler:
    """The state of one generation: its random numbers, and what was said last."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int] = ()) -> None:
        """`prompt` is what `repeat_penalty` counts as already said; `options.seed` None counts as 0."""
        self._options = options
        self._random = np.random.default_rng(options.seed or 0)
        self._said = deque(prompt[-_PENALTY_WINDOW:], maxlen=_PENALTY_WINDOW)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """A token for `logits` (n_vocab,), which stay as they are."""
        logits = self._penalized(logits)
        token = int(logits.argmax()) if self._options.temperature == 0 else self._draw(logits)
        self._said.append(token)
        return token

    def _penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        penalty = self._options.repeat_penalty
        if penalty == 1 or not self._said:
            return logits
        said = np.unique(np.fromiter(self._said, np.int64))
        changed = logits.copy()
        changed[said] = np.where(changed[said] > 0, changed[said] / penalty, changed[said] * penalty)
        return changed

    def _draw(self, logits: NDArray[np.float32]) -> int:
        options = self._options
        tokens = _largest(logits, options.top_k)
        kept = logits[tokens].astype(np.float64)
        probabilities = _softmax(kept)
        if options.top_p < 1:
            n = int(np.searchsorted(np.cumsum(probabilities), options.top_p)) + 1
            kept = kept[:n]
        kept = kept[kept >= kept[0] + np.log(options.min_p)] if options.min_p > 0 else kept
        return int(tokens[self._random.choice(len(kept), p=_softmax(kept / options.temperature))])


def _largest(logits: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """The `n` likeliest tokens (0: all), likeliest first; equal ones in the order of their numbers."""
    if not 0 < n < len(logits):
        return np.argsort(-logits, kind="stable")
    threshold = np.partition(logits, -n)[-n]
    candidates = np.flatnonzero(logits >= threshold)
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order][:n]


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum())
