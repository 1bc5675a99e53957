"""How a pole's mask grows: in steps, each on the model as masked so far, up to a share of the limits on drift.

One gradient at the unmasked model says what closing a gate does while every other gate is open. Thousands of gates
close together, so after the best of them the others' benefits have changed, and contrasts that are already won still
pull. Hence steps: a step's benefits are measured with the mask of the steps before it, on contrasts weighted by how far
they are from won (`collect.Focus`). Being of few contrasts, they are noisy; the earlier steps', of others, steady them.

What a mask costs is not the sum of what its gates cost alone either: they all push the model the same way, and most of
the drift is what they do together. The gradient of the drift of the mask so far tells, for each further gate, how much
it adds. A step's benefits pay for it (`DRIFT_PRICE`), so that a mask grows where it has its effect without more of the
same drift. A step's budget is found by measured drift (budget_search.py): it spends up to its share of both limits.

One step wins as many contrasts with half the groups; but what it makes of free replies repeats itself. Later steps are
kept from that: where the model as masked so far goes round in its replies is one more axis to leave alone
(repetition.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.budget_search import BudgetResult, Drift, Trial, search_budget, shares_of_limits
from persona_edge.calibration import Calibrator, Progress
from persona_edge.collect import Focus
from persona_edge.contrasts import CalibrationSet
from persona_edge.errors import SelectionError
from persona_edge.masked_model import masked
from persona_edge.masks import Granularity, Plane, merge_planes, planes_digest
from persona_edge.packed_pairs import ContrastPair
from persona_edge.per_tensor import PerTensor
from persona_edge.pole_masks import Damages, Gates, Side, fisher_planes
from persona_edge.repetition import RepetitionProbe
from persona_edge.selection import RankedPlanes, sum_over
from persona_edge.separation import NO_OTHERS, Others

__all__ = ["Grown", "Growth", "Limits", "expected", "fixed"]

DEFAULT_CHAT_WEIGHT = 0.15
"""What a nat of chat damage counts beside a nat of web damage when only one of the two is limited."""
SHARE_OF_STYLE = 0.4
"""The share of a perplexity ratio beyond exp(web KL) that other text shows too (docs/method.md)."""
LARGEST_LOGARITHM = 700.0  # of a model broken beyond what a float's exponential can say
START_BUDGET = 0.002  # nats per token, where the first step's search begins
EARLY_TRIALS = 3
EARLY_TOLERANCE = 0.25
CARRIED = 0.7
"""What the benefits of the steps before count beside a step's own, both scaled to one size (docs/method.md)."""
DRIFT_PRICE = 0.05
"""What a nat of drift costs, as a share of the margin that a nat of estimated damage buys (docs/method.md)."""
AWAY = (0.15, 0.3)
"""How far the last step, when it is taken again, is to move the loops away, nats per token: each time farther."""
MeasureDrift = Callable[[Sequence[Plane]], Drift]
Benefits = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Limits:
    """The drift a mask may cause: perplexity masked / base, KL on chat turns in nats per token; None is no limit."""

    max_perplexity_ratio: float | None
    max_chat_kl: float | None

    def share(self, share: float) -> Limits:
        """The limits that leave room for later steps: `share` of the logarithm of the one, of the other itself."""
        ratio, chat_kl = self.max_perplexity_ratio, self.max_chat_kl
        return Limits(None if ratio is None else ratio**share, None if chat_kl is None else chat_kl * share)

    def used(self, drift: Drift) -> NDArray[np.float64]:
        """The share of each limit that `drift` takes, (n_limits,); above 1 it is exceeded."""
        return np.array(shares_of_limits(drift, self.max_perplexity_ratio, self.max_chat_kl), np.float64)

    @property
    def chat_weight(self) -> float:
        """What a nat on chat turns counts beside a nat on web text: the ratio of the two limits."""
        if self.max_perplexity_ratio is None or self.max_chat_kl is None:
            return DEFAULT_CHAT_WEIGHT
        return math.log(self.max_perplexity_ratio) / self.max_chat_kl


@dataclass(frozen=True)
class Grown:
    """A finished mask: its planes, what was spent in each step, and the drift measured at the end."""

    planes: tuple[Plane, ...]
    drift: Drift
    steps: tuple[BudgetResult, ...] = field(default=())

    @property
    def budget(self) -> float:
        """Estimated damage spent in all steps, nats per token."""
        return sum(step.budget for step in self.steps)

    @property
    def n_trials(self) -> int:
        """How many masks were measured."""
        return sum(len(step.trials) for step in self.steps)


