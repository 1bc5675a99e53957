"""Which tokens each filter leaves, and that draws follow the probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.runtime.onnx_sampler import OnnxSampler
from persona_edge.runtime.values import SamplingOptions

LOGITS = np.log(np.array([0.05, 0.4, 0.2, 0.3, 0.05], np.float32))
OPEN = SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0)


def _drawn(options: SamplingOptions, logits: NDArray[np.float32] = LOGITS, n: int = 400) -> set[int]:
    return {OnnxSampler(SamplingOptions(**{**vars(options), "seed": seed})).choose(logits) for seed in range(n)}


def test_greedy_takes_the_likeliest() -> None:
    assert OnnxSampler(SamplingOptions(temperature=0)).choose(LOGITS) == 1


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.01}, {1}),
        ({"min_p": 0.6}, {1, 3}),
        ({"top_k": 3, "min_p": 0.4}, {1, 2, 3}),
    ],
)
def test_each_filter_leaves_what_it_says(change: dict[str, float], left: set[int]) -> None:
    assert _drawn(SamplingOptions(**{**vars(OPEN), **change})) == left


def test_draws_follow_the_probabilities() -> None:
    sampler = OnnxSampler(SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0, seed=1))
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=5) / 4000
    assert np.abs(counts - np.exp(LOGITS)).max() < 0.03


def test_a_penalty_lowers_what_was_said_and_leaves_the_logits_alone() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    sampler = OnnxSampler(SamplingOptions(temperature=0, repeat_penalty=1.5), prompt=[0])
    assert [sampler.choose(logits), sampler.choose(logits)] == [1, 0]
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0])


def test_what_was_said_long_ago_is_forgotten() -> None:
    sampler = OnnxSampler(SamplingOptions(temperature=0, repeat_penalty=2), prompt=[0] + [1] * 64)
    assert sampler.choose(np.array([2.0, 1.9, 1.5], np.float32)) == 0


def test_equal_seeds_draw_equally() -> None:
    options = SamplingOptions(**{**vars(OPEN), "seed": 9})
    one, other = OnnxSampler(options), OnnxSampler(options)
    assert [one.choose(LOGITS) for _ in range(20)] == [other.choose(LOGITS) for _ in range(20)]
