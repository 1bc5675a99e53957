"""From statistics to the planes of one pole: `fisher_planes` for the default, `paper_planes` for the paper's methods.

A `PlaneMaker` turns an amount (a budget in nats per token, or a share of the units) into planes. Ranking is done once,
so that a search over budgets only cuts. Weights come from the model one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.calibration import DamageStatistics
from persona_edge.errors import InputError
from persona_edge.masks import Gates, Granularity, Plane
from persona_edge.modeling import TorchModel
from persona_edge.per_tensor import PerTensor
from persona_edge.scores import (
    contrastive_sparse_scores,
    contrastive_wanda_scores,
    gate_fisher_damage,
    kfac_group_damage,
    wanda_scores,
    weighted_damage,
)
from persona_edge.selection import RankedPlanes, rank_planes, select_by_density, select_top_k_per_row
from persona_edge.separation import NO_OTHERS, Others, priced, prices
from persona_edge.statistics import Statistics

__all__ = [
    "METHODS",
    "Damages",
    "Gates",
    "Method",
    "PlaneMaker",
    "Side",
    "fisher_planes",
    "paper_planes",
    "tensor_damages",
]

Method = Literal["contrastive-fisher", "wanda", "contrastive-wanda", "contrastive-sparse"]
METHODS: tuple[Method, ...] = ("contrastive-fisher", "wanda", "contrastive-wanda", "contrastive-sparse")
Side = Literal["positive", "negative"]
Floats = NDArray[np.float32]
PlaneMaker = Callable[[float], tuple[Plane, ...]]


@dataclass(frozen=True)
class Damages:
    """Damage of closing each gate by kind of neutral text, nats per token, (n_rows, n_units) per tensor."""

    web: Mapping[str, Floats]
    chat: Mapping[str, Floats]

    def weighted(self, web: float, chat: float) -> PerTensor:
        """The weighted sum of both when asked for, in nats per token of web text when `web` is 1."""
        return PerTensor(self.web, lambda name: weighted_damage((self.web[name], self.chat[name]), (web, chat)))

    @property
    def n_units(self) -> int:
        """All units of the tensors that may be masked."""
        return sum(damage.size for damage in self.web.values())


def tensor_damages(
    model: TorchModel, names: Sequence[str], statistics: DamageStatistics, *, granularity: Granularity = 32
) -> Damages:
    """K-FAC's damage on web text and on chat turns, each with the gates' own Fisher where both texts' was gathered.

    The gates' own Fisher is there for groups only (docs/method.md).
    """
    both = (statistics.web, statistics.chat)
    with_gates = granularity != 1 and all("gate_gradient_square" in s.sums for s in both)
    web, chat = (_text_damage(model, names, s, granularity, with_gates=with_gates) for s in both)
    return Damages(web, chat)


def _text_damage(
    model: TorchModel, names: Sequence[str], statistics: Statistics, granularity: Granularity, *, with_gates: bool
) -> dict[str, Floats]:
    inputs = statistics.mean("input_square", "tokens")
    outputs = statistics.mean("output_gradient_square", "tokens")
    gates: Mapping[str, Floats] = statistics.mean("gate_gradient_square", "tokens") if with_gates else {}
    damage = {}
    for name in names:
        kfac = kfac_group_damage(model.layer(name).weights(), inputs[name], outputs[name], group_size=granularity)
        damage[name] = kfac + gate_fisher_damage(gates[name]) if with_gates else kfac
    return damage


def fisher_planes(
    benefits: Mapping[str, Floats],
    damage: Mapping[str, Floats],
    side: Side,
    gates: Gates,
    granularity: Granularity,
    *,
    gated: Sequence[Plane] = (),
    others: Others = NO_OTHERS,
    budget: float = 0.0,
) -> RankedPlanes:
    """Units ranked by benefit per damage for one pole (contrastive-fisher); cut it at a budget or a density.

    `benefits` are what closing each gate does toward the positive pole, nats of margin, (n_rows, n_units) per tensor.
    Units of the planes `gated` stay out. A unit has a price of its own besides its damage, 1 / n_units nats: units with
    next to no damage and next to no benefit would fill half of the pack for a hundredth of the effect. What it moves on
    the axes `others` has a price too (separation.py), worked out for a cut at `budget`.
    """
    sign = np.float32(1 if side == "positive" else -1)

    def benefit(name: str) -> Floats:
        found = sign * benefits[name]
        for plane in gated:
            if name in plane.positions:
                np.put(found, plane.positions[name], 0)
        return found

    own = PerTensor(damage, benefit)
    epsilon = 1 / sum(benefits[name].size for name in damage)
    price = prices(
        own,
        others,
        damage,
        budget,
        gated=gated,
        gates=gates,
        epsilon=epsilon,
    )
    return rank_planes(
        priced(own, others, price),
        damage,
        suppress_gate=gates.suppress,
        amplify_gate=gates.amplify,
        granularity=granularity,
        epsilon=epsilon,
    )


def paper_planes(
    model: TorchModel, names: Sequence[str], margins: Statistics, *, method: Method, side: Side, gate: float
) -> PlaneMaker:
    """The paper's masks at weight granularity: `maker(amount)` suppresses a share `amount` of the weights.

    wanda keeps the top 1 - amount of each row by |w| mean|x|, contrastive-wanda likewise by its own score;
    contrastive-sparse suppresses the share with the largest difference among what belongs to the other pole.
    """

    def make(amount: float) -> tuple[Plane, ...]:
        if not 0 < amount < 1:
            raise InputError(f"--density must lie between 0 and 1 for {method}, not {amount}")
        positions: dict[str, NDArray[np.uint32]] = {}
        for name in names:  # one tensor at a time: the scores are as large as the weights
            scores = _paper_scores(model.layer(name).weights(), name, margins, method, side)
            if method == "contrastive-sparse":
                positions.update(select_by_density({name: scores}, amount, per_tensor=True))
            else:
                positions.update(select_top_k_per_row({name: scores}, 1 - amount))
        return (Plane(gate, positions, 1),)

    return make


def _paper_scores(weights: Floats, name: str, margins: Statistics, method: Method, side: Side) -> Floats:
    positive, negative = _channels(margins, name, "positive"), _channels(margins, name, "negative")
    mine, other = (positive, negative) if side == "positive" else (negative, positive)
    if method == "wanda":
        return wanda_scores(weights, mine.mean_abs)
    if method == "contrastive-wanda":
        return contrastive_wanda_scores(weights, mine.mean, other.mean, mine.variance, other.variance)
    if method == "contrastive-sparse":
        both = contrastive_sparse_scores(
            wanda_scores(weights, positive.mean_abs), wanda_scores(weights, negative.mean_abs)
        )
        return both.suppression_scores(1 if side == "positive" else -1)
    raise InputError(f"{method!r} is not one of the paper's methods")


@dataclass(frozen=True)
class _Channels:
    mean_abs: Floats
    mean: Floats
    variance: Floats


def _channels(margins: Statistics, name: str, side: Side) -> _Channels:
    n = np.float32(max(margins.counts[f"{side}_tokens"], 1))
    mean = margins.sums[f"{side}_sum"][name] / n
    variance = margins.sums[f"{side}_square"][name] / n - np.square(mean)
    return _Channels(margins.sums[f"{side}_abs"][name] / n, mean, np.maximum(variance, 0))
