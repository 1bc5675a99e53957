"""How likely a model that nothing was done to finds the two sides of a set, and how evenly. Needs the offline extra.

A mask is found from what differs between two answers as the model sees them. Answers that it would hardly give itself
teach it a style instead of a pole, and a side that it prefers anyway tilts the measure (personas/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from persona_edge.contrasts import CalibrationSet
from persona_edge.set_checker import Finding

if TYPE_CHECKING:
    from persona_edge.modeling import TorchModel

__all__ = ["Plainness", "measure_plainness", "plainness_findings", "plainness_lines"]

ENOUGH: Final = 10
"""From this many contrasts on, shares and means are judged."""
FAR_BELOW: Final = 1.0
"""An answer this many nats per token below the mean of all, or with such a margin, is one to look at."""
EVEN: Final = (0.35, 0.65)
"""The share of contrasts whose positive answer the unmodified model may prefer."""
LEAST_LEVEL: Final = -4.0
"""The mean level below which the MBTI sets made worse masks of a 135M model; larger models lie higher."""


@dataclass(frozen=True)
class Plainness:
    """Mean log-probability per token of both answers of each contrast, nats, (n_contrasts,) each."""

    positive: NDArray[np.float64]
    negative: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """Positive minus negative, (n_contrasts,)."""
        return self.positive - self.negative


def measure_plainness(model: TorchModel, contrasts: CalibrationSet) -> Plainness:
    """The levels of all answers under `model`. CalibrationError for a set without contrasts."""
    from persona_edge.encoding import encode_contrast
    from persona_edge.evaluation import score_answers

    pairs = [encode_contrast(model.tokenizer, contrast, i) for i, contrast in enumerate(contrasts.contrasts)]
    scores = score_answers(model, pairs)
    return Plainness(scores.positive / scores.positive_tokens, scores.negative / scores.negative_tokens)


def plainness_lines(found: Plainness, model_name: str) -> tuple[str, ...]:
    """Level, balance and spread in words."""
    margins = found.margins
    return (
        f"under {model_name}: {found.positive.mean():.2f} and {found.negative.mean():.2f} nats per token",
        f"prefers the positive answer in {(margins > 0).mean():.0%} (50% is even); "
        f"margins {margins.mean():+.2f}, spread {margins.std():.2f}",
    )


def plainness_findings(found: Plainness) -> tuple[Finding, ...]:
    """Warnings, never errors: another model would judge otherwise."""
    warnings = []
    margins = found.margins
    level = float(np.concatenate([found.positive, found.negative]).mean())
    if len(margins) >= ENOUGH:
        if level < LEAST_LEVEL:
            message = f"{level:.2f} nats per token is far from how this model talks; answer in plainer words"
            warnings.append(Finding("plain", "warning", message))
        share = float((margins > 0).mean())
        if not EVEN[0] <= share <= EVEN[1]:
            rarer = "negative" if share > EVEN[1] else "positive"
            message = f"the {rarer} answer is the likelier in only {min(share, 1 - share):.0%}; make those plainer"
            warnings.append(Finding("even", "warning", message))
    rare = np.minimum(found.positive, found.negative) < level - FAR_BELOW
    if rare.any():
        warnings.append(Finding("plain", "warning", f"{_some(rare)} with an answer far from the others'", _at(rare)))
    lopsided = (np.abs(margins) > FAR_BELOW) & ~rare
    if lopsided.any():
        message = f"{_some(lopsided)} with one answer much likelier than the other"
        warnings.append(Finding("even", "warning", message, _at(lopsided)))
    return tuple(warnings)


def _at(chosen: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) + 1 for i in np.flatnonzero(chosen))


def _some(chosen: NDArray[np.bool_]) -> str:
    n = int(chosen.sum())
    return f"{n} contrast" if n == 1 else f"{n} contrasts"
