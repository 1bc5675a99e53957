"""General ability: multiple choice and last words, scored as lm-evaluation-harness scores them.

A choice is a continuation of a context; the prediction is the continuation with the largest summed log-probability
(`acc`), or the largest per character (`acc_norm`). Contexts are worded as the harness words them, without examples, as
plain text or, in the `chat` variants, as a question in the model's template. Plain text does not see an arm that acts
through its conversation: its plain numbers are those of the unmodified model, and only the chat variants tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.answer_levels import encode_answer
from persona_edge.effect.eval_data import Row, digest, draw, read_rows
from persona_edge.effect.interfaces import SHARE, Arm, Engine, Items, TaskResult
from persona_edge.encoding import EncodedText

__all__ = ["CHOICE_FILES", "ChoiceItem", "ChoiceTask", "LastWordTask", "choice_task", "encode_pair", "last_word_task"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ChoiceItem:
    """One context and one continuation per choice (`contexts` may all be the same), and which choice is right.

    `lengths` are the characters of the choices, by which `acc_norm` divides.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class _Wording:
    """A file of `data`/capability, the keys its rows must have, and what the harness makes of a row."""

    file: str
    keys: tuple[str, ...]
    item: Callable[[Row], ChoiceItem]
    normalised: bool


@dataclass(frozen=True)
class ChoiceTask:
    """Accuracy over `items`; `chat` puts contexts through the arm's conversation."""

    name: str
    items: tuple[ChoiceItem, ...]
    normalised: bool
    chat: bool = False
    kind: Literal["side effect"] = "side effect"

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        """Number of items, the form, and a digest of the items."""
        data = digest([asdict(item) for item in self.items])
        return {"n_items": len(self.items), "chat": int(self.chat), "data": data}

    def prepare(self, engine: Engine) -> None:
        """Nothing."""

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """`acc`, where it is usual `acc_norm`, and the probability that the right choice has among the choices.

        The last moves before an accuracy over few items does.
        """
        scores = self.scores(engine, arm)
        gold = np.array([item.gold for item in self.items])
        lengths = [np.array(item.lengths, dtype=np.float64) for item in self.items]
        right = np.array([np.argmax(s) for s in scores]) == gold
        measures = [Items("acc", right.astype(np.float64), SHARE, "better")]
        if self.normalised:
            picked = np.array([np.argmax(s / n) for s, n in zip(scores, lengths, strict=True)])
            measures.append(Items("acc_norm", (picked == gold).astype(np.float64), SHARE, "better"))
        probability = [np.exp(s[g] - np.logaddexp.reduce(s)) for s, g in zip(scores, gold, strict=True)]
        measures.append(Items("p(right choice)", np.array(probability), SHARE, "better"))
        return TaskResult(self.name, tuple(measures))

    def scores(self, engine: Engine, arm: Arm) -> list[Floats]:
        """Summed log-probability of every choice of every item, (n_choices,) each."""
        texts = [text for item in self.items for text in self._texts(engine, arm, item)]
        found = iter(engine.log_probabilities(texts))
        return [np.array([next(found).sum() for _ in item.continuations]) for item in self.items]

    def _texts(self, engine: Engine, arm: Arm, item: ChoiceItem) -> list[EncodedText]:
        pairs = list(zip(item.contexts, item.continuations, strict=True))
        if not self.chat:
            return [encode_pair(engine, context, continuation) for context, continuation in pairs]
        tokens = {context: engine.chat_tokens(arm.messages(context)) for context in set(item.contexts)}
        return [encode_answer(engine, tokens[context], continuation.strip()) for context, continuation in pairs]


@dataclass(frozen=True)
class LastWordTask:
    """LAMBADA: is the last word of a passage what the model would say greedily."""

    name: str
    passages: tuple[tuple[str, str], ...]
    kind: Literal["side effect"] = "side effect"

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        """Number of passages and a digest of them."""
        return {"n_items": len(self.passages), "data": digest(self.passages)}

    def prepare(self, engine: Engine) -> None:
        """Nothing."""

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """`acc`: every token of the word is the likeliest; and the word's summed log-probability."""
        texts = [encode_pair(engine, context, f" {word}") for context, word in self.passages]
        greedy, level = np.zeros(len(texts)), np.zeros(len(texts))
        for i, (text, log_p) in enumerate(zip(texts, engine.distributions(texts), strict=True)):
            targets = np.array(text.tokens[-text.n_scored :])
            greedy[i] = (log_p.argmax(axis=1) == targets).all()
            level[i] = log_p[np.arange(len(targets)), targets].astype(np.float64).sum()
        return TaskResult(
            self.name,
            (Items("acc", greedy, SHARE, "better"), Items("log p of the last word", level, "nats", "better")),
        )


