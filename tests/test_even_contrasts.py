"""What arms are made from beside a pack: `eval --contrasts`, and the note where its masks come from others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.eval_plan import EvalRequest, Section, sections_of
from persona_edge.effect.even_contrasts import uneven_contrasts
from persona_edge.errors import InputError
from persona_edge.maskpack import MaskPack, write_pack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, SignSample, TensorShape

ARMS = ("base", "contrastive-fisher", "retrieval")
REQUEST = EvalRequest("smollm2-135m", Path("effect"), poles=("I",))


def section(n_contrasts: int | None = None) -> Section:
    (found,) = sections_of(replace(REQUEST, n_contrasts=n_contrasts), None)
    return found


def pack_with(report: dict[str, Any], folder: Path) -> MaskPack:
    weights, positions = TensorShape("blk.0.attn_q.weight", 64, 64), np.arange(0, 128, 9, dtype=np.uint32)
    sketch = {weights.name: SignSample(positions, positions % 2 == 0)}
    poles = tuple(Pole(name, "EI", (Plane(0.0, {weights.name: positions}),)) for name in "EI")
    personas = PersonaSet(ModelIdentity("llama", (weights,), sketch), poles, {"E": ("E",), "I": ("I",)}, report)
    write_pack(folder / "some.maskpack", personas)
    return MaskPack.open(folder / "some.maskpack")


def calibrated_on(*sets: CalibrationSet) -> dict[str, Any]:
    """The part of a report that `export` writes of poles E, I, … found in these sets."""
    used = [{"sha256": item.content_hash(), "n_contrasts": len(item)} for item in sets]
    return {"poles": {name: {"calibration_set": item} for name, item in zip("EI", used, strict=False)}}


def test_fewer_contrasts_are_for_arms_and_not_for_what_is_asked() -> None:
    few, all_of_them = section(40), section()
    assert few.axis_set == all_of_them.axis_set == all_of_them.made_from
    assert few.made_from == few.axis_set.limit(40)  # what `export --contrasts 40` takes
    assert len(few.made_from) == 40
    assert set(few.made_from.split()[0].contrasts) <= set(few.axis_set.split()[0].contrasts)
    assert section(10_000).made_from == all_of_them.made_from
    with pytest.raises(InputError, match="give 1 or more"):
        section(0)


def test_a_pack_from_fewer_contrasts_is_noted_with_what_makes_them_even(tmp_path: Path) -> None:
    whole = section()
    pack = pack_with(calibrated_on(whole.axis_set.limit(40), whole.axis_set.limit(40)), tmp_path)
    (note,) = uneven_contrasts([whole], ARMS, pack)
    assert "axis EI" in note
    assert f"in 40 of the set's contrasts, other arms are made from {len(whole.axis_set)}; --contrasts 40 " in note
    assert list(uneven_contrasts([section(40)], ARMS, pack)) == []
    assert len(list(uneven_contrasts([section(60)], ARMS, pack))) == 1


def test_a_pack_from_the_same_contrasts_is_not_noted_unless_fewer_are_asked_for(tmp_path: Path) -> None:
    whole = section()
    pack = pack_with(calibrated_on(whole.axis_set, whole.axis_set), tmp_path)
    assert list(uneven_contrasts([whole], ARMS, pack)) == []
    (note,) = uneven_contrasts([section(40)], ARMS, pack)
    assert f"--contrasts {len(whole.axis_set)} makes them even" in note


def test_a_pack_from_another_set_is_noted(tmp_path: Path) -> None:
    whole = section()
    (first, *others) = whole.axis_set.contrasts
    edited = replace(whole.axis_set, contrasts=(replace(first, positive=first.positive + " Yes."), *others))
    pack = pack_with(calibrated_on(whole.axis_set, edited), tmp_path)
    (note,) = uneven_contrasts([whole], ARMS, pack)
    assert note == "axis EI: the pack's masks were found in other contrasts than the other arms"


@pytest.mark.parametrize("arms", [("base", "contrastive-fisher", "system-prompt"), ("base", "retrieval")])
def test_without_another_arm_made_from_contrasts_there_is_no_note(tmp_path: Path, arms: tuple[str, ...]) -> None:
    whole = section()
    pack = pack_with(calibrated_on(whole.axis_set.limit(40)), tmp_path)
    assert list(uneven_contrasts([whole], arms, pack)) == []
    assert list(uneven_contrasts([whole], ARMS, None)) == []


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"poles": 3},
        {"poles": {"E": None, "I": {"calibration_set": "mbti16"}}},
        {"poles": {"E": {"calibration_set": {"n_contrasts": True, "sha256": "00"}}}},
        {"poles": {"E": {"calibration_set": {"n_contrasts": 40}}}},
    ],
)
def test_a_report_that_does_not_say_is_no_trouble(tmp_path: Path, report: dict[str, Any]) -> None:
    assert list(uneven_contrasts([section()], ARMS, pack_with(report, tmp_path))) == []
