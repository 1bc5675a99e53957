"""Drift, choices and free replies against numbers computed by hand, and every task of the registry on a small model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.effect.choice_tasks import (
    CHOICE_FILES,
    ChoiceItem,
    ChoiceTask,
    LastWordTask,
    choice_task,
    encode_pair,
)
from persona_edge.effect.drift_tasks import ChatKlTask, PerplexityTask, WebKlTask, kl_divergence, spaced_windows
from persona_edge.effect.reply_tasks import REPLY_PROMPTS, ReplyTask, ordinary_words, reply_quality
from persona_edge.effect.role_task import role_axis
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.effect.task_registry import QUICK_TASKS, TASK_NAMES, TaskContext, make_tasks, skipped_tasks
from persona_edge.errors import CalibrationError, InputError
from persona_edge.persona_sets import load_persona_set
from tests.rule_engine import ALPHABET, Rule, RuleEngine, base, means, measure, prompted, ruled
from tests.tiny_eval_data import write_folder

UNIFORM = math.log(len(ALPHABET))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"))


def test_windows_reach_from_the_first_token_to_the_last() -> None:
    text = "".join(ALPHABET[i % len(ALPHABET)] for i in range(250))
    engine = RuleEngine(start="~")
    windows = spaced_windows(engine, text, 3, 50)
    tokens = engine.text_tokens(text)
    assert [list(window.tokens) for window in windows] == [
        [*engine.text_tokens("~"), *tokens[first : first + 50]] for first in (0, 100, 200)
    ]
    assert {window.n_scored for window in windows} == {50}
    assert len(spaced_windows(RuleEngine(), text, 99, 50)) == 5
    assert spaced_windows(RuleEngine(), text, 1, 50)[0].n_scored == 49
    with pytest.raises(CalibrationError, match="longer text"):
        spaced_windows(engine, "short", 3, 50)


def test_perplexity_is_that_of_the_model_and_its_ratio_that_of_the_arm() -> None:
    task = PerplexityTask("wikitext", "a" * 64, 2, window_tokens=16)
    values = means(measure(task, RuleEngine(), ruled(Rule("b", 1.0))))
    total = math.log(math.e + len(ALPHABET) - 1)
    assert values["log perplexity"] == pytest.approx(total, rel=1e-6)
    assert values["log perplexity ratio to base"] == pytest.approx(total - UNIFORM, abs=1e-5)
    assert means(measure(task, RuleEngine(), base()))["log perplexity ratio to base"] == 0


def test_kl_divergence_is_not_hurt_by_rounding_of_what_was_stored() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (2, 3, 500))
    before, after = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logits)
    exact = (np.exp(before) * (before - after)).sum(axis=1)
    stored = before.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(kl_divergence(stored, after.astype(np.float32)), exact, atol=2e-3)


def uniform_to_boosted(boost: float) -> float:
    """KL(uniform || one character has `boost` nats more)."""
    n = len(ALPHABET)
    total = math.log(math.exp(boost) + n - 1)
    return total - boost / n - UNIFORM


def test_web_drift_is_that_of_the_distributions() -> None:
    task = WebKlTask(("some text about the weather", "more"))
    found = measure(task, RuleEngine(Rule("a", 0.0)), ruled(Rule("b", 2.0)))
    assert means(found)["web KL"] == pytest.approx(uniform_to_boosted(2.0), abs=1e-3)
    assert means(found)["likeliest token changed"] == 1
    spoken = measure(task, RuleEngine(Rule("b", 2.0, after="loud")), prompted("loud"))
    assert means(spoken)["web KL"] == pytest.approx(0, abs=1e-6)


def test_chat_drift_follows_the_models_own_answers_in_the_arms_conversation() -> None:
    task = ChatKlTask(("Why?", "How?"))
    engine = RuleEngine(Rule("b", 2.0, after="loud"))
    found = measure(task, engine, prompted("loud"))
    assert means(found)["chat KL"] == pytest.approx(uniform_to_boosted(2.0), abs=1e-3)
    assert means(measure(task, engine, base()))["chat KL"] == pytest.approx(0, abs=1e-6)


def test_choices_by_sum_and_by_characters() -> None:
    item = ChoiceItem(("Q:",) * 3, (" aaaa", " b", " c"), (4, 1, 1), 0)
    engine = RuleEngine(Rule("a", 3.0))
    task = ChoiceTask("t", (item,), normalised=True)
    found = means(measure(task, engine, base()))
    likely, other = 3 - math.log(math.exp(3) + len(ALPHABET) - 1), -math.log(math.exp(3) + len(ALPHABET) - 1)
    scores = np.array([other + 4 * likely, 2 * other, 2 * other])
    np.testing.assert_allclose(task.scores(engine, base())[0], scores, rtol=1e-6)
    assert (found["acc"], found["acc_norm"]) == (float(scores.argmax() == 0), 1)
    assert found["p(right choice)"] == pytest.approx(np.exp(scores[0]) / np.exp(scores).sum(), rel=1e-5)


def test_white_space_at_the_end_of_a_context_belongs_to_the_continuation() -> None:
    text = encode_pair(RuleEngine(start="~"), "Answer: ", "yes")
    assert (len(text.tokens), text.n_scored) == (1 + len("Answer: yes"), len(" yes"))


@pytest.mark.parametrize(
    ("name", "context", "continuations"),
    [
        ("hellaswag", "Sum 0", (" one", " seventeen", " two", " six")),
        ("arc_easy", "Question: Sum 0\nAnswer:", (" one", " seventeen", " two", " six")),
        ("boolq", "It is 0.\nQuestion: is it?\nAnswer:", (" no", " yes")),
        ("winogrande", "So Al", (" went 0.", " went 0.")),
        (
            "mmlu",
            "The following are multiple choice questions (with answers) about high school physics.\n\n"
            "Sum 0\nA. one\nB. seventeen\nC. two\nD. six\nAnswer:",
            (" A", " B", " C", " D"),
        ),
    ],
)
def test_contexts_are_worded_as_in_the_harness(
    folder: Path, name: str, context: str, continuations: tuple[str, ...]
) -> None:
    item = choice_task(folder, name, 99, 0).items[0]
    assert (item.contexts[0], item.continuations, item.gold) == (context, continuations, 0)


def test_in_chat_a_choice_sees_the_arms_conversation(folder: Path) -> None:
    engine = RuleEngine(Rule("A", 3.0, after="be first"))
    for chat, expected in ((False, 0.25), (True, 0.8)):
        task = choice_task(folder, "mmlu", 1, 1, chat=chat)
        share = measure(task, engine, prompted("be first")).measures[-1].values
        gold = task.items[0].gold
        assert share == pytest.approx([expected if gold == 0 or not chat else 0.05], abs=0.1)


def test_a_last_word_must_be_the_greedy_choice() -> None:
    task = LastWordTask("lambada", (("He said", "left"), ("She said", "right")))
    engine = RuleEngine(
        Rule(" ", 9.0, after="said"), *(Rule(b, 9.0 * 2 ** (i + 1), after=a) for i, (a, b) in enumerate(LEFT))
    )
    found = measure(task, engine, base()).measures
    assert found[0].values.tolist() == [1, 0]
    assert found[1].values[0] > -1 > found[1].values[1]


LEFT = (("said ", "l"), ("said l", "e"), ("said le", "f"), ("said lef", "t"))
WORDS = frozenset(["i", "like", "quiet", "evenings", "with", "a", "book", "and", "you", "are", "fine", "today"])


def test_repetition_is_the_share_of_sequences_said_before() -> None:
    found = reply_quality("i like a book i like a book i like a book", WORDS)
    assert found.repetition == pytest.approx(5 / 9)  # nine sequences of four words, four of them different
    assert (found.distinct_1, found.distinct_2) == pytest.approx((4 / 12, 4 / 11))
    assert found.is_degenerate


@pytest.mark.parametrize(
    ("reply", "unusual"), [("I like Paris", 0), ("i like zorgle", 1 / 3), ("我 i", 1 / 2), ("Zorgle!", 0), ("?", 0)]
)
def test_names_are_not_unusual_words(reply: str, unusual: float) -> None:
    assert reply_quality(reply, WORDS).unusual == pytest.approx(unusual)


@pytest.mark.parametrize(
    "reply", ["As an AI language model, fine", "I'm just a computer program", "Sorry, I can’t do it"]
)
def test_refusals_are_found(reply: str) -> None:
    assert reply_quality(reply, WORDS).refuses


@pytest.mark.parametrize(
    "reply", ["I like being an assistant teacher", "I can't wait to see you", "I'm sorry to hear that"]
)
def test_ordinary_replies_are_no_refusals(reply: str) -> None:
    assert not reply_quality(reply, WORDS).refuses


def test_empty_replies_are_degenerate() -> None:
    found = reply_quality(" ...\n", WORDS)
    assert (found.is_empty, found.is_degenerate, found.n_words, found.repetition) == (True, True, 0, 0)


def test_replies_are_kept_as_transcripts() -> None:
    result = measure(ReplyTask(("Hello?", "Well?"), WORDS), RuleEngine(Rule("a", 1.0)), base())
    assert dict(result.transcripts) == {"Hello?": "a" * 96, "Well?": "a" * 96}
    assert {items.measure: items.values[0] for items in result.measures}["degenerate"] == 1


def test_prompts_are_half_about_oneself_and_words_come_from_all_texts(folder: Path) -> None:
    assert len(set(REPLY_PROMPTS)) == 24
    axis = CalibrationSet("a", "a", "x", "y", (Contrast("Qwertz?", "asdf", "yxcv"),))
    words = ordinary_words([axis], folder)
    assert {"qwertz", "asdf", "yxcv", "weatherly", "articled"} <= words
    assert not {"weatherly", "articled"} & ordinary_words([axis], None)


def context(folder: Path | None, name: str, n: int = 4) -> TaskContext:
    spec = load_persona_set("mbti16")
    return TaskContext(next(axis for axis in spec.sets if axis.axis == name), spec, folder, n_items=n)


@pytest.mark.parametrize("axis", ["EI", "SN", "TF", "JP"])
def test_every_task_measures_every_kind_of_arm(folder: Path, axis: str) -> None:
    engine = RuleEngine(Rule("etaoin ", 1.5))
    made = context(folder, axis)
    tasks = make_tasks(TASK_NAMES, made)
    assert len({task.name for task in tasks}) == len(tasks)
    assert {skipped.name for skipped in skipped_tasks(TASK_NAMES, made)} <= {"roles", "statements"}
    arm = ruled(Rule("e", 0.3), pole=made.axis_set.positive_pole)
    for task in tasks:
        json.dumps(dict(task.settings))
        plain, changed = (measure(task, engine, arm) for arm in (base(), arm))
        assert plain.task == task.name
        for items in changed.measures:
            assert items.values.ndim == 1
            assert np.isfinite(items.values).all(), (task.name, items.measure)
        assert {items.measure for items in plain.measures} <= {items.measure for items in changed.measures}


def test_roles_have_a_task_where_the_axis_is_one(folder: Path) -> None:
    axis = role_axis(folder, "Ann Bold", "Bo Calm")
    assert [t.name for t in make_tasks(["roles"], TaskContext(axis, data=folder))] == [
        f"role identification: {axis.axis}"
    ]


def test_what_is_left_out_says_why(folder: Path) -> None:
    reasons = {s.name: s.reason for s in skipped_tasks(TASK_NAMES, context(None, "EI"))}
    assert {*CHOICE_FILES, "external", "wikitext", "chat_kl"} <= set(reasons)
    assert all("PERSONA_EDGE_DATA" in reasons[name] for name in CHOICE_FILES)
    assert {task.kind for task in make_tasks(TASK_NAMES, context(None, "EI"))} == {"persona", "replies"}
    skipped = skipped_tasks(["hellaswag"], context(folder / "mbti", "EI"))
    assert "hellaswag_val_1000.jsonl is not in" in skipped[0].reason


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(InputError, match="no task 'helloswag'; the tasks are contrasts"):
        make_tasks(["helloswag"], context(None, "EI"))
    assert set(QUICK_TASKS) <= set(TASK_NAMES)


@pytest.mark.model
@pytest.mark.data
def test_the_real_model_on_real_data(smollm2_path: Path, data_folder: Path) -> None:
    """Loose bounds that a broken tokenization, split or sign would leave."""
    with RuntimeEngine.open(smollm2_path, n_ctx=2048) as engine:
        tasks = make_tasks(["wikitext", "arc_easy", "lambada"], context(data_folder, "EI", n=12))
        found = {task.name: means(measure(task, engine, base())) for task in tasks}
    assert 2.5 < found["wikitext-2"]["log perplexity"] < 4
    assert found["arc_easy"]["acc"] >= 0.4
    assert found["lambada"]["log p of the last word"] > -6
