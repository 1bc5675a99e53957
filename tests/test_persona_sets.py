"""The sets that ship: how they are found and composed, and the rules that their contrasts keep (personas/README.md)."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.errors import CalibrationError, InputError, PersonaNotFoundError
from persona_edge.persona_sets import load_persona_set, neutral_prompts, neutral_texts, shipped_sets

POLE_NAMES = re.compile(
    r"\b(introver\w*|extr[ao]ver\w*|outgoing|introspect\w*|sociable|gregarious|intuit\w*|sensing|sensor"
    r"|thinkers?|feelers?|(thinking|feeling) type|judg(ing|er)|perceiv\w*|prospecting|mbti|myers|personality"
    r"|[ei][sn][tf][jp])\b",
    re.IGNORECASE,
)
NEGATIONS = re.compile(r"\b(no|not|never|nothing|nobody|without|cannot|\w+n't)\b", re.IGNORECASE)
AXES = ("EI", "SN", "TF", "JP")


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text.lower())


@pytest.fixture(params=AXES)
def axis(request: pytest.FixtureRequest) -> CalibrationSet:
    (contrasts,) = load_persona_set(f"mbti-{request.param.lower()}").sets
    return contrasts


class TestFinding:
    def test_mbti16_is_sixteen_compositions_of_eight_poles(self) -> None:
        spec = load_persona_set("mbti16")
        assert [item.axis for item in spec.sets] == list(AXES)
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
    def test_enough_contrasts_on_both_sides_of_the_split(self, axis: CalibrationSet) -> None:
        calibration, held_out = axis.split()
        assert len(calibration) >= 40
        assert len(held_out) >= 12

    def test_no_type_or_pole_names(self, axis: CalibrationSet) -> None:
        named = [c for c in axis.contrasts if POLE_NAMES.search(f"{c.prompt} {c.positive} {c.negative}")]
        assert named == []

    def test_no_two_prompts_are_nearly_alike(self, axis: CalibrationSet) -> None:
        bags = [set(words(contrast.prompt)) for contrast in axis.contrasts]
        alike = [(a, b) for a, b in itertools.combinations(bags, 2) if len(a & b) / len(a | b) > 0.75]
        assert alike == []

    def test_no_answer_occurs_twice(self, axis: CalibrationSet) -> None:
        answers = [text for contrast in axis.contrasts for text in (contrast.positive, contrast.negative)]
        assert len(set(answers)) == len(answers)

    def test_answers_are_alike_in_length(self, axis: CalibrationSet) -> None:
        lengths = [(len(words(c.positive)), len(words(c.negative))) for c in axis.contrasts]
        assert all(15 <= n <= 45 for pair in lengths for n in pair)
        assert [pair for pair in lengths if min(pair) < 0.75 * max(pair)] == []
        positive, negative = mean(p for p, _ in lengths), mean(n for _, n in lengths)
        assert abs(positive - negative) <= 0.05 * max(positive, negative)

    def test_the_first_two_words_do_not_tell_the_pole(self, axis: CalibrationSet) -> None:
        assert opening_accuracy(axis.contrasts) <= 0.6

    def test_negations_are_as_frequent_on_either_side(self, axis: CalibrationSet) -> None:
        positive = sum(bool(NEGATIONS.search(contrast.positive)) for contrast in axis.contrasts)
        negative = sum(bool(NEGATIONS.search(contrast.negative)) for contrast in axis.contrasts)
        assert abs(positive - negative) <= 0.1 * len(axis)

    def test_no_single_word_gives_a_pole_away(self, axis: CalibrationSet) -> None:
        positive = Counter(word for contrast in axis.contrasts for word in set(words(contrast.positive)))
        negative = Counter(word for contrast in axis.contrasts for word in set(words(contrast.negative)))
        telling = {word for word in positive | negative if abs(positive[word] - negative[word]) > 0.3 * len(axis)}
        assert telling == set()


def opening_features(answer: str) -> set[str]:
    first, second = words(answer)[:2]
    return {f"{first} {second}", f"1 {first}", f"2 {second}"}


def opening_accuracy(contrasts: tuple[Contrast, ...]) -> float:
    """Leave-one-out accuracy of naive Bayes on the first two words; a tie counts a half, so 0.5 tells nothing."""
    positive = Counter(f for contrast in contrasts for f in opening_features(contrast.positive))
    negative = Counter(f for contrast in contrasts for f in opening_features(contrast.negative))
    right = 0.0
    for contrast in contrasts:
        own_positive, own_negative = opening_features(contrast.positive), opening_features(contrast.negative)
        for features, sign in ((own_positive, 1), (own_negative, -1)):
            score = sign * sum(
                math.log((positive[f] - (f in own_positive) + 1) / (negative[f] - (f in own_negative) + 1))
                for f in features
            )
            right += 0.5 if abs(score) < 1e-9 else float(score > 0)
    return right / (2 * len(contrasts))


def test_the_opening_rule_sees_an_opening_that_tells() -> None:
    telling = tuple(Contrast(f"p{i}", f"I am glad {i}", f"No thank you {i}") for i in range(10))
    alike = tuple(Contrast(f"p{i}", f"I am glad {i}", f"I am sad {i}") for i in range(10))
    assert opening_accuracy(telling) == 1.0
    assert opening_accuracy(alike) == 0.5


class TestNeutral:
    def test_prompts(self) -> None:
        prompts = neutral_prompts()
        assert len(prompts) == len(set(prompts)) == 64
        assert not any(POLE_NAMES.search(prompt) for prompt in prompts)

    def test_texts(self) -> None:
        texts = neutral_texts()
        assert len(texts) == len(set(texts)) == 48
        assert all(120 <= len(text.split()) <= 165 for text in texts)
        assert not any(POLE_NAMES.search(text) for text in texts)

    def test_no_calibration_prompt_is_a_neutral_one(self) -> None:
        asked = {contrast.prompt for item in load_persona_set("mbti16").sets for contrast in item.contrasts}
        assert asked.isdisjoint(neutral_prompts())
