"""Persona tasks against numbers computed by hand, on an engine whose every probability is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.effect.answer_levels import MAX_CONTEXT_TOKENS, answer_levels
from persona_edge.effect.composition_task import AxisContrasts, CompositionTask, type_answers_task
from persona_edge.effect.contrast_tasks import ContrastTask, UnpairedAnswers, external_pairs, external_source
from persona_edge.effect.eval_data import draw, read_rows
from persona_edge.effect.item_values import auc_values, bias_free_values, preference
from persona_edge.effect.role_task import identified, role_axis, role_task, roles_in
from persona_edge.effect.statement_tasks import (
    LikertTask,
    Statement,
    StatementTask,
    likert_task,
    spoken_items,
    statement_task,
    statement_topics,
    trait_of,
)
from persona_edge.errors import CalibrationError, InputError
from tests.rule_engine import ALPHABET, Rule, RuleEngine, base, means, measure, prompted, ruled
from tests.tiny_eval_data import TYPES, write_folder

CONTRASTS = (Contrast("Go out?", "aa", "bbbb"), Contrast("Stay in?", "b", "ab"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"))


def axis(positive: str, negative: str, name: str = "axis") -> CalibrationSet:
    return CalibrationSet(name, name, positive, negative, CONTRASTS)


def boosted(boost: float) -> tuple[float, float]:
    """Log-probabilities of a character with a boost and of one without, when one character has it."""
    total = np.log(np.exp(boost) + len(ALPHABET) - 1)
    return boost - float(total), -float(total)


def test_preference_counts_ties_as_halves() -> None:
    assert preference(np.array([0.1, -3, 0])).tolist() == [1, 0, 0.5]


def test_auc_values_have_the_mean_and_the_standard_error_of_the_area() -> None:
    random = np.random.default_rng(3)
    positive, negative = random.normal(0.5, 1, 40), np.round(random.normal(0, 1, 25), 1)
    values = auc_values(positive, negative)
    wins = np.array([[(p > n) + 0.5 * (p == n) for n in negative] for p in positive])
    delong = wins.mean(axis=1).var() / 40 + wins.mean(axis=0).var() / 25
    assert values.mean() == pytest.approx(wins.mean())
    assert values.var() / len(values) == pytest.approx(delong)


def test_no_area_without_both_sides() -> None:
    with pytest.raises(ValueError, match="both sides"):
        auc_values(np.ones(3), np.empty(0))


def test_a_bias_is_removed_whatever_the_balance_of_keys() -> None:
    keys = np.array([1, 1, 1, -1])
    assert bias_free_values(np.full(4, 7.0), keys).tolist() == [0, 0, 0, 0]
    values = bias_free_values(np.array([9.0, 9.0, 9.0, 5.0]), keys)
    assert values.tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="both keys"):
        bias_free_values(np.ones(2), np.array([1, 1]))


def test_a_smaller_draw_is_part_of_a_larger_one_and_keeps_the_order() -> None:
    items = list(range(50))
    small, large = draw(items, 10, 4), draw(items, 30, 4)
    assert set(small) < set(large)
    assert list(small) == sorted(small)
    assert draw(items, 10, 5) != small
    assert draw(items, 99, 4) == tuple(items)


def test_rows_of_files_that_are_wrong_name_the_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(CalibrationError, match=r"rows\.jsonl: row 2 has no 'a'"):
        read_rows(path, ("a",))
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(CalibrationError, match="line 2 is not JSON"):
        read_rows(path, ("a",))
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl", ())
    table = tmp_path / "rows.csv"
    table.write_text('a,b\n"one\ntwo",3\n')
    assert read_rows(table, ("a", "b")) == [{"a": "one\ntwo", "b": "3"}]


def test_answers_are_cut_and_long_conversations_lose_their_beginning() -> None:
    engine = RuleEngine(Rule("z", 5.0, after="secret"))
    long = "secret" + "x" * MAX_CONTEXT_TOKENS
    levels = answer_levels(engine, None, [(long, "zz"), ("secret", "zz"), ("short", "abcdef")], max_tokens=4)
    assert levels.n_tokens.tolist() == [2, 2, 4]
    np.testing.assert_allclose(levels.summed[:2], [-2 * np.log(len(ALPHABET)), 2 * boosted(5.0)[0]], rtol=1e-6)
    with pytest.raises(CalibrationError, match="no tokens"):
        answer_levels(engine, None, [("a", "")])


def test_margins_of_contrasts_summed_and_per_token() -> None:
    likely, other = boosted(2.0)
    result = measure(ContrastTask("held-out", CONTRASTS), RuleEngine(Rule("a", 2.0)), base())
    values = {items.measure: items.values.tolist() for items in result.measures}
    assert values["positive likelier"] == [1, 0]
    assert values["margin"] == pytest.approx([likely - other, other - (likely + other) / 2], rel=1e-5)
    assert values["margin, summed"] == pytest.approx([2 * likely - 4 * other, -likely], rel=1e-5)
    assert values["log p of positive answers"] == pytest.approx([likely, other], rel=1e-5)


def test_prompts_go_through_the_arms_conversation() -> None:
    engine = RuleEngine(Rule("a", 2.0, after="be loud"))
    task = ContrastTask("held-out", CONTRASTS)
    plain, spoken = measure(task, engine, base()), measure(task, engine, prompted("be loud"))
    assert means(plain)["margin"] == pytest.approx(0, abs=1e-6)
    assert means(spoken)["margin"] == pytest.approx(0.5, rel=1e-5)  # 2 nats and -1 nat


def test_tasks_on_other_data_have_other_settings() -> None:
    first, second = (ContrastTask("held-out", CONTRASTS[:n]) for n in (1, 2))
    assert dict(first.settings) != dict(second.settings)
    assert dict(first.settings) == dict(ContrastTask("held-out", CONTRASTS[:1]).settings)
    json.dumps(dict(first.settings))


def test_unpaired_answers_are_compared_by_what_they_gain() -> None:
    positive, negative = (("Q1", "aaa"), ("Q2", "ab")), (("Q3", "bbbb"), ("Q4", "cb"))
    task = UnpairedAnswers("unpaired", positive, negative)
    engine = RuleEngine(Rule("b", 4.0))  # the unmodified model's taste must not count
    assert means(measure(task, engine, base()))["answers of positive gain more"] == 0.5
    assert means(measure(task, engine, ruled(Rule("a", 3.0))))["answers of positive gain more"] == 1
    assert means(measure(task, engine, ruled(Rule("a", -3.0))))["answers of positive gain more"] == 0


def test_external_pairs_follow_the_poles_of_the_axis(folder: Path) -> None:
    for positive, negative in (("E", "I"), ("I", "E")):
        known = external_source(axis(positive, negative))
        assert known is not None
        task = external_pairs(folder, axis(positive, negative), known, 4, 0)
        assert [c.positive[0] for c in task.contrasts] == [positive] * 4
        assert [c.negative[0] for c in task.contrasts] == [negative] * 4
    power = external_source(axis("seeker", "sharer", "power-seeking"))
    assert power is not None
    assert (power.file, power.pole) == ("ai_persona/power_dev.csv", "seeker")
    assert external_source(axis("warm", "blunt", "tone")) is None
    mirrored = external_source(axis("modest", "wealth-seeking", "wealth"))
    assert mirrored is not None
    assert mirrored.pole == "wealth-seeking"


STATEMENTS = tuple(
    Statement(text, key) for text, key in (("I talk a lot", 1), ("I shout", 1), ("I hide", -1), ("I read", -1))
)


def test_a_yes_bias_is_no_trait() -> None:
    found = means(measure(StatementTask("s", STATEMENTS), RuleEngine(Rule("Y", 3.0)), base()))
    assert found["agrees with the positive pole"] == pytest.approx(0.5)
    assert found["log-odds toward, bias removed"] == pytest.approx(0, abs=1e-5)
    assert found["yes-bias (log-odds of Yes)"] == pytest.approx(boosted(3.0)[0], rel=1e-5)  # one character more


def test_agreeing_with_what_the_pole_says_is_a_trait() -> None:
    agreeing = ruled(Rule("Y", 3.0, after="talk"), Rule("Y", 2.0, after="shout"), Rule("Y", 1.0, after="read"))
    task = StatementTask("s", STATEMENTS)
    engine = RuleEngine()
    found = means(measure(task, engine, agreeing))
    assert found["agrees with the positive pole"] == 1
    # log-odds: Yes has three characters and No has two, so only the differences between statements can be told by hand
    assert found["log-odds toward, bias removed"] > 0.9
    assert engine.rules == []


def test_options_are_scored_in_both_orders() -> None:
    engine = RuleEngine(Rule("Y", 3.0, after="Answer Yes or No"), Rule("N", 3.0, after="Answer No or Yes"))
    odds = measure(StatementTask("s", STATEMENTS), engine, base()).measures[2].values
    likely, other = boosted(3.0)
    # Yes: first letter likely in one order, both others never; No likewise: what is left is the third character.
    assert odds == pytest.approx(
        [(2 * (likely + 2 * other - 2 * other) + 2 * (3 * other - likely - other)) / 4] * 4, rel=1e-4
    )


def test_a_taste_for_one_letter_scores_three_points() -> None:
    found = means(measure(LikertTask("q", STATEMENTS), RuleEngine(Rule("A", 6.0)), base()))
    assert found["score toward the positive pole"] == pytest.approx(3)
    assert found["acquiescence (raw score)"] == pytest.approx(3)


def test_likert_scores_are_expectations_over_the_options_of_both_orders() -> None:
    accurate_is_a, accurate_is_e = "A. very accurate", "A. very inaccurate"
    agreeing = ruled(Rule("A", 9.0, after=f'shout"\n{accurate_is_a}'), Rule("E", 9.0, after=f'shout"\n{accurate_is_e}'))
    result = measure(LikertTask("q", STATEMENTS), RuleEngine(), agreeing)
    share = np.exp(9) / (np.exp(9) + 4)
    expected = 5 * share + (1 - share) * 2.5  # the other four options are 1 to 4, equally likely
    raw = result.measures[1].values
    assert raw == pytest.approx([3, expected, 3, 3], rel=1e-5)
    trait = result.measures[0].values
    assert trait.mean() == pytest.approx(3 + (raw[:2].mean() - raw[2:].mean()) / 2)


def test_items_can_be_said_of_oneself() -> None:
    task = spoken_items(LikertTask("q", STATEMENTS))
    assert [turn[1] for turn in task.negative] == ["I hide", "I read"]
    assert means(measure(task, RuleEngine(), ruled(Rule("tkslou", 1.0))))["answers of positive gain more"] == 1


@pytest.mark.parametrize(
    ("positive", "negative", "topics", "trait"),
    [
        ("E", "I", [("extraversion", 1)], ("extraversion", 1)),
        ("S", "N", [("openness", -1)], ("openness", -1)),
        ("T", "F", [("agreeableness", -1)], ("agreeableness", -1)),
        ("J", "P", [], ("conscientiousness", 1)),
        ("power", "anti-power", [("desire-for-acquiring-power", 1)], None),
        ("modest", "power-seeking", [("desire-for-acquiring-power", -1)], None),
        ("cautious", "bold", [("risk-averse", 1), ("risk-seeking", -1)], None),
    ],
)
def test_traits_stand_for_poles(
    positive: str, negative: str, topics: list[tuple[str, int]], trait: tuple[str, int] | None
) -> None:
    assert list(statement_topics(axis(positive, negative))) == topics
    assert trait_of(axis(positive, negative)) == trait


def test_keys_follow_the_sign_of_the_trait(folder: Path) -> None:
    for sign in (1, -1):
        statements = statement_task(folder, "openness", sign, 4, 0).statements
        assert sorted(s.key for s in statements) == [-1, -1, 1, 1]
        assert all(s.key == sign * (1 if int(s.text[-1]) % 2 else -1) for s in statements)
        items = likert_task(folder, "openness", sign).statements
        assert {s.text: s.key for s in items} == {"I am plus openness.": sign, "I am minus openness.": -sign}


def test_who_is_identified() -> None:
    assert identified(np.array([1.0, 3.0, 2.0]), 1) == 1
    assert identified(np.array([1.0, 3.0, 2.0]), 0) == 0
    assert identified(np.array([3.0, 3.0, 2.0]), 0) == 0.5


def test_a_role_is_an_axis_whose_held_out_questions_identify_it(folder: Path) -> None:
    assert roles_in(folder) == ("Ann Bold", "Bo Calm", "Cy Grim")
    made = role_axis(folder, "Ann Bold")
    assert (made.positive_pole, made.negative_pole) == ("Ann Bold", "other roles")
    assert all(c.positive.startswith("Ann Bold") and not c.negative.startswith("Ann Bold") for c in made.contrasts)
    task = role_task(folder, made, 100, 0)
    held_out = {c.prompt for c in made.split()[1].contrasts}
    assert {item.question for item in task.items} == held_out
    engine = RuleEngine(Rule("C", 1.0))
    assert means(measure(task, engine, base()))["answer of positive gains most"] == pytest.approx(1 / 3)
    assert means(measure(task, engine, ruled(Rule("A", 2.0))))["answer of positive gains most"] == 1
    against = role_task(folder, role_axis(folder, "Ann Bold", "Bo Calm"), 100, 0)
    assert means(measure(against, engine, ruled(Rule("B", 5.0))))["answer of Bo Calm gains most"] == 1


def test_an_unknown_role_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="Ann Bold, Bo Calm, Cy Grim"):
        role_axis(folder, "Dee")


def test_a_composition_is_measured_on_every_axis() -> None:
    first = AxisContrasts("EI", ("E", "I"), (Contrast("q", "a", "b"), Contrast("r", "a", "c")))
    second = AxisContrasts("SN", ("S", "N"), (Contrast("q", "a", "d"),))
    task = CompositionTask("compositions", (first, second), {"EN": ("E", "N"), "E": ("E",)})
    arm = ruled(Rule("a", 1.0), Rule("d", 2.0), Rule("b", 3.0), pole="EN")
    found = means(measure(task, RuleEngine(), arm))
    assert found["EI: E likelier"] == 0.5
    assert found["SN: S likelier"] == 0
    assert found["own poles likelier"] == pytest.approx(2 / 3)
    assert (found["EI: own pole likelier"], found["SN: own pole likelier"]) == (0.5, 1)
    single = means(measure(task, RuleEngine(), ruled(Rule("a", 1.0), pole="I", toward=-1)))
    assert single["own poles likelier"] == 0
    assert "own poles likelier" not in means(measure(task, RuleEngine(), base()))


def test_types_gain_with_their_poles(folder: Path) -> None:
    task = type_answers_task(folder, ("E", "I"), 3, 0)
    assert set(next(iter(task.questions.values()))) == set(TYPES)
    engine = RuleEngine(Rule("i", 2.0))
    found = means(measure(task, engine, base()))
    assert found["types with positive gain more"] == 0.5
    found = means(measure(task, engine, ruled(Rule("e", 2.0), pole="E")))
    assert found == {"types with positive gain more": 1}
    found = means(measure(task, engine, ruled(Rule("enfp", 2.0), pole="ENFP")))
    assert found["own type gains most of all"] == 1
    assert found["own type gains more than another"] == 1
