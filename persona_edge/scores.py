"""How much each weight or group matters to a persona: four scores, as pure functions of statistics.

NumPy only. Statistics of one linear layer come in, an array of scores goes out; nothing here runs a model or chooses a
mask (persona_edge.selection does that). `weights` is (n_rows, n_columns): `n_rows` output features, `n_columns` input
features. A group is 32 consecutive weights of one row; at `group_size=1` every function is its weight-level version.
docs/method.md derives the formulas and names their sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError
from persona_edge.masks import GROUP_SIZE

__all__ = [
    "ContrastiveSparse",
    "Phi",
    "contrastive_fisher_ratio",
    "contrastive_sparse_scores",
    "contrastive_wanda_scores",
    "gate_fisher_damage",
    "gate_gradient",
    "kfac_group_damage",
    "suppression_benefit",
    "wanda_scores",
    "weighted_damage",
]

Floats = NDArray[np.float32]
Phi = Literal["abs", "relu", "identity"]

CONTRAST_EPSILON = 1e-6
"""Added to a standard deviation of activations, in their units, so that a dead channel divides by something."""

DAMAGE_EPSILON = 1e-10
"""Added to a damage in nats per token. Far below the damage of any group worth gating, also in an 8B model."""


def wanda_scores(weights: Floats, input_norms: Floats) -> Floats:
    """S_ij = |w_ij| * ||x_j||, shape (n_rows, n_columns).

    `input_norms` (n_columns,) is the size of input channel j over a persona's calibration tokens: the l2 norm in Wanda
    (Sun et al., 2023), the mean |x_j| in the paper this project follows. Both are used as they come. InputError when
    the shapes disagree.
    """
    _require_columns(weights, input_norms=input_norms)
    return _as_float32(np.abs(weights) * input_norms)


def contrastive_wanda_scores(
    weights: Floats,
    mean_pos: Floats,
    mean_neg: Floats,
    var_pos: Floats,
    var_neg: Floats,
    *,
    epsilon: float = CONTRAST_EPSILON,
    phi: Phi = "relu",
) -> Floats:
    """S_ij = |w_ij| * phi((mean_pos_j - mean_neg_j) / (sqrt(var_pos_j + var_neg_j) + epsilon)), (n_rows, n_columns).

    Statistics are (n_columns,). The scores are the positive pole's; swap the two poles' statistics for the negative
    pole's, which turns the sign of the fraction. Under `abs` both poles therefore score alike. Variances that rounding
    left below zero count as zero. InputError when shapes disagree, `epsilon` is not positive or `phi` is unknown.
    """
    _require_columns(weights, mean_pos=mean_pos, mean_neg=mean_neg, var_pos=var_pos, var_neg=var_neg)
    _require_positive(epsilon)
    # In float64: the two means are often nearly equal, and float32 sums of squares would drown their difference.
    difference = np.asarray(mean_pos, np.float64) - np.asarray(mean_neg, np.float64)
    variance = np.maximum(np.asarray(var_pos, np.float64), 0) + np.maximum(np.asarray(var_neg, np.float64), 0)
    contrast = _phi(difference / (np.sqrt(variance) + epsilon), phi)
    return _as_float32(np.abs(weights) * contrast.astype(np.float32))


def _phi(values: NDArray[np.float64], phi: Phi) -> NDArray[np.float64]:
    if phi == "abs":
        return np.abs(values)
    if phi == "relu":
        return np.maximum(values, 0)
    if phi == "identity":
        return values
    raise InputError(f"phi {phi!r} is unknown; use abs, relu or identity")


@dataclass(frozen=True)
class ContrastiveSparse:
    """Two poles' scores set against each other. All arrays are (n_rows, n_columns).

    `positive` and `negative` are the row-normalised scores (each row sums to 1, or is zero); `difference` is
    C = |positive - negative|; `side` (int8) is +1 where the positive pole's score is larger, -1 where the negative
    pole's is, 0 where they are equal.
    """

    positive: Floats
    negative: Floats
    difference: Floats
    side: NDArray[np.int8]

    def kept_by(self, side: Literal[1, -1]) -> NDArray[np.bool_]:
        """The paper's mask M of one pole: the weights assigned to it. The two poles' masks never overlap."""
        return np.asarray(self.side == side, np.bool_)

    def suppression_scores(self, side: Literal[1, -1]) -> Floats:
        """C where the weight belongs to the other pole, 0 elsewhere: what pole `side` suppresses first.

        Cutting a share from the top of these suppresses disjoint weights for the two poles without giving up half of
        the model, as multiplying by `kept_by` would. A share beyond the positive scores would reach into weights that
        no pole claims.
        """
        return np.where(self.side == -side, self.difference, np.float32(0))


def contrastive_sparse_scores(scores_pos: Floats, scores_neg: Floats) -> ContrastiveSparse:
    """Row-normalise both poles' non-negative scores, take the difference, give each weight to the larger side.

    A row whose scores are all zero stays zero. InputError when shapes disagree or a score is negative.
    """
    if scores_pos.shape != scores_neg.shape or scores_pos.ndim != 2:
        raise InputError(f"the poles' scores must be 2-D of one shape, not {scores_pos.shape} and {scores_neg.shape}")
    positive, negative = _row_normalised(scores_pos), _row_normalised(scores_neg)
    signed = positive - negative
    return ContrastiveSparse(positive, negative, np.abs(signed), np.sign(signed).astype(np.int8))


def _row_normalised(scores: Floats) -> Floats:
    if scores.size and scores.min() < 0:
        raise InputError(f"contrastive-sparse needs scores of at least 0, got {scores.min()}; use phi abs or relu")
    sums: NDArray[np.float64] = scores.sum(axis=1, dtype=np.float64, keepdims=True)
    divisors: Floats = np.where(sums > 0, sums, 1.0).astype(np.float32)
    return _as_float32(scores / divisors)


def gate_gradient(weights: Floats, weight_gradient: Floats, *, group_size: int = GROUP_SIZE) -> Floats:
    """dm/dgamma_g = sum over j in g of w_ij * dm/dw_ij, shape (n_rows, n_columns // group_size).

    The same number that hooks gather without weight gradients; at `group_size=1` the derivative by each weight's own
    gate. InputError when the shapes disagree or the columns do not divide into groups.
    """
    if weights.shape != weight_gradient.shape:
        raise InputError(f"weights {weights.shape} and their gradient {weight_gradient.shape} must have one shape")
    return _as_float32(_sum_groups(weights * weight_gradient, group_size))


def suppression_benefit(mean_gate_gradient: Floats) -> Floats:
    """b_g = -E[dm/dgamma_g], in nats of margin per unit of gate, any shape.

    Positive where closing the gate moves the model toward the positive pole; the negative pole's benefit is its
    negative, so no gate helps both.
    """
    return _as_float32(np.negative(mean_gate_gradient))


def kfac_group_damage(
    weights: Floats,
    input_second_moment: Floats,
    output_gradient_second_moment: Floats,
    *,
    group_size: int = GROUP_SIZE,
) -> Floats:
    """d = 1/2 E[delta_i^2] * sum over j in g of w_ij^2 E[x_j^2], nats per token, (n_rows, n_columns // group_size).

    `input_second_moment` (n_columns,) is E[x_j^2], `output_gradient_second_moment` (n_rows,) is E[delta_i^2] of the
    log-likelihood of labels sampled from the model, both per token of neutral text (Martens & Grosse, 2015, with both
    factors' diagonals). Terms never cancel, so it sees what closing a gate whose parts cancel at gamma = 1 does.
    InputError when shapes disagree or the columns do not divide into groups.
    """
    _require_columns(weights, input_second_moment=input_second_moment)
    if output_gradient_second_moment.shape != weights.shape[:1]:
        raise InputError(f"output gradients are {output_gradient_second_moment.shape}, weights {weights.shape}")
    energy = _sum_groups(np.square(weights) * input_second_moment, group_size)
    return _as_float32(0.5 * output_gradient_second_moment.astype(np.float64)[:, None] * energy)


def gate_fisher_damage(gate_gradient_second_moment: Floats) -> Floats:
    """d = 1/2 E[(dl/dgamma_g)^2], the gate's own Fisher information, nats per token, any shape."""
    return _as_float32(0.5 * gate_gradient_second_moment)


def weighted_damage(damages: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """sum_k weight_k d_k over neutral texts (web, chat, ...), any shape, in the unit of a damage whose weight is 1.

    InputError when there are none, the shapes disagree, or a weight is not a finite number of at least 0.
    """
    if not damages or len(damages) != len(weights):
        raise InputError(f"{len(weights)} weights do not fit the damages of {len(damages)} neutral texts")
    shapes = {array.shape for array in damages}
    if len(shapes) > 1:
        raise InputError(f"damages of one tensor must have one shape, not {sorted(shapes)}")
    if not all(np.isfinite(weight) and weight >= 0 for weight in weights):
        raise InputError(f"weights of damages must be finite and at least 0, not {list(weights)}")
    total = np.zeros(damages[0].shape, np.float32)
    for array, weight in zip(damages, weights, strict=True):
        total += np.float32(weight) * array
    return total


def contrastive_fisher_ratio(benefit: Floats, damage: Floats, *, epsilon: float = DAMAGE_EPSILON) -> Floats:
    """b / (d + epsilon): margin gained per nat of damage, any shape, signed like the benefit and always finite.

    Quotients that float32 cannot hold stop at its largest value. InputError when shapes disagree or `epsilon` is not
    positive.
    """
    if benefit.shape != damage.shape:
        raise InputError(f"benefit {benefit.shape} and damage {damage.shape} must have one shape")
    _require_positive(epsilon)
    largest = np.finfo(np.float32).max
    ratio = np.asarray(benefit, np.float64) / (np.asarray(damage, np.float64) + epsilon)
    return _as_float32(np.clip(ratio, -largest, largest))


def _sum_groups(values: NDArray[np.float32], group_size: int) -> NDArray[np.float64]:
    n_rows, n_columns = values.shape
    if group_size < 1 or n_columns % group_size:
        raise InputError(f"{n_columns} columns do not divide into groups of {group_size}")
    if group_size == 1:
        return values.astype(np.float64)
    return np.asarray(values.reshape(n_rows, -1, group_size).sum(axis=2, dtype=np.float64))


def _require_columns(weights: Floats, **statistics: Floats) -> None:
    if weights.ndim != 2:
        raise InputError(f"weights must be (n_rows, n_columns), not {weights.shape}")
    for name, values in statistics.items():
        if values.shape != weights.shape[1:]:
            raise InputError(f"{name} is {values.shape}, but the weights {weights.shape} need {weights.shape[1:]}")


def _require_positive(epsilon: float) -> None:
    if not (np.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"epsilon must be a positive number, not {epsilon}")


def _as_float32(values: NDArray[np.floating]) -> Floats:
    return np.asarray(values, np.float32)
