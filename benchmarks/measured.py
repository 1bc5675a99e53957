"""Repeated measurements as they travel from the process that made them: one arm, one thing, one unit, all values.

Values of the same `what` were taken round by round, arms in turn, so that value i of two arms belongs to one round and
their ratio is paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from benchmarks.record import Spread

__all__ = ["Measured", "Recorder", "find", "find_all", "in_rounds", "ratio"]


@dataclass(frozen=True)
class Measured:
    """All values of `what` of one arm, in `unit`, in the order of the rounds."""

    arm: str
    what: str
    unit: str
    values: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Quantiles of the values."""
        return Spread.of(self.values)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measured:
        """The inverse of `to_json`."""
        return cls(content["arm"], content["what"], content["unit"], tuple(content["values"]))

    def to_json(self) -> dict[str, object]:
        """The values to five digits, and their quantiles beside them."""
        values = [float(f"{value:.5g}") for value in self.values]
        return {"arm": self.arm, "what": self.what, "unit": self.unit, "values": values, **asdict(self.spread)}


class Recorder:
    """Collects values by arm, thing and unit."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, str], list[float]] = {}

    def add(self, arm: str, what: str, unit: str, value: float) -> None:
        """One more value."""
        self._values.setdefault((arm, what, unit), []).append(value)

    def result(self) -> list[Measured]:
        """Everything, in the order in which it first came."""
        return [Measured(*key, tuple(values)) for key, values in self._values.items()]


def in_rounds(n: int, seconds: float, *, least: int = 1, warm_up: bool = True) -> Iterator[int]:
    """Counts rounds: `n` of them, fewer when `seconds` are over, at least `least`. Number 0, to be thrown away, fills
    caches; it is left out without `warm_up`."""
    if warm_up:
        yield 0
    started = perf_counter()
    for number in range(1, n + 1):
        if number > least and perf_counter() - started > seconds:
            return
        yield number


def find(measured: Iterable[Measured], arm: str, what: str) -> Measured | None:
    """The one of `arm` and `what`; None when it was not measured."""
    return next((each for each in measured if (each.arm, each.what) == (arm, what)), None)


def find_all(measured: Iterable[Measured], what: str) -> list[Measured]:
    """Those of `what`, of all arms."""
    return [each for each in measured if each.what == what]


def ratio(one: Measured, other: Measured) -> Spread:
    """`one` over `other`, paired by round; by their medians where they do not have the same number of rounds."""
    if len(one.values) == len(other.values):
        return Spread.of([a / b for a, b in zip(one.values, other.values, strict=True)])
    return Spread.of([one.spread.p50 / other.spread.p50])
