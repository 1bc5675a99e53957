"""Content that cannot become a pack is refused with its own named error, and nothing is written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import PackError
from persona_edge.maskpack import MaskPack, write_pack
from persona_edge.masks import PersonaSet, Plane, Pole, SignSample
from persona_edge.pack_errors import (
    PackCompositionError,
    PackGateError,
    PackHeaderMalformedError,
    PackHeaderTooLargeError,
    PackPlaneError,
    PackSketchError,
)

GOLDEN = Path(__file__).parent / "golden" / "v2.maskpack"


def content() -> PersonaSet:
    return MaskPack.open(GOLDEN).load()


def within_itself() -> dict[str, object]:
    report: dict[str, object] = {}
    report["a"] = report
    return report


def with_sketch(sketch: dict[str, SignSample]) -> PersonaSet:
    return replace(content(), identity=replace(content().identity, sketch=sketch))


def with_plane(plane: Plane) -> PersonaSet:
    return replace(content(), poles=(Pole("I", "EI", (plane,)),), personas={"I": ("I",)})


OUTPUT = "output.weight"
ONE = np.array([1], dtype=np.uint32)
NONE = np.array([], dtype=np.uint32)
UNWRITABLE: dict[type[PackError], dict[str, tuple[str, Callable[[], PersonaSet]]]] = {
    PackGateError: {
        "NaN gate": ("gate nan", lambda: with_plane(Plane(math.nan, {OUTPUT: ONE}))),
        "infinite gate": ("gate inf", lambda: with_plane(Plane(math.inf, {OUTPUT: ONE}))),
    },
    PackPlaneError: {
        "unknown tensor": ("tensor 'x' is not among", lambda: with_plane(Plane(0.0, {"x": ONE}))),
        "no positions": ("leave it out", lambda: with_plane(Plane(0.0, {OUTPUT: NONE}))),
        "empty plane": ("plane 0 of pole 'I': no positions", lambda: with_plane(Plane(0.0, {}))),
        "not ascending": (
            "plane 0 of pole 'I': 'output.weight': positions are not strictly ascending",
            lambda: with_plane(Plane(0.0, {OUTPUT: np.array([2, 2], dtype=np.uint32)})),
        ),
        "out of range": (
            "position 192 of 192",
            lambda: with_plane(Plane(0.0, {OUTPUT: np.array([192], dtype=np.uint32)})),
        ),
    },
    PackCompositionError: {
        "unknown pole": ("names pole 'X'", lambda: replace(content(), personas={"X": ("X",)})),
    },
    PackSketchError: {
        "no sketch": ("sample_signs", lambda: with_sketch({})),
        "sketch of an unknown tensor": ("tensor 'x'", lambda: with_sketch({"x": SignSample(ONE, np.array([True]))})),
        "a sign too few": (
            "one true or false per position",
            lambda: with_sketch({OUTPUT: SignSample(ONE, np.array([], dtype=np.bool_))}),
        ),
    },
    PackHeaderMalformedError: {
        "NaN in the report": ("not a JSON value", lambda: replace(content(), report={"a": math.nan})),
        "report within itself": ("nested too deep", lambda: replace(content(), report=within_itself())),
        "array in the report": ("not a JSON value", lambda: replace(content(), report={"a": np.zeros(3)})),
        "number as a key of the report": (
            "key 1, which is not a string",
            lambda: replace(content(), report={"a": {1: 2}}),
        ),
    },
    PackHeaderTooLargeError: {
        "report beyond the limit": (
            "at most 16777216 are allowed",
            lambda: replace(content(), report={"a": "x" * 2**24}),
        ),
    },
}
REFUSED = [
    pytest.param(error, message, make, id=name)
    for error, group in UNWRITABLE.items()
    for name, (message, make) in group.items()
]


@pytest.mark.parametrize(("error", "message", "make"), REFUSED)
def test_unwritable(error: type[PackError], message: str, make: Callable[[], PersonaSet], tmp_path: Path) -> None:
    target = tmp_path / "a.maskpack"
    with pytest.raises(error, match=message) as caught:
        write_pack(target, make())
    assert str(caught.value).startswith(f"cannot make {target}: ")
    assert str(caught.value).endswith("; nothing was written")
    assert os.listdir(tmp_path) == []