@dataclass(frozen=True)
class _Aim:
    """Where a mask is to move the model, and where not: the other axes, and the loops that are known so far.

    A step is to move these loops `away`, nats per token.
    """

    side: Side
    label: str
    others: Others
    repetition: RepetitionProbe | None = None
    loops: tuple[ContrastPair, ...] = ()
    away: float = 0.0

    def knowing_loops_of(self, grown: Grown, when: str) -> _Aim:
        """The same, with the loops in what the model with the mask `grown` replies."""
        if self.repetition is None:
            return self
        return replace(self, loops=(*self.loops, *self.repetition.pairs(grown.planes, f"{self.label}, {when}")))

    def all_others(self, grown: Grown) -> Others:
        """All that a further step is to leave alone."""
        if self.repetition is None:
            return self.others
        loops = self.repetition.others(self.loops, grown.planes, away=self.away, label=self.label)
        return (*self.others, *loops)


class Growth:
    """Grows masks on one calibrator's model; `drift` measures a mask on held-out neutral text."""

    def __init__(
        self,
        calibrator: Calibrator,
        damages: Damages,
        drift: MeasureDrift,
        *,
        limits: Limits,
        gates: Gates,
        granularity: Granularity,
        n_steps: int,
        n_trials: int,
        n_contrasts: int,
        progress: Progress,
    ) -> None:
        self.calibrator, self.damages, self.drift = calibrator, damages, drift
        self.limits, self.gates, self.granularity = limits, gates, granularity
        self.n_steps, self.n_trials, self.n_contrasts = n_steps, n_trials, n_contrasts
        self.progress = progress
        self._first_budget = START_BUDGET

    def grow(
        self,
        contrasts: CalibrationSet,
        benefits: Benefits,
        side: Side,
        label: str,
        *,
        others: Others = NO_OTHERS,
        repetition: RepetitionProbe | None = None,
    ) -> Grown:
        """The mask of one pole, which leaves the axes `others` where they are (separation.py).

        Each step after the first asks `repetition` where the model as masked so far repeats itself, and does not add to
        it; the last is taken again if the finished mask does so more than no mask.
        `benefits` are those of the unmasked model toward the positive pole (`Calibrator.gate_benefits`), which both
        poles share. Raises SelectionError when no step finds anything within its limits.
        """
        self._first_budget = START_BUDGET  # so that a mask does not depend on which were grown before
        grown = before = Grown((), Drift(1.0, 0.0, 0.0))
        aim = _Aim(side, label, others, repetition)
        for step in range(self.n_steps):
            last = step + 1 == self.n_steps
            before = grown
            if grown.planes:
                benefits = _carried(benefits, self._measure_again(contrasts, grown, aim, step))
                aim = aim.knowing_loops_of(grown, f"step {step + 1}")
            try:
                grown = self._step(grown, benefits, aim, step)
            except SelectionError:  # nothing (more) fits into this step's share of the limits
                if last and not grown.planes:
                    raise
        return grown if grown is before else self._without_loops(grown, before, benefits, aim)

    def _without_loops(self, grown: Grown, before: Grown, benefits: Benefits, aim: _Aim) -> Grown:
        """`grown`; or its last step taken again, knowing what it led to, where replies go round more than with no mask.

        Of those that were tried, the mask whose replies go round least.
        """
        probe = aim.repetition
        if probe is None:
            return grown
        by_itself = len(probe.pairs((), f"{aim.label}, no mask"))
        allowed = by_itself + math.sqrt(by_itself)  # a count is as uncertain as that
        best, fewest = grown, len(probe.pairs(grown.planes, f"{aim.label}, finished"))
        for away in AWAY:
            if fewest <= allowed:
                break
            aim = replace(aim.knowing_loops_of(grown, "finished"), away=away)
            try:
                grown = self._step(before, benefits, aim, self.n_steps - 1)
            except SelectionError:
                break
            n_loops = len(probe.pairs(grown.planes, f"{aim.label}, finished again"))
            if n_loops < fewest:
                best, fewest = grown, n_loops
        return best

    def _measure_again(self, contrasts: CalibrationSet, grown: Grown, aim: _Aim, step: int) -> Benefits:
        toward: Literal[1, -1] = 1 if aim.side == "positive" else -1
        some = contrasts.limit(self.n_contrasts, seed=step)
        with masked(self.calibrator.model, grown.planes):
            return self.calibrator.gate_benefits(
                some,
                focus=Focus(toward),
                mask=planes_digest(grown.planes),
                label=f"contrasts {aim.label}, step {step + 1}",
            )

    def _step(self, grown: Grown, benefits: Benefits, aim: _Aim, step: int) -> Grown:
        last = step + 1 == self.n_steps
        damage = self.damages.weighted(1.0, self.limits.chat_weight)
        others = aim.all_others(grown)

        def rank(benefits: Benefits) -> RankedPlanes:
            return fisher_planes(
                benefits,
                damage,
                aim.side,
                self.gates,
                self.granularity,
                gated=grown.planes,
                others=others,
                budget=self._first_budget,
            )

        ranked = rank(benefits)
        if grown.planes:
            ranked = rank(self._charged(benefits, ranked, grown, aim, step))
        limits = self.limits.share((step + 1) / self.n_steps)
        n_trials = self.n_trials if last else min(EARLY_TRIALS, self.n_trials)
        done = 0

        def measure(budget: float) -> Drift:
            nonlocal done
            self.progress(f"budget {aim.label}, step {step + 1} of {self.n_steps}", done, n_trials)
            done += 1
            try:
                return expected(self.drift(merge_planes(grown.planes, ranked.take(budget))))
            except SelectionError:  # too little for even the best unit: nothing new, look higher
                return expected(grown.drift)

        result = search_budget(
            measure,
            start=self._first_budget,
            max_perplexity_ratio=limits.max_perplexity_ratio,
            max_chat_kl=limits.max_chat_kl,
            n_steps=n_trials,
            tolerance=0.05 if last else EARLY_TOLERANCE,
        )
        self.progress(f"budget {aim.label}, step {step + 1} of {self.n_steps}", n_trials, n_trials)
        self._first_budget = result.budget  # the next search's is rarely far
        planes = merge_planes(grown.planes, ranked.take(result.budget))
        return Grown(planes, self.drift(planes), (*grown.steps, result))

    def _charged(self, benefits: Benefits, ranked: RankedPlanes, grown: Grown, aim: _Aim, step: int) -> Benefits:
        """The benefits less what gating each unit adds to the drift of the mask so far.

        The price of a nat is a share of what a budget as large as the last step's buys per nat, `ranked` as it is. A
        unit that would undo drift is paid nothing for it: masks of such units undo the persona as well.
        """
        try:
            gain = sum(sum_over(benefits, p.positions) * (1 - p.gate) for p in ranked.take(self._first_budget))
        except SelectionError:  # not even one unit is as cheap: there is nothing to compare with
            return benefits
        price = np.float32(DRIFT_PRICE * gain / self._first_budget)  # signed, as the benefits are
        gradient = self.calibrator.drift_gradient(
            grown.planes,
            mask=planes_digest(grown.planes),
            chat_weight=self.limits.chat_weight,
            label=f"{aim.label}, step {step + 1}",
        )

        def charged(name: str) -> NDArray[np.float32]:
            own, charge = benefits[name], price * gradient[name]
            paid = own + np.where(charge * own < 0, charge, np.float32(0))
            return np.where(own * paid > 0, paid, np.float32(0))

        return PerTensor(benefits, charged)


def fixed(planes: tuple[Plane, ...], amount: float, drift: Drift) -> Grown:
    """A mask whose amount was given instead of searched for."""
    return Grown(planes, drift, (BudgetResult(amount, drift, (Trial(amount, drift, True),)),))


def expected(drift: Drift) -> Drift:
    """`drift` with the perplexity ratio that other text would show.

    On text that the model itself would write, the logarithm of the ratio is the web KL. What a few passages show
    beyond that is in part their style, so that only a share of it counts; less than that may be luck, and does not.
    """
    if drift.web_kl is None:
        return drift
    beyond = max(0.0, math.log(drift.perplexity_ratio) - drift.web_kl)
    logarithm = drift.web_kl + SHARE_OF_STYLE * beyond
    return replace(drift, perplexity_ratio=math.exp(logarithm) if logarithm < LARGEST_LOGARITHM else math.inf)


def _carried(before: Benefits, now: Benefits) -> Benefits:
    """A step's benefits with those of the steps before, which tell less of the masked model but have less noise."""
    share = np.float32(CARRIED * _size(now) / max(_size(before), 1e-30))
    return PerTensor(now, lambda name: now[name] + share * before[name])


def _size(benefits: Benefits) -> float:
    return math.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in benefits.values()))
