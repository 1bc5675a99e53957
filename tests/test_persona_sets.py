"""The sets that ship: how they are found and composed, and the rules that their contrasts keep (personas/README.md)."""

from __future__ import annotations

import itertools
import json
import tomllib
from pathlib import Path

import pytest

from persona_edge import persona_sets
from persona_edge.contrasts import Contrast
from persona_edge.errors import CalibrationError, InputError, PersonaNotFoundError
from persona_edge.persona_sets import load_persona_set, neutral_prompts, neutral_texts, shipped_sets
from persona_edge.pole_words import names_of_types
from persona_edge.set_checker import Rules, check_set

FOLDER = Path(persona_sets.__file__).parent / "personas"
MBTI_AXES = ("EI", "SN", "TF", "JP")
AXES = {item.axis: item for shipped in shipped_sets() for item in load_persona_set(shipped.name).sets}


class TestFinding:
    def test_mbti16_is_sixteen_compositions_of_eight_poles(self) -> None:
        spec = load_persona_set("mbti16")
        assert [item.axis for item in spec.sets] == list(MBTI_AXES)
        assert spec.poles == tuple("EISNTFJP")
        assert spec.personas["INFP"] == ("I", "N", "F", "P")
        assert spec.personas["ENTJ"] == ("E", "N", "T", "J")
        assert [name for name in spec.personas if len(name) == 1] == list("EISNTFJP")
        composed = {name for name in spec.personas if len(name) == 4}
        assert composed == {"".join(poles) for poles in itertools.product("EI", "SN", "TF", "JP")}
        assert len(spec.personas) == 24

    def test_a_single_axis_has_its_poles_as_personas(self) -> None:
        spec = load_persona_set("MBTI-JP")
        assert spec.name == "mbti-jp"
        assert dict(spec.personas) == {"J": ("J",), "P": ("P",)}

    def test_everyday_is_every_manner_that_has_a_set_of_its_own(self) -> None:
        spec = load_persona_set("everyday")
        alone = {shipped.axes for shipped in shipped_sets() if len(shipped.axes) == 1}
        assert {(item.axis,) for item in spec.sets} == alone - {(axis,) for axis in (*MBTI_AXES, "power", "wealth")}
        assert len(spec.poles) == len(spec.personas) == 24

    def test_every_shipped_set_loads_and_says_what_it_is(self) -> None:
        for shipped in shipped_sets():
            assert shipped.description
            assert tuple(item.axis for item in load_persona_set(shipped.name).sets) == shipped.axes

    def test_a_file_becomes_two_personas(self, tmp_path: Path) -> None:
        path = tmp_path / "power.csv"
        path.write_text("question,matching,not_matching\nLead?,Yes.,No.\n")
        spec = load_persona_set(path)
        assert spec.name == "power"
        assert spec.sets[0].contrasts == (Contrast("Lead?", "Yes.", "No."),)
        assert dict(spec.personas) == {"power": ("power",), "anti-power": ("anti-power",)}

    def test_a_file_may_name_its_poles(self, tmp_path: Path) -> None:
        path = tmp_path / "tone.jsonl"
        header = {"axis": "tone", "positive": "warm", "negative": "blunt"}
        contrast = {"prompt": "Hi", "positive": "Hello, dear!", "negative": "What?"}
        path.write_text(json.dumps(header) + "\n" + json.dumps(contrast))
        assert dict(load_persona_set(str(path)).personas) == {"warm": ("warm",), "blunt": ("blunt",)}

    def test_unknown_name_lists_what_ships(self) -> None:
        with pytest.raises(PersonaNotFoundError, match="no persona set 'mbti17'; give one of mbti16, mbti-ei, "):
            load_persona_set("mbti17")
        assert issubclass(PersonaNotFoundError, InputError)

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"none\.csv: cannot be read"):
            load_persona_set(tmp_path / "none.csv")


class TestRules:
    """personas/README.md in words, persona_edge.set_checker as code."""

    @pytest.mark.parametrize("axis", AXES)
    def test_every_shipped_axis_keeps_them(self, axis: str) -> None:
        rules = Rules(min_contrasts=150 if axis in MBTI_AXES else 60)
        assert [finding for finding in check_set(AXES[axis], rules) if finding.severity == "error"] == []

    def test_the_axes_are_those_of_the_files(self) -> None:
        index = tomllib.loads((FOLDER / "personas.toml").read_text(encoding="utf-8"))
        assert set(index["axes"]) == set(AXES)
        files = {entry["file"] for entry in index["axes"].values()}
        others = {"neutral_prompts.jsonl", "neutral_text.jsonl", "generation_prompts.jsonl"}
        assert files | others == {path.name for path in FOLDER.glob("*.jsonl")}


class TestNeutral:
    def test_prompts(self) -> None:
        prompts = neutral_prompts()
        assert len(prompts) == len(set(prompts)) == 64
        assert not any(names_of_types(prompt, "EI") for prompt in prompts)

    def test_texts(self) -> None:
        texts = neutral_texts()
        assert len(texts) == len(set(texts)) == 88
        assert all(120 <= len(text.split()) <= 165 for text in texts)
        assert not any(names_of_types(text, "EI") for text in texts)

    def test_no_calibration_prompt_is_a_neutral_one(self) -> None:
        asked = {contrast.prompt for item in AXES.values() for contrast in item.contrasts}
        assert asked.isdisjoint(neutral_prompts())