def encode_pair(engine: Engine, context: str, continuation: str) -> EncodedText:
    """`continuation` scored after `context`, tokenized together and split after as many tokens as the context has.

    White space at the end of the context counts as part of the continuation. This is the harness's rule; it keeps the
    tokens those of ordinary text.
    """
    trimmed = context.rstrip()
    whole = engine.text_tokens(trimmed + context[len(trimmed) :] + continuation)
    start = engine.start_tokens()
    n_context = len(engine.text_tokens(trimmed))
    return EncodedText((*start, *whole), min(len(whole) - n_context, len(start) + len(whole) - 1))


def _same_context(context: str, choices: Sequence[str], gold: int) -> ChoiceItem:
    continuations = tuple(f" {choice}" for choice in choices)
    return ChoiceItem((context,) * len(choices), continuations, tuple(map(len, choices)), gold)


def _plain(row: Row) -> ChoiceItem:
    return _same_context(row["query"], row["choices"], row["gold"])


def _question(row: Row) -> ChoiceItem:
    return _same_context(f"Question: {row['query']}\nAnswer:", row["choices"], row["gold"])


def _passage(row: Row) -> ChoiceItem:
    return _same_context(f"{row['query'].removeprefix('Passage: ')}\nAnswer:", row["choices"], row["gold"])


def _lettered(row: Row) -> ChoiceItem:
    subject = row["subject"].replace("_", " ")
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return _same_context(f"{head}{row['query'].strip()}\n{options}\nAnswer:", "ABCD", row["gold"])


def _two_contexts(row: Row) -> ChoiceItem:
    contexts = tuple(row["context_options"])
    continuation = row["continuation"]
    return ChoiceItem(
        contexts, (f" {continuation}",) * len(contexts), (len(continuation),) * len(contexts), row["gold"]
    )


_KEYS = ("query", "choices", "gold")
CHOICE_FILES: Final[Mapping[str, _Wording]] = {
    "hellaswag": _Wording("hellaswag_val_1000.jsonl", _KEYS, _plain, True),
    "mmlu": _Wording("mmlu_test_20x57.jsonl", (*_KEYS, "subject"), _lettered, False),
    "arc_easy": _Wording("arc_easy_test_1000.jsonl", _KEYS, _question, True),
    "arc_challenge": _Wording("arc_challenge_test_1000.jsonl", _KEYS, _question, True),
    "piqa": _Wording("piqa_val_1000.jsonl", _KEYS, _question, True),
    "openbookqa": _Wording("openbookqa_test_500.jsonl", _KEYS, _plain, True),
    "boolq": _Wording("boolq_val_700.jsonl", _KEYS, _passage, False),
    "winogrande": _Wording(
        "winogrande_val_1000.jsonl", ("context_options", "continuation", "gold"), _two_contexts, False
    ),
}
LAST_WORD_FILE: Final = "lambada_openai_1000.jsonl"


def choice_task(folder: Path, name: str, n: int, seed: int, *, chat: bool = False) -> ChoiceTask:
    """The task `name` of CHOICE_FILES over `n` items of `folder`/capability. KeyError for another name."""
    wording = CHOICE_FILES[name]
    rows = draw(read_rows(folder / "capability" / wording.file, wording.keys), n, seed)
    items = tuple(wording.item(row) for row in rows)
    return ChoiceTask(f"{name} in chat" if chat else name, items, wording.normalised, chat)


def last_word_task(folder: Path, n: int, seed: int) -> LastWordTask:
    """LAMBADA over `n` passages of `folder`/capability."""
    rows = read_rows(folder / "capability" / LAST_WORD_FILE, ("context", "continuation"))
    return LastWordTask("lambada", tuple((row["context"], row["continuation"]) for row in draw(rows, n, seed)))
