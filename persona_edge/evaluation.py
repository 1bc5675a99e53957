"""What a mask does to a torch model: margins on contrasts, drift on neutral text, perplexity.

All log-probabilities are natural; a drift is a mean over predicted tokens, in nats. Margins come both summed over the
answer's tokens and as their mean (length-normalised).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from persona_edge.denormals import denormals_flushed
from persona_edge.encoding import Batch, EncodedText, batches
from persona_edge.errors import CalibrationError
from persona_edge.forward import ROWS_AT_ONCE, raw_scored_logits, scored_targets, target_log_probabilities
from persona_edge.modeling import TorchModel
from persona_edge.packed_pairs import ContrastPair, contrast_batches, pack_pairs, raw_packed_logits

if TYPE_CHECKING:
    import torch

__all__ = ["AnswerScores", "BaseBehaviour", "MarginResult", "margins", "mean_kl", "measure_base", "perplexity"]


@dataclass(frozen=True)
class AnswerScores:
    """Summed log-probabilities and token counts of both answers of each contrast, all (n_contrasts,)."""

    positive: NDArray[np.float64]
    negative: NDArray[np.float64]
    positive_tokens: NDArray[np.int64]
    negative_tokens: NDArray[np.int64]

    @property
    def levels(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The mean log-probability per token of the positive and of the negative answers, nats, (n_contrasts,) each."""
        return self.positive / self.positive_tokens, self.negative / self.negative_tokens


@dataclass(frozen=True)
class MarginResult:
    """Share of contrasts whose positive answer is likelier, by summed and by mean log-probability; mean levels.

    `mean_margin` is in nats per token, as are `mean_positive` and `mean_negative`, the levels themselves: a persona
    that only makes the opposite unlikely shows in them.
    """

    n_contrasts: int
    share_summed: float
    share_mean: float
    mean_margin: float
    mean_positive: float
    mean_negative: float


def margins(model: TorchModel, pairs: Sequence[ContrastPair], *, max_tokens: int = 2048) -> MarginResult:
    """Score both answers of every contrast under the model as it stands now."""
    return summarize(score_answers(model, pairs, max_tokens=max_tokens))


@denormals_flushed()
def score_answers(model: TorchModel, pairs: Sequence[ContrastPair], *, max_tokens: int = 2048) -> AnswerScores:
    """Log-probabilities of the answers, in the order of `pairs`."""
    if not pairs:
        raise CalibrationError("no contrasts to evaluate on")
    import torch

    sums = np.zeros((2, len(pairs)))
    numbered = [(replace(positive, item=i), replace(negative, item=i)) for i, (positive, negative) in enumerate(pairs)]
    for group in contrast_batches(numbered, max_tokens=max_tokens):
        batch = pack_pairs(group, model.device)
        with torch.no_grad():
            log_p = target_log_probabilities(raw_packed_logits(model, batch), batch.targets)
        items = np.array([positive.item for positive, _ in group])[batch.rows.cpu().numpy()]
        np.add.at(sums, ((~batch.is_positive).long().cpu().numpy(), items), log_p.double().cpu().numpy())
    lengths = np.array([[text.n_scored for text in pair] for pair in pairs], dtype=np.int64)
    return AnswerScores(sums[0], sums[1], lengths[:, 0], lengths[:, 1])


def summarize(scores: AnswerScores) -> MarginResult:
    """The shares and levels of `MarginResult`; a tie counts one half."""
    positive, negative = scores.levels
    return MarginResult(
        n_contrasts=len(positive),
        share_summed=_share(scores.positive - scores.negative),
        share_mean=_share(positive - negative),
        mean_margin=float((positive - negative).mean()),
        mean_positive=float(positive.mean()),
        mean_negative=float(negative.mean()),
    )


def _share(margin: NDArray[np.float64]) -> float:
    return float((margin > 0).mean() + 0.5 * (margin == 0).mean())


def _next_logits(model: TorchModel, batch: Batch) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return raw_scored_logits(model, batch)


@denormals_flushed()
def perplexity(model: TorchModel, texts: Sequence[EncodedText], *, max_tokens: int = 2048) -> float:
    """exp of the mean negative log-probability over all scored tokens."""
    total, n = 0.0, 0.0
    for batch in batches(texts, max_tokens=max_tokens, device=model.device):
        total -= float(target_log_probabilities(_next_logits(model, batch), scored_targets(batch)).sum())
        n += float(batch.scored.sum())
    if not n:
        raise CalibrationError("no tokens to measure perplexity on")
    return float(np.exp(total / n))


@dataclass(frozen=True)
class BaseBehaviour:
    """The unmasked model's predictions on neutral texts: what drift is measured against.

    Per batch: the batch and the log-probabilities at its scored positions, (n_scored, n_vocab) float16, in main memory.
    float16 rather than bfloat16: logits never leave its range, and its rounding adds 1e-6 nats to a drift, not 1e-4.
    """

    batches: tuple[Batch, ...]
    log_probabilities: tuple[torch.Tensor, ...]
    perplexity: float


@dataclass(frozen=True)
class NeutralDrift:
    """KL(base || model as it stands) in nats per token, and perplexity relative to base."""

    kl_divergence: float
    perplexity_ratio: float


@denormals_flushed()
def measure_base(model: TorchModel, texts: Sequence[EncodedText], *, max_tokens: int = 1024) -> BaseBehaviour:
    """Record the unmasked model; call it with no mask applied. Memory: 2 bytes x scored tokens x vocabulary."""
    import torch

    groups = tuple(batches(texts, max_tokens=max_tokens, device=model.device))
    recorded: list[torch.Tensor] = []
    total, n = 0.0, 0.0
    for batch in groups:
        logits = _next_logits(model, batch)
        record = torch.empty(logits.shape, dtype=torch.float16)
        for rows, targets in _by_rows(scored_targets(batch)):
            log_p = logits[rows].float().log_softmax(-1)
            total += _sum_at(log_p, targets)
            record[rows] = log_p.to("cpu", torch.float16)
        n += float(batch.scored.sum())
        recorded.append(record)
    if not n:
        raise CalibrationError("no tokens to measure drift on")
    return BaseBehaviour(groups, tuple(recorded), float(np.exp(-total / n)))


@denormals_flushed()
def mean_kl(model: TorchModel, base: BaseBehaviour) -> NeutralDrift:
    """How far the model as it stands now has drifted from `base` on the same texts."""
    kl, log_p, n = 0.0, 0.0, 0.0
    for batch, recorded in zip(base.batches, base.log_probabilities, strict=True):
        logits = _next_logits(model, batch)
        for rows, targets in _by_rows(scored_targets(batch)):
            now = logits[rows].float().log_softmax(-1)
            before = recorded[rows].to(now.device).float().log_softmax(-1)
            kl += float((before.exp() * (before - now)).sum())
            log_p += _sum_at(now, targets)
        n += float(batch.scored.sum())
    return NeutralDrift(kl / n, float(np.exp(-log_p / n)) / base.perplexity)


def _by_rows(targets: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A few rows at a time, with their targets: what is as long as the vocabulary is large."""
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        yield rows, targets[rows]


def _sum_at(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    return float(log_probabilities.gather(-1, targets[:, None]).sum())
