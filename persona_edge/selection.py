"""Which units a mask gates: cuts the best units, over all tensors at once, from per-tensor benefits and damages.

NumPy only. Arrays are (n_rows, n_units_per_row) per tensor name, row-major, and a *position* is an index into the
flattened array (persona_edge.masks). Every result is deterministic: ties go to the earlier tensor, then to the lower
position. Nothing here builds Python lists of units or sorts them all: a histogram over the leading 16 bits of each key
finds where a cut falls, and only the units of that one bucket are sorted, so 250 million groups (an 8B model) are fine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError, SelectionError
from persona_edge.masks import Granularity, Plane
from persona_edge.per_tensor import PerTensor
from persona_edge.scores import DAMAGE_EPSILON, contrastive_fisher_ratio
from persona_edge.tensor_filter import filter_tensors

__all__ = [
    "RankedPlanes",
    "RankedUnits",
    "check_disjoint",
    "filter_tensors",
    "gate_distance",
    "n_overlapping",
    "rank",
    "rank_planes",
    "rank_scores",
    "select_by_budget",
    "select_by_density",
    "select_planes",
    "select_top_k_per_row",
    "sum_over",
]

Floats = NDArray[np.float32]
PositionMap = Mapping[str, NDArray[np.uint32]]

_BUCKET_BITS = 16
_N_BUCKETS = 1 << (32 - _BUCKET_BITS)


@dataclass(frozen=True)
class RankedUnits:
    """Units in the order a mask takes them, ready to be cut at any budget or density.

    `keys` maps each tensor to uint32 keys, flattened: the larger, the sooner taken; 0 marks a unit never taken.
    `damage` holds nats per token in the same layout. Cuts at growing budgets are nested.
    """

    keys: Mapping[str, NDArray[np.uint32]]
    damage: Mapping[str, Floats]

    @property
    def n_units(self) -> int:
        """All units, also those never taken."""
        return sum(len(keys) for keys in self.keys.values())

    @property
    def n_candidates(self) -> int:
        """Units that a cut may take."""
        return int(self._counts.sum())

    def take(self, budget: float) -> PositionMap:
        """The longest run of best units whose damage adds up to at most `budget` nats per token.

        Positions are ascending uint32; tensors without any are left out. InputError when `budget` is not a positive
        number, SelectionError when no unit fits.
        """
        if not (np.isfinite(budget) and budget > 0):
            raise InputError(f"the budget must be a positive number of nats per token, not {budget}")
        positions = self._cut(self._damages, self.damage, budget)
        if not positions:
            raise SelectionError(f"no unit fits into a budget of {budget:g} nats; {self._why_nothing()}")
        return positions

    def take_density(self, share: float) -> PositionMap:
        """The best `share` of all units (rounded to whole units). Positions as `take` returns them.

        InputError unless 0 < share <= 1; SelectionError when that is no unit, or more units than may be taken.
        """
        wanted = _share_of(share, self.n_units)
        if not 0 < wanted <= self.n_candidates:
            raise SelectionError(
                f"a share of {share:g} is {wanted} of {self.n_units} units, but {self.n_candidates} may be taken; "
                f"choose another share"
            )
        return self._cut(self._counts.astype(np.float64), None, wanted)

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        counts = np.zeros(_N_BUCKETS, np.int64)
        for keys in self.keys.values():
            counts += np.bincount(_buckets(keys), minlength=_N_BUCKETS)
        counts[0] = 0
        return counts

    @cached_property
    def _damages(self) -> NDArray[np.float64]:
        damages = np.zeros(_N_BUCKETS, np.float64)
        for name, keys in self.keys.items():
            damages += np.bincount(_buckets(keys), weights=self.damage[name], minlength=_N_BUCKETS)
        return damages

    def _cut(self, totals: NDArray[np.float64], cost: Mapping[str, Floats] | None, limit: float) -> PositionMap:
        """Take whole buckets from the top while their `totals` fit, then units of the next bucket one by one."""
        running = np.cumsum(totals[:0:-1])  # best bucket first; bucket 0 holds what is never taken
        n_whole = int(np.searchsorted(running, limit, side="right"))
        spent = float(running[n_whole - 1]) if n_whole else 0.0
        edge = _N_BUCKETS - 1 - n_whole
        threshold = np.uint32(min((edge + 1) << _BUCKET_BITS, 0xFFFFFFFF))
        partial = self._best_of_bucket(edge, cost, limit - spent) if edge > 0 else {}
        chosen: dict[str, NDArray[np.uint32]] = {}
        for name, keys in self.keys.items():
            whole = np.flatnonzero(keys >= threshold)
            taken = np.concatenate([whole, partial[name]]) if name in partial else whole
            if len(taken):
                chosen[name] = np.sort(taken).astype(np.uint32)
        return chosen

    def _best_of_bucket(self, bucket: int, cost: Mapping[str, Floats] | None, left: float) -> PositionMap:
        names = list(self.keys)
        found = [np.flatnonzero(_buckets(self.keys[name]) == bucket) for name in names]
        keys = np.concatenate([self.keys[name][at] for name, at in zip(names, found, strict=True)])
        costs = (
            np.ones(len(keys))
            if cost is None
            else np.concatenate([cost[name][at] for name, at in zip(names, found, strict=True)]).astype(np.float64)
        )
        order = np.argsort(~keys, kind="stable")  # stable: ties keep tensor order, then position order
        n_taken = int(np.searchsorted(np.cumsum(costs[order]), left, side="right"))
        taken = np.zeros(len(keys), np.bool_)
        taken[order[:n_taken]] = True
        per_tensor = np.split(taken, np.cumsum([len(at) for at in found])[:-1])
        return {name: at[kept].astype(np.uint32) for name, at, kept in zip(names, found, per_tensor, strict=True)}

    def _why_nothing(self) -> str:
        if not self.n_candidates:
            return "no unit helps this pole at all: check the calibration set"
        best = int(np.flatnonzero(self._counts)[-1])
        cheapest = min(
            float(self.damage[name][_buckets(keys) == best].min(initial=np.inf)) for name, keys in self.keys.items()
        )
        return f"the best ones cost {cheapest:.3g} nats or more: raise the budget"


def rank(
    benefit: Mapping[str, Floats], damage: Mapping[str, Floats], *, epsilon: float = DAMAGE_EPSILON
) -> RankedUnits:
    """Order the units with benefit above 0 by benefit / (damage + epsilon), over all tensors.

    Pass the negated benefit for the opposite pole: the two poles' units are disjoint because no benefit is above 0
    for both. SelectionError that names the tensor when arrays are missing, differ in shape, are not finite, or a damage
    is below 0.
    """
    _require_rankable(benefit, damage)
    keys: dict[str, NDArray[np.uint32]] = {}
    for name, values in benefit.items():
        ratio = contrastive_fisher_ratio(values, damage[name], epsilon=epsilon)
        keys[name] = np.where(values > 0, _sortable(ratio), np.uint32(0)).ravel()
    return RankedUnits(keys, PerTensor(benefit, lambda name: damage[name].ravel()))


def rank_scores(scores: Mapping[str, Floats]) -> RankedUnits:
    """Order all units by score, highest first, each costing nothing; for `take_density`.

    SelectionError that names the tensor when a score is not finite.
    """
    for name, values in scores.items():
        _require_finite(name, "score", values)
    keys = {name: _sortable(values).ravel() for name, values in scores.items()}
    return RankedUnits(keys, {name: np.broadcast_to(np.float32(0), len(k)) for name, k in keys.items()})


def select_by_budget(
    benefit: Mapping[str, Floats], damage: Mapping[str, Floats], budget: float, *, epsilon: float = DAMAGE_EPSILON
) -> PositionMap:
    """`rank` then `take`: the positions that a pole suppresses within `budget` nats per token."""
    return rank(benefit, damage, epsilon=epsilon).take(budget)


def select_by_density(scores: Mapping[str, Floats], share: float, *, per_tensor: bool = False) -> PositionMap:
    """The `share` of units with the highest scores, over all tensors or in each tensor alike.

    Errors as `RankedUnits.take_density` and `rank_scores` raise them.
    """
    if not per_tensor:
        return rank_scores(scores).take_density(share)
    chosen: dict[str, NDArray[np.uint32]] = {}
    for name, values in scores.items():
        chosen.update(rank_scores({name: values}).take_density(share))
    return chosen


def select_top_k_per_row(scores: Mapping[str, Floats], keep: float) -> PositionMap:
    """What the paper's masks suppress: in each row all but the `keep` share of inputs with the highest scores.

    Scores are (n_rows, n_columns); every row keeps the same number of inputs, at least one; of equal scores the lower
    column is kept. InputError unless 0 < keep <= 1; SelectionError when a score is not finite or nothing is suppressed.
    """
    chosen: dict[str, NDArray[np.uint32]] = {}
    for name, values in scores.items():
        _require_finite(name, "score", values)
        suppressed = np.flatnonzero(~_top_k_per_row(values, max(1, _share_of(keep, values.shape[1]))))
        if len(suppressed):
            chosen[name] = suppressed.astype(np.uint32)
    if not chosen:
        raise SelectionError(f"keeping a share of {keep:g} of each row suppresses nothing; keep less")
    return chosen


def _top_k_per_row(values: Floats, k: int) -> NDArray[np.bool_]:
    n_dropped = values.shape[1] - k
    if not n_dropped:
        return np.ones(values.shape, np.bool_)
    lowest_kept = np.partition(values, n_dropped, axis=1)[:, n_dropped, None]
    above, equal = values > lowest_kept, values == lowest_kept
    missing = k - above.sum(axis=1, keepdims=True)
    return np.asarray(above | (equal & (np.cumsum(equal, axis=1) <= missing)), np.bool_)


@dataclass(frozen=True)
class RankedPlanes:
    """Units that a pole suppresses or amplifies, ranked together, ready to be cut at any budget.

    `units` ranks them with the benefit and damage they have at their gate; `suppressed` says which kind a unit is.
    """

    units: RankedUnits
    suppressed: Mapping[str, NDArray[np.bool_]]
    suppress_gate: float
    amplify_gate: float | None
    granularity: Granularity

    def take(self, budget: float) -> tuple[Plane, ...]:
        """One plane per gate that has units, suppress before amplify; errors as `RankedUnits.take` raises them."""
        return self._planes(self.units.take(budget))

    def take_density(self, share: float) -> tuple[Plane, ...]:
        """Like `take`, for the best `share` of all units; errors as `RankedUnits.take_density` raises them."""
        return self._planes(self.units.take_density(share))

    def _planes(self, positions: PositionMap) -> tuple[Plane, ...]:
        suppress: dict[str, NDArray[np.uint32]] = {}
        amplify: dict[str, NDArray[np.uint32]] = {}
        for name, at in positions.items():
            kind = self.suppressed[name][at]
            for plane, kept in ((suppress, at[kind]), (amplify, at[~kind])):
                if len(kept):
                    plane[name] = kept
        gates = ((self.suppress_gate, suppress), (self.amplify_gate, amplify))
        return tuple(Plane(gate, plane, self.granularity) for gate, plane in gates if gate is not None and plane)


def rank_planes(
    benefit: Mapping[str, Floats],
    damage: Mapping[str, Floats],
    *,
    suppress_gate: float = 0.0,
    amplify_gate: float | None = None,
    granularity: Granularity = 32,
    epsilon: float = DAMAGE_EPSILON,
) -> RankedPlanes:
    """Rank suppressing the units with benefit above 0 and, given `amplify_gate`, amplifying those below 0.

    `benefit` and `damage` are those of gate 0. A gate at g moves the margin by (1 - g) of the benefit and costs
    (1 - g)^2 of the damage (first and second order): gate 2 costs what gate 0 does, gate 1.5 a quarter, gate -1 four
    times. InputError when a gate is on the wrong side of 1; other errors as `rank` raises them.
    """
    _require_gates(suppress_gate, amplify_gate)
    if amplify_gate is None and suppress_gate == 0:
        units = rank(benefit, damage, epsilon=epsilon)  # nothing to scale: spares two copies of everything
    else:
        _require_rankable(benefit, damage)

        def factor(name: str) -> Floats:
            return gate_distance(benefit[name], suppress_gate, amplify_gate)

        units = rank(
            PerTensor(benefit, lambda name: benefit[name] * factor(name)),
            PerTensor(benefit, lambda name: damage[name] * factor(name) ** 2),
            epsilon=epsilon,
        )
    suppressed = {name: np.asarray(values > 0, np.bool_).ravel() for name, values in benefit.items()}
    return RankedPlanes(units, suppressed, suppress_gate, amplify_gate, granularity)


def select_planes(
    benefit: Mapping[str, Floats],
    damage: Mapping[str, Floats],
    budget: float,
    *,
    suppress_gate: float = 0.0,
    amplify_gate: float | None = None,
    granularity: Granularity = 32,
    epsilon: float = DAMAGE_EPSILON,
) -> tuple[Plane, ...]:
    """`rank_planes` then `take`: the planes that move the model toward a pole within `budget` nats per token."""
    ranked = rank_planes(
        benefit,
        damage,
        suppress_gate=suppress_gate,
        amplify_gate=amplify_gate,
        granularity=granularity,
        epsilon=epsilon,
    )
    return ranked.take(budget)


def _require_gates(suppress_gate: float, amplify_gate: float | None) -> None:
    if not (np.isfinite(suppress_gate) and suppress_gate < 1):
        raise InputError(f"a suppress gate must be below 1, not {suppress_gate}")
    if amplify_gate is not None and not (np.isfinite(amplify_gate) and amplify_gate > 1):
        raise InputError(f"an amplify gate must be above 1, not {amplify_gate}")


def gate_distance(benefit: Floats, suppress_gate: float, amplify_gate: float | None) -> Floats:
    """1 - gate of each unit: how far its gate moves, signed so that benefit times distance is what the move gains."""
    amplify = 0.0 if amplify_gate is None else 1 - amplify_gate  # 0: a unit that only amplifying would help stays out
    return np.where(benefit > 0, np.float32(1 - suppress_gate), np.float32(amplify))


def sum_over(values: Mapping[str, Floats], positions: PositionMap) -> float:
    """The sum of `values` (benefit or damage) over the units at `positions`, in float64."""
    return float(sum(values[name].ravel()[at].sum(dtype=np.float64) for name, at in positions.items()))


def n_overlapping(first: PositionMap, second: PositionMap) -> int:
    """How many units are in both masks."""
    shared = first.keys() & second.keys()
    return sum(len(np.intersect1d(first[name], second[name], assume_unique=True)) for name in shared)


def check_disjoint(first: PositionMap, second: PositionMap) -> None:
    """Raise SelectionError, naming a tensor, when the two masks share a unit."""
    for name in (name for name in first if name in second):
        n_shared = n_overlapping({name: first[name]}, {name: second[name]})
        if n_shared:
            raise SelectionError(f"{name}: {n_shared} units are in the masks of both poles, which must be disjoint")


def _sortable(values: Floats) -> NDArray[np.uint32]:
    """Finite float32 as uint32 keys above 0 in the same order; -0 and +0 share a key."""
    bits = (np.asarray(values, np.float32) + np.float32(0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign)


def _buckets(keys: NDArray[np.uint32]) -> NDArray[np.intp]:
    return (keys >> np.uint32(_BUCKET_BITS)).astype(np.intp)


def _share_of(share: float, total: int) -> int:
    if not 0 < share <= 1:
        raise InputError(f"a share must be above 0 and at most 1, not {share}")
    return round(share * total)


def _require_rankable(benefit: Mapping[str, Floats], damage: Mapping[str, Floats]) -> None:
    if benefit.keys() != damage.keys():
        odd = ", ".join(sorted(benefit.keys() ^ damage.keys()))
        raise SelectionError(f"{odd}: benefit or damage is missing; gather both for the same tensors")
    for name, values in benefit.items():
        cost = damage[name]
        if values.shape != cost.shape:
            raise SelectionError(f"{name}: benefit is {values.shape}, but damage is {cost.shape}")
        _require_finite(name, "benefit", values)
        _require_finite(name, "damage", cost)
        lowest = cost.min(initial=0)
        if lowest < 0:
            raise SelectionError(f"{name}: damage {lowest:.3g} is below 0; recompute the statistics")


def _require_finite(name: str, what: str, values: Floats) -> None:
    n_bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if n_bad:
        raise SelectionError(f"{name}: {n_bad} of {values.size} {what} values are NaN or infinite; recompute them")
