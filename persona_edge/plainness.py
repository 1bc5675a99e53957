"""How likely a model that nothing was done to finds the two sides of a set, and how evenly. Needs the offline extra.

A mask is found from what differs between two answers as the model sees them. Answers that it would hardly give itself
teach it a style instead of a pole, and a side that it prefers anyway tilts the measure (personas/README.md).
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from persona_edge.contrasts import CalibrationSet
from persona_edge.set_checker import Finding

if TYPE_CHECKING:
    from persona_edge.calibration import Progress
    from persona_edge.evaluation import AnswerScores
    from persona_edge.modeling import TorchModel

__all__ = ["plainness_findings", "plainness_lines", "score_set"]

AT_ONCE: Final = 32
"""Contrasts between two reports of progress."""

ENOUGH: Final = 10
"""From this many contrasts on, shares and means are judged."""
FAR_BELOW: Final = 1.0
"""An answer this many nats per token below the mean of all, or with such a margin, is one to look at."""
EVEN: Final = (0.35, 0.65)
"""The share of contrasts whose positive answer the unmodified model may prefer."""
LEAST_LEVEL: Final = -4.0
"""The mean level below which the MBTI sets made worse masks of a 135M model; larger models lie higher."""


def score_set(model: TorchModel, contrasts: CalibrationSet, progress: Progress) -> AnswerScores:
    """Both answers of every contrast under `model`. CalibrationError for a set without contrasts."""
    from persona_edge.encoding import encode_contrast
    from persona_edge.evaluation import AnswerScores, score_answers

    pairs = [encode_contrast(model.tokenizer, contrast, i) for i, contrast in enumerate(contrasts.contrasts)]
    parts = []
    for start in range(0, max(len(pairs), 1), AT_ONCE):
        progress(f"answers {contrasts.axis}", start, len(pairs))
        parts.append(score_answers(model, pairs[start : start + AT_ONCE]))
    progress(f"answers {contrasts.axis}", len(pairs), len(pairs))
    return AnswerScores(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(AnswerScores)))


def plainness_lines(scores: AnswerScores, model_name: str) -> tuple[str, str]:
    """Levels, balance and spread in words."""
    from persona_edge.evaluation import summarize

    found = summarize(scores)
    positive, negative = scores.levels
    return (
        f"under {model_name}: {found.mean_positive:.2f} and {found.mean_negative:.2f} nats per token",
        f"prefers the positive answer in {found.share_mean:.0%} (50% is even); "
        f"margins {found.mean_margin:+.2f}, spread {(positive - negative).std():.2f}",
    )


def plainness_findings(scores: AnswerScores) -> tuple[Finding, ...]:
    """Warnings, never errors: another model would judge otherwise."""
    positive, negative = scores.levels
    margins, level = positive - negative, float(np.concatenate([positive, negative]).mean())
    rare = np.minimum(positive, negative) < level - FAR_BELOW
    lopsided = (np.abs(margins) > FAR_BELOW) & ~rare
    share = float((margins > 0).mean())
    warnings = []
    if len(margins) >= ENOUGH and level < LEAST_LEVEL:
        warnings.append(_warning("plain", f"{level:.2f} nats per token is far from how this model talks"))
    if len(margins) >= ENOUGH and not EVEN[0] <= share <= EVEN[1]:
        rarer = "negative" if share > EVEN[1] else "positive"
        warnings.append(_warning("even", f"the {rarer} answer is the likelier in only {min(share, 1 - share):.0%}"))
    if rare.any():
        warnings.append(_warning("plain", "an answer is far less likely than the others are", rare))
    if lopsided.any():
        warnings.append(_warning("even", "one answer is far likelier than the other", lopsided))
    return tuple(warnings)


def _warning(rule: str, message: str, chosen: NDArray[np.bool_] | None = None) -> Finding:
    at = () if chosen is None else tuple(int(i) + 1 for i in np.flatnonzero(chosen))
    return Finding(rule, "warning", f"{message}; answer in plainer words", at)
