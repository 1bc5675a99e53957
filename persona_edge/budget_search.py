"""The largest damage budget whose *measured* drift stays within limits, found with few measurements.

A budget counts estimated damage; what a mask really does to the model differs between models and poles by a factor of
ten. Each measurement evaluates the masked model (seconds), so the search follows a power law through the points it has,
since drift grows roughly as a power of the budget, and keeps a bracket so that noise can mislead but not derail it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from persona_edge.errors import InputError, SelectionError

__all__ = ["BudgetResult", "Drift", "Trial", "search_budget", "shares_of_limits"]

_LARGEST_STEP_UP = 8.0  # a budget far too large teaches nothing but that it is too large
_LARGEST_STEP_DOWN = 32.0
_LEAST_LATER_STEP = math.log(1.5)
_FIRST_EXPONENT = 1.0  # drift ~ budget until two measurements say otherwise
_EXPONENTS = (0.3, 3.0)  # noise makes wilder slopes than any model does
_FLOOR = 1e-3  # drift below a thousandth of its limit, or negative, is only known to be small
_EDGE = 0.1  # how near, in shares of the bracket's logarithm, a guess may come to its ends


@dataclass(frozen=True)
class Drift:
    """How far a masked model is from base on neutral text.

    `perplexity_ratio` is masked / base; `chat_kl` and `web_kl` are KL(base || masked) in nats per token on neutral chat
    turns and on web text.
    """

    perplexity_ratio: float
    chat_kl: float
    web_kl: float | None = None


@dataclass(frozen=True)
class Trial:
    """One measurement: the budget in nats per token, its drift, and whether that was within the limits."""

    budget: float
    drift: Drift
    within: bool


@dataclass(frozen=True)
class BudgetResult:
    """The budget found, its measured drift, and every trial in the order made."""

    budget: float
    drift: Drift
    trials: tuple[Trial, ...]


def shares_of_limits(drift: Drift, max_perplexity_ratio: float | None, max_chat_kl: float | None) -> list[float]:
    """What `drift` uses of each limit that there is, as a share of it: above 1 it is exceeded."""
    shares = []
    if max_perplexity_ratio is not None:
        ratio = drift.perplexity_ratio
        # Logarithms, so that the share is in nats per token like the budget and near 0 for a harmless mask.
        shares.append(math.log(ratio) / math.log(max_perplexity_ratio) if ratio > 0 else math.inf)
    if max_chat_kl is not None:
        shares.append(drift.chat_kl / max_chat_kl)
    return shares


@dataclass(frozen=True)
class _Limits:
    max_perplexity_ratio: float | None
    max_chat_kl: float | None

    def used(self, drift: Drift) -> float:
        """The share of the tightest limit that `drift` uses: 1 is exactly at it, infinity a broken model."""
        shares = shares_of_limits(drift, self.max_perplexity_ratio, self.max_chat_kl)
        return math.inf if any(math.isnan(share) for share in shares) else max(_FLOOR, *shares)

    def within(self, drift: Drift) -> bool:
        return (self.max_perplexity_ratio is None or drift.perplexity_ratio <= self.max_perplexity_ratio) and (
            self.max_chat_kl is None or drift.chat_kl <= self.max_chat_kl
        )


def search_budget(
    measure: Callable[[float], Drift],
    *,
    start: float,
    max_perplexity_ratio: float | None = None,
    max_chat_kl: float | None = None,
    n_steps: int = 6,
    tolerance: float = 0.05,
    progress: Callable[[Trial], None] | None = None,
) -> BudgetResult:
    """The largest budget, of those measured, whose drift is within every limit given.

    `measure(budget)` masks the model and returns its drift; it is called at most `n_steps` times, first at `start`.
    The search ends early when a budget uses at least `1 - tolerance` of the tightest limit, or when the bracket is
    narrower than `tolerance`. `progress` is told of each trial. InputError for limits or options that cannot be used;
    SelectionError, with the numbers, when no budget tried was within the limits. Errors of `measure` pass through.
    """
    limits = _checked_limits(max_perplexity_ratio, max_chat_kl)
    _check_options(start, n_steps, tolerance)
    trials: list[Trial] = []
    budget = start
    for _ in range(n_steps):
        drift = measure(budget)
        trials.append(Trial(budget, drift, limits.within(drift)))
        if progress is not None:
            progress(trials[-1])
        if _is_done(trials, limits, tolerance):
            break
        budget = _next_budget(trials, limits, tolerance)
    best = max((trial for trial in trials if trial.within), key=lambda trial: trial.budget, default=None)
    if best is None:
        raise SelectionError(_nothing_within(trials, limits))
    return BudgetResult(best.budget, best.drift, tuple(trials))


def _bracket(trials: list[Trial]) -> tuple[Trial | None, Trial | None]:
    """The largest budget within the limits and the smallest that is not; the first is below the second, as no budget
    above a failed one is ever tried.
    """
    low = max((trial for trial in trials if trial.within), key=lambda trial: trial.budget, default=None)
    high = min((trial for trial in trials if not trial.within), key=lambda trial: trial.budget, default=None)
    return low, high


def _is_done(trials: list[Trial], limits: _Limits, tolerance: float) -> bool:
    low, high = _bracket(trials)
    if low is None:
        return False
    return limits.used(low.drift) >= 1 - tolerance or (high is not None and high.budget <= low.budget * (1 + tolerance))


def _next_budget(trials: list[Trial], limits: _Limits, tolerance: float) -> float:
    """Where the power law through the nearest two trials uses the limits to the middle of the tolerance."""
    low, high = _bracket(trials)
    target = math.log(1 - tolerance / 2)
    if low is not None and high is not None:
        return _inside(low, high, limits, target, bisect=_is_stuck(trials, low, high))
    anchor = low or high
    assert anchor is not None  # there is at least one trial, and it is either within or not
    distance = target - math.log(limits.used(anchor.drift))  # infinite for a broken model: then the largest step down
    step = distance / _exponent(trials, limits)
    # The first guess may be a small correction; a later one that still has no bracket must get somewhere.
    least = 0.0 if len(trials) == 1 else _LEAST_LATER_STEP
    if anchor is low:
        return anchor.budget * math.exp(min(max(step, least), math.log(_LARGEST_STEP_UP)))
    return anchor.budget * math.exp(max(min(step, -least), -math.log(_LARGEST_STEP_DOWN)))


def _inside(low: Trial, high: Trial, limits: _Limits, target: float, *, bisect: bool) -> float:
    a, b = math.log(low.budget), math.log(high.budget)
    used_a, used_b = math.log(limits.used(low.drift)), math.log(limits.used(high.drift))
    share = 0.5 if bisect or math.isinf(used_b) else (target - used_a) / (used_b - used_a)
    return math.exp(a + (b - a) * min(max(share, _EDGE), 1 - _EDGE))


def _is_stuck(trials: list[Trial], low: Trial, high: Trial) -> bool:
    """Whether the last two trials both moved the same end: secants then creep along a bent curve."""
    last = [trial.within for trial in trials[-3:]]
    return (
        len(last) == 3 and last[1] == last[2] and trials[-1] in (low, high) and math.log(high.budget / low.budget) > 1
    )


def _exponent(trials: list[Trial], limits: _Limits) -> float:
    """The slope of log drift over log budget through the last two trials that tell one."""
    points = [(math.log(t.budget), math.log(limits.used(t.drift))) for t in trials]
    points = [(budget, used) for budget, used in points if math.log(_FLOOR) < used < math.inf]
    if len(points) < 2 or points[-1][0] == points[-2][0]:
        return _FIRST_EXPONENT
    (budget_a, used_a), (budget_b, used_b) = points[-2:]
    return min(max((used_b - used_a) / (budget_b - budget_a), _EXPONENTS[0]), _EXPONENTS[1])


def _checked_limits(max_perplexity_ratio: float | None, max_chat_kl: float | None) -> _Limits:
    if max_perplexity_ratio is None and max_chat_kl is None:
        raise InputError("a budget search needs a limit: a largest perplexity ratio, a largest chat KL, or both")
    if max_perplexity_ratio is not None and not (math.isfinite(max_perplexity_ratio) and max_perplexity_ratio > 1):
        raise InputError(f"the largest perplexity ratio must be above 1, not {max_perplexity_ratio}")
    if max_chat_kl is not None and not (math.isfinite(max_chat_kl) and max_chat_kl > 0):
        raise InputError(f"the largest chat KL must be above 0 nats per token, not {max_chat_kl}")
    return _Limits(max_perplexity_ratio, max_chat_kl)


def _check_options(start: float, n_steps: int, tolerance: float) -> None:
    if not (math.isfinite(start) and start > 0):
        raise InputError(f"the first budget must be a positive number of nats per token, not {start}")
    if n_steps < 1:
        raise InputError(f"a budget search needs at least 1 measurement, not {n_steps}")
    if not 0 < tolerance < 1:
        raise InputError(f"the tolerance must be between 0 and 1, not {tolerance}")


def _nothing_within(trials: list[Trial], limits: _Limits) -> str:
    least = min(trials, key=lambda trial: trial.budget)
    measured = []
    if limits.max_perplexity_ratio is not None:
        measured.append(f"perplexity ratio {least.drift.perplexity_ratio:.4g} (limit {limits.max_perplexity_ratio:g})")
    if limits.max_chat_kl is not None:
        measured.append(f"chat KL {least.drift.chat_kl:.4g} nats (limit {limits.max_chat_kl:g})")
    return f"even a budget of {least.budget:.3g} gives {' and '.join(measured)}; loosen the limits"
