"""Keeps a pole from moving the other axes that it is composed with.

Language itself ties the axes together: what planners say is concrete, so the units that make a model plan also make it
concrete, and a persona of J and N loses its N. To first order that is known before a mask is chosen: the other axes'
margins have gradients too. So a unit pays for what it moves on them,

    b'_g = b_g - sum_a p_a x_ag        x_ag = -E[d m_a / d gamma_g], the benefit of unit g toward a's positive pole,

with one price p_a per other axis, such that the units chosen do not move it: p are the Lagrange multipliers of the
selection under sum_g x_ag = 0. The sum is taken with gradients of other contrasts than those that rank: a choice among
thousands of noisy x_ag makes their own sum smaller than it is. Whether replies go round is such an axis too
(repetition.py). NumPy only; docs/method.md has what this costs and buys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import SelectionError
from persona_edge.masks import Gates, Plane
from persona_edge.per_tensor import PerTensor
from persona_edge.selection import gate_distance, rank_planes, sum_over

__all__ = ["NO_OTHERS", "Other", "Others", "priced", "prices"]

MOST = 0.6
"""The highest price, with both axes' benefits on one scale: two axes that are one keep something of each other."""
MOST_ONE_WAY = 1.5
"""The same of what may be moved one way. At 0.6 the mask of S kept the model repeating itself (docs/method.md)."""
ENOUGH = 0.005
"""The share of the pole's own effect that the other axes may still be moved by."""
SWEEPS, HALVINGS = 5, 10
ROOM = 20.0
"""How many times the budget's damage the candidates have, whose choice the prices are worked out on."""
MOST_CANDIDATES = 100_000
"""Of more than these, every second, third, ... is looked at, with that share of the budget."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Other:
    """Something that a pole is to leave alone.

    `benefit` maps tensors to what closing each gate does toward the positive side of it, (n_rows, n_units), nats of
    margin; `check` is the same from other contrasts, and what the balance is made on. `moved` is how far the mask so
    far has moved it, where that was measured; None adds up what its units are said to. With `one_way` it may be moved
    toward its positive side at will.
    """

    benefit: Mapping[str, Floats]
    check: Mapping[str, Floats]
    moved: float | None = None
    one_way: bool = False

    def moved_by(self, planes: Sequence[Plane]) -> float:
        """What `planes` move it by, to first order, nats; what was measured, if it was."""
        if self.moved is not None:
            return self.moved
        return float(sum((1 - p.gate) * sum_over(self.check, p.positions) for p in planes))


Others = Sequence[Other]
NO_OTHERS: Others = ()


def priced(own: Mapping[str, Floats], others: Others, price: NDArray[np.float64]) -> Mapping[str, Floats]:
    """The benefits b' above, made when asked for; units whose own benefit is 0 (gated already) keep it."""
    if not price.any():
        return own

    def benefit(name: str) -> Floats:
        mine = own[name]
        found = mine.copy()
        for p, other in zip(price, others, strict=True):
            found -= np.float32(p) * other.benefit[name]
        return np.where(mine != 0, found, np.float32(0))

    return PerTensor(own, benefit)


def prices(
    own: Mapping[str, Floats],
    others: Others,
    damage: Mapping[str, Floats],
    budget: float,
    *,
    gated: Sequence[Plane] = (),
    gates: Gates,
    epsilon: float,
) -> NDArray[np.float64]:
    """The price of each other axis at which the units chosen within `budget` undo what those of `gated` moved it by.

    Found by bisection, axis by axis and again, on the units that could come into question: what the chosen units move
    an axis by falls as its price rises. Units whose own benefit is 0 (gated already) stay out. (n_axes,) in nats of own
    benefit per nat; 0 where not even one unit fits into the budget.
    """
    price = np.zeros(len(others))
    if not len(price):
        return price
    scale = _scales(own, others)
    moved = np.array([other.moved_by(gated) for other in others])
    one_way = np.array([other.one_way for other in others])
    try:
        chosen = _Candidates(own, others, damage, scale=scale, budget=budget, gates=gates, epsilon=epsilon)
    except SelectionError:  # nothing fits into this budget; whoever asked may look for a larger one
        return price
    for _ in range(SWEEPS):
        for axis in range(len(price)):
            price[axis] = _bisected(chosen, price, axis, scale[axis], moved[axis], one_way=others[axis].one_way)
        gain, moves = chosen.take(price)
        left = np.where(one_way & (moved + moves > 0), 0, (moved + moves) * scale)
        if float(np.abs(left).max()) < ENOUGH * gain:
            break
    return price


