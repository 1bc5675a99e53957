"""Arrays that are made when asked for, and not kept."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.per_tensor import PerTensor


def test_an_array_is_made_at_each_access_and_only_then() -> None:
    made: list[str] = []

    def make(name: str) -> NDArray[np.float32]:
        made.append(name)
        return np.full(2, len(name), np.float32)

    arrays = PerTensor(("b", "aa"), make)
    assert (list(arrays), len(arrays), "b" in arrays, "c" in arrays, made) == (["b", "aa"], 2, True, False, [])
    assert [values.tolist() for values in arrays.values()] == [[1, 1], [2, 2]]
    assert arrays["aa"] is not arrays["aa"]
    assert made == ["b", "aa", "aa", "aa"]
    with pytest.raises(KeyError):
        arrays["c"]
