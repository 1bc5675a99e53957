"""The rules for calibration sets: a good set keeps all of them, and for each rule there is a set that breaks it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.pole_words import names_of_types, pole_words
from persona_edge.set_checker import Finding, Rules, check_set, measure, opening_accuracy
from persona_edge.set_report import check_report

VOCABULARY = [first + middle + last for first in "bdfgklm" for middle in "aeiou" for last in ("rk", "nt", "pfel", "st")]


def sentence(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=n_words)) + "."


def good_set(n: int = 60) -> CalibrationSet:
    """Random words, both answers of a contrast opening alike and equally long: nothing tells the poles apart."""
    rng = random.Random(5)
    contrasts = []
    for _ in range(n):
        opening, n_words = sentence(rng, 2)[:-1], rng.randint(15, 40)
        positive, negative = (f"{opening} {sentence(rng, n_words - 2)}" for _ in range(2))
        contrasts.append(Contrast(f"{sentence(rng, 9)[:-1]}?", positive, negative))
    return CalibrationSet("tone", "tone", "warm", "blunt", tuple(contrasts))


def changed(change: Callable[[Contrast], Contrast], numbers: range | None = None) -> CalibrationSet:
    """The good set with `change` applied to the contrasts of these numbers, from 1; None for all of them."""
    good = good_set()
    at = range(1, len(good) + 1) if numbers is None else numbers
    found = (change(c) if number in at else c for number, c in enumerate(good.contrasts, start=1))
    return replace(good, contrasts=tuple(found))


def only_finding(contrasts: CalibrationSet, rules: Rules = Rules()) -> Finding:  # noqa: B008  (frozen)
    (finding,) = check_set(contrasts, rules)
    return finding


def test_a_good_set_keeps_all_rules() -> None:
    assert check_set(good_set()) == ()
    report = check_report(good_set(), Rules())
    assert report.lines[0] == "tone: warm against blunt"
    assert report.lines[-1] == "keeps all rules"
    assert not report.has_errors


class TestEachRule:
    def test_too_few(self) -> None:
        finding = only_finding(good_set(39))
        assert (finding.rule, finding.severity) == ("amount", "error")
        assert finding.message == "39 contrasts; write at least 40"

    def test_all_on_one_side_of_the_split(self) -> None:
        calibration, _ = good_set(400).split()
        finding = only_finding(calibration)
        assert finding.rule == "amount"
        assert finding.message.startswith(f"{len(calibration)} contrasts to calibrate on and 0 held out")

    def test_a_pole_called_by_its_name(self) -> None:
        finding = only_finding(changed(lambda c: replace(c, prompt=f"{c.prompt} Warmly?"), range(3, 5)))
        assert (finding.rule, finding.severity, finding.contrasts) == ("names", "error", (3, 4))
        assert "warmly" in finding.message

    def test_a_word_related_to_a_poles_name_is_worth_a_look(self) -> None:
        bad = changed(lambda c: replace(c, prompt=f"A decision: {c.prompt}"), range(7, 8))
        finding = only_finding(replace(bad, positive_pole="decisive"))
        assert (finding.rule, finding.severity, finding.contrasts) == ("related names", "warning", (7,))

    def test_prompts_that_are_nearly_the_same(self) -> None:
        good = good_set()
        first = good.contrasts[0].prompt
        twin = replace(good.contrasts[9], prompt=first.replace("?", " indeed?").upper())
        contrasts = (*good.contrasts[:9], twin, *good.contrasts[10:])
        finding = only_finding(replace(good, contrasts=contrasts))
        assert (finding.rule, finding.severity, finding.contrasts) == ("similar prompts", "error", (10,))
        assert finding.message == "1 prompt is nearly the same as an earlier one: 1 and 10"

    def test_long_prompts(self) -> None:
        rng = random.Random(1)
        finding = only_finding(changed(lambda c: replace(c, prompt=sentence(rng, 41)), range(2, 3)))
        assert (finding.rule, finding.severity, finding.contrasts) == ("long prompts", "warning", (2,))

    def test_answers_that_occur_twice(self) -> None:
        good = good_set()
        again = replace(good.contrasts[5], positive=good.contrasts[4].positive.upper())
        finding = only_finding(replace(good, contrasts=(*good.contrasts[:5], again, *good.contrasts[6:])), FREE)
        assert (finding.rule, finding.severity, finding.contrasts) == ("repeated answers", "error", (5, 6))
        assert finding.message.startswith("1 answer occurs more than once")

    def test_two_answers_that_differ_in_punctuation_only(self) -> None:
        finding = only_finding(changed(lambda c: replace(c, negative=c.positive + "!"), range(8, 9)))
        assert (finding.rule, finding.contrasts) == ("repeated answers", (8,))

    @pytest.mark.parametrize("n_words", [14, 46])
    def test_answers_too_short_or_too_long(self, n_words: int) -> None:
        rng = random.Random(1)

        def change(c: Contrast) -> Contrast:
            return replace(c, positive=sentence(rng, n_words), negative=sentence(rng, n_words))

        finding = only_finding(changed(change, range(1, 3)))
        assert (finding.rule, finding.severity, finding.contrasts) == ("lengths", "error", (1, 2))
        assert str(n_words) in finding.message

    def test_answers_of_a_contrast_that_differ_in_length(self) -> None:
        rng = random.Random(1)
        bad = changed(lambda c: replace(c, positive=sentence(rng, 40), negative=sentence(rng, 29)), range(6, 7))
        finding = only_finding(bad)
        assert (finding.rule, finding.severity, finding.contrasts) == ("unequal pairs", "error", (6,))
        assert check_set(bad, FREE) == ()

    def test_means_that_differ(self) -> None:
        finding = only_finding(changed(shorten))
        assert (finding.rule, finding.severity) == ("mean lengths", "error")
        assert "warm has" in finding.message

    def test_openings_that_tell(self) -> None:
        openings = iter(["Oh well", "Ah fine"] * 18)
        bad = changed(lambda c: replace(c, positive=f"{next(openings)} {c.positive}"), range(1, 37))
        finding = only_finding(bad, FREE)
        assert (finding.rule, finding.severity) == ("openings", "error")
        assert finding.contrasts == tuple(range(1, 37))
        accuracy = opening_accuracy(bad.contrasts)
        assert f"tell the pole in {accuracy:.0%} of answers, at most 60% may" in finding.message

    def test_negations_on_one_side(self) -> None:
        negations = iter(["not", "never", "nothing", "without", "didn't", "won’t", "cannot"])
        bad = changed(lambda c: replace(c, negative=f"{c.negative} {next(negations)}"), range(1, 8))
        finding = only_finding(bad)
        assert (finding.rule, finding.severity, finding.contrasts) == ("negations", "error", tuple(range(1, 8)))
        assert finding.message.startswith("0 answers of warm and 7 of blunt negate")

    def test_a_word_that_tells(self) -> None:
        finding = only_finding(changed(lambda c: replace(c, negative=f"{c.negative} Frankly!"), range(20, 40)))
        assert (finding.rule, finding.severity, finding.contrasts) == ("telling words", "error", tuple(range(20, 40)))
        assert finding.message == "'frankly' in 20 more answers of blunt; the sides may differ by 30% of 60"


FREE = Rules(equal_lengths=False)


def shorten(c: Contrast) -> Contrast:
    """A tenth of the negative answer's words less, which a pair may differ by."""
    found = c.negative.split()
    return replace(c, negative=" ".join(found[: max(15, len(found) - len(found) // 8)]))


def test_errors_come_before_warnings() -> None:
    bad = changed(lambda c: replace(c, prompt=f"{c.prompt} {'so ' * 33}{sentence(random.Random(c.prompt), 9)}"))
    rules = Rules(min_contrasts=61)
    assert [finding.severity for finding in check_set(bad, rules)] == ["error", "warning"]
    report = check_report(bad, rules)
    assert report.has_errors
    assert report.lines[-1] == "1 error, 1 warning"
    assert report.lines[-2].endswith("20 … (60 in all)]")


def test_yes_and_no_have_no_manner_to_check() -> None:
    good = good_set()
    statements = tuple(Contrast(c.prompt, *("Yes", "No")[:: 1 if i % 2 else -1]) for i, c in enumerate(good.contrasts))
    assert check_set(replace(good, contrasts=statements)) == ()
    assert only_finding(replace(good, contrasts=statements[:20])).rule == "amount"


def test_ten_thousand_prompts_can_be_compared() -> None:
    rng = random.Random(3)
    prompts = [" ".join(f"w{rng.randrange(10_000)}" for _ in range(12)) for _ in range(5000)]
    prompts += ["Is this something you would say?"] * 5000
    contrasts = tuple(Contrast(prompt, f"Yes {i}", f"No {i}") for i, prompt in enumerate(prompts))
    found = {finding.rule: finding for finding in check_set(replace(good_set(), contrasts=contrasts))}
    assert set(range(5002, 10_001)) <= set(found["similar prompts"].contrasts)


def test_the_opening_rule_sees_an_opening_that_tells() -> None:
    telling = tuple(Contrast(f"p{i}", f"I am glad {i}", f"No thank you {i}") for i in range(10))
    alike = tuple(Contrast(f"p{i}", f"I am glad {i}", f"I am sad {i}") for i in range(10))
    assert opening_accuracy(telling) == 1.0
    assert opening_accuracy(alike) == 0.5
    assert opening_accuracy((Contrast("p", "Yes", "…"),)) == 0.5


def test_measures() -> None:
    contrasts = (Contrast("a", "I do not know it.", "I do know."), Contrast("b", "We never do that.", "We do."))
    found = measure(replace(good_set(), contrasts=contrasts))
    assert (found.n_contrasts, found.positive_words, found.negative_words) == (2, 4.5, 2.5)
    assert (found.positive_negations, found.negative_negations) == (2, 0)
    assert (found.telling_word, found.telling_difference) == ("that", 0.5)


class TestPoleWords:
    @pytest.mark.parametrize(
        ("pole", "named"),
        [
            ("warm", "warm Warmer warmth warmly warm's"),
            ("concise", "concise concisely conciseness"),
            ("optimistic", "optimistic optimism optimist optimistically"),
            ("moody", "moody moodiness moodier"),
            ("formal", "formal formality formally"),
            ("wealth", "wealthy wealth"),
            ("power-seeking", "power powerful powers"),
            ("anti-power", "powerful"),
            ("Old Bram", "Bram Bram's"),
            ("wry", "wry wryly"),
        ],
    )
    def test_named(self, pole: str, named: str) -> None:
        assert pole_words(named, [pole]) == named.lower().split()

    @pytest.mark.parametrize(
        ("pole", "others"),
        [
            ("warm", "swarm warn warrant war"),
            ("playful", "play players"),
            ("I", "I i in"),
            ("anti-power", "anti antique"),
            ("decisive", "decision deciduous"),
            ("very kind", "very"),
            ("wry", "wrong dry"),
        ],
    )
    def test_not_named(self, pole: str, others: str) -> None:
        assert pole_words(others, [pole]) == []

    def test_distant_relatives_are_told_apart(self) -> None:
        assert pole_words("caution", ["cautious"]) == []
        assert pole_words("caution cautiously, play", ["cautious", "playful"], distant=True) == [
            *("caution", "cautiously", "play")
        ]

    def test_names_of_types_belong_to_their_poles_only(self) -> None:
        text = "An INFP is an introvert. Perceiving personality, say sensible people."
        assert names_of_types(text, ("E", "I")) == ["infp", "introvert", "perceiving", "personality"]
        assert names_of_types(text, ("warm", "blunt")) == []