def _bisected(
    chosen: _Candidates, price: NDArray[np.float64], axis: int, scale: float, moved: float, *, one_way: bool
) -> float:
    """The price of `axis`, beside the others', at which it is moved back; 0 where that is no help, or not needed."""

    def left(own_price: float) -> tuple[float, float]:
        tried = price.copy()
        tried[axis] = own_price
        gain, moves = chosen.take(tried)
        return moved + float(moves[axis]), gain

    free, gain = left(0.0)
    if one_way and free > 0:
        return 0.0
    most = (MOST_ONE_WAY if one_way else MOST) * scale
    low, high = -most, most
    for _ in range(HALVINGS):
        found = (low + high) / 2
        low, high = (found, high) if left(found)[0] > 0 else (low, found)
    # With nothing in common between the contrasts that rank and those that check, prices do harm.
    return found if abs(left(found)[0]) <= abs(free) + ENOUGH * gain / scale else 0.0


def _scales(own: Mapping[str, Floats], others: Others) -> NDArray[np.float64]:
    """The size of the own benefits over that of each other axis's: those of a later step are weighted, and smaller."""
    mine, theirs = 0.0, np.zeros(len(others))
    for name, values in own.items():
        mine += float(np.square(values, dtype=np.float64).sum())
        theirs += [float(np.square(x.benefit[name], dtype=np.float64).sum()) for x in others]
    return np.asarray(np.sqrt(mine / np.maximum(theirs, 1e-30)))


class _Candidates:
    """The units that some prices within `MOST` could bring into the mask, flat: benefits, damage."""

    def __init__(
        self,
        own: Mapping[str, Floats],
        others: Others,
        damage: Mapping[str, Floats],
        *,
        scale: NDArray[np.float64],
        budget: float,
        gates: Gates,
        epsilon: float,
    ) -> None:
        self.gates, self.epsilon = gates, epsilon

        def bound(name: str) -> Floats:
            found = own[name]
            most = found.copy() if gates.amplify is None else np.abs(found)
            for share, x in zip(scale, others, strict=True):
                most += np.float32((MOST_ONE_WAY if x.one_way else MOST) * share) * np.abs(x.benefit[name])
            return np.where(found != 0, most, np.float32(0))

        ranked = rank_planes(PerTensor(own, bound), damage, suppress_gate=gates.suppress, epsilon=epsilon)
        at = ranked.units.take(ROOM * budget)
        every = 1 + sum(map(len, at.values())) // MOST_CANDIDATES
        at = {name: positions[::every] for name, positions in at.items()}
        self.budget = budget / every
        self.own, self.damage = _gather(own, at), _gather(damage, at)
        self.others = np.stack([_gather(x.benefit, at) for x in others])
        self.balanced = np.stack([_gather(x.check, at) for x in others])

    def take(self, price: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """What the units within the budget do at these prices: to the pole's own margin, and to the other axes'."""
        benefit = self.own - price @ self.others
        distance = gate_distance(benefit.astype(np.float32), self.gates.suppress, self.gates.amplify).astype(np.float64)
        cost = self.damage * distance**2
        ratio = benefit * distance / (cost + self.epsilon)
        order = np.argsort(-ratio, kind="stable")
        order = order[ratio[order] > 0]
        order = order[: np.searchsorted(np.cumsum(cost[order]), self.budget, side="right")]
        return float(self.own[order] @ distance[order]), self.balanced[:, order] @ distance[order]


def _gather(values: Mapping[str, Floats], positions: Mapping[str, NDArray[np.uint32]]) -> NDArray[np.float64]:
    return np.concatenate([values[name].ravel()[at] for name, at in positions.items()]).astype(np.float64)
