"""Arrays by tensor name, each made when it is asked for and not kept.

One number per group of an 8B model takes 0.9 GB. Means, benefits and weighted damages are a multiplication away from
sums that are in memory already, and whoever ranks them takes one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["PerTensor"]


class PerTensor(Mapping[str, NDArray[np.float32]]):
    """`make(name)` for each of `names`, anew at every access; what `make` reads must not change meanwhile."""

    def __init__(self, names: Iterable[str], make: Callable[[str], NDArray[np.float32]]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
