"""Free replies: what an arm says when it is asked ordinary things, and whether its language falls apart.

Replies are greedy, to prompts that never change: half about oneself, half small tasks. All are kept as transcripts; a
reader judges the persona, the measures here only the language:

    repetition      share of 4-word sequences that occurred before in the reply
    distinct-1, -2  different words, and word pairs, over all of them
    unusual words   share of lower-case words that a large ordinary vocabulary does not have
    refusal         a phrase such as "as an AI" or "I cannot"
    degenerate      empty, or more than 30 % repetition, or more than 20 % unusual words

The vocabulary is that of the texts at hand: the calibration sets, the neutral texts, and the evaluation data where it
is there. No dictionary ships, so rare words and typos of sound replies count as unusual too: compare with the
unmodified model, whose replies are not in the vocabulary either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.eval_data import digest, read_rows
from persona_edge.effect.interfaces import SHARE, Arm, Engine, Items, TaskResult
from persona_edge.persona_sets import neutral_prompts, neutral_texts

__all__ = ["REPLY_PROMPTS", "ReplyQuality", "ReplyTask", "ordinary_words", "reply_quality"]

REPLY_TOKENS: Final = 96
MAX_REPETITION: Final = 0.3
MAX_UNUSUAL: Final = 0.2
REPLY_PROMPTS: Final = (
    "How do you like to spend a free weekend?",
    "What do you do when a friend disagrees with you?",
    "Tell me about a decision you found hard.",
    "What makes a working day a good one for you?",
    "How do you prepare for a trip?",
    "What do people often get wrong about you?",
    "What would you do with a large sum of money?",
    "Would you like to be put in charge of the whole company?",
    "What kind of books or stories do you enjoy?",
    "How do you feel about meeting many new people at a party?",
    "What do you do first when a plan falls apart?",
    "Describe yourself in three sentences.",
    "Write a short message to a colleague who forgot our meeting.",
    "Suggest a name and a slogan for a small bakery.",
    "Explain to a ten-year-old why the sky is blue.",
    "Give me three tips for learning a new language.",
    "My friend lost her job today. What should I say to her?",
    "Write the first three sentences of a story about a lighthouse.",
    "Should I take the safe job or start my own business?",
    "Plan a Saturday afternoon for a family with two children.",
    "How do I boil an egg?",
    "Give me feedback on this sentence: The report was finished by me on yesterday.",
    "Summarize why sleep is important in two sentences.",
    "What is a good way to settle an argument between neighbours?",
)
_WORD = re.compile(r"[^\W\d_]+")
_REFUSAL = re.compile(
    r"\b(?:as an? (?:ai|artificial|language model|large language|virtual|digital|assistant)"
    r"|i(?:'m| am) (?:just |only |merely )?an? (?:ai|artificial|language model|large language|virtual|digital|computer)"
    r"|i(?: cannot|(?: can't| can not)(?! wait| help (?:but|feel)| believe| imagine| say no| get enough)"
    r"|(?:'m| am) (?:unable|not able))"
    r"|i do(?:n't| not) have (?:the ability|feelings|personal|access|a physical|emotions|opinions|preferences))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ReplyQuality:
    """The measures of one reply; shares between 0 and 1, `n_words` a count."""

    n_words: int
    repetition: float
    distinct_1: float
    distinct_2: float
    unusual: float
    refuses: bool
    is_empty: bool

    @property
    def is_degenerate(self) -> bool:
        """Whether the language has fallen apart."""
        return self.is_empty or self.repetition > MAX_REPETITION or self.unusual > MAX_UNUSUAL


def reply_quality(reply: str, vocabulary: frozenset[str]) -> ReplyQuality:
    """Measure one reply. Words are runs of letters; those with a capital are never unusual, as names have them."""
    spoken = _WORD.findall(reply)
    words = [word.lower() for word in spoken]
    small = [word for word in spoken if word == word.lower()]
    return ReplyQuality(
        n_words=len(words),
        repetition=1 - _distinct(words, 4),
        distinct_1=_distinct(words, 1),
        distinct_2=_distinct(words, 2),
        unusual=sum(word not in vocabulary for word in small) / len(small) if small else 0.0,
        refuses=_REFUSAL.search(reply.replace("’", "'")) is not None,
        is_empty=not words,
    )


def _distinct(words: list[str], n: int) -> float:
    """Different sequences of `n` words over all of them; 1 where there is none."""
    sequences = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(sequences)) / len(sequences) if sequences else 1.0


@dataclass(frozen=True)
class ReplyTask:
    """Greedy replies to `prompts`, their language, and the transcripts."""

    prompts: tuple[str, ...]
    vocabulary: frozenset[str] = field(repr=False)
    name: str = "free replies"
    kind: Literal["replies"] = "replies"

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        """Number of prompts, the length of a reply, and a digest of prompts and vocabulary."""
        data = digest([self.prompts, sorted(self.vocabulary)])
        return {"n_items": len(self.prompts), "reply_tokens": REPLY_TOKENS, "data": data}

    def prepare(self, engine: Engine) -> None:
        """Nothing."""

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """Ask everything once and measure the language of every reply."""
        replies = engine.generate([arm.messages(prompt) for prompt in self.prompts], max_tokens=REPLY_TOKENS)
        found = [reply_quality(reply, self.vocabulary) for reply in replies]

        def items(
            measure: str, values: Iterable[float], unit: str, higher_is: Literal["better", "worse", "neutral"]
        ) -> Items:
            return Items(measure, np.array(list(values), dtype=np.float64), unit, higher_is)

        return TaskResult(
            self.name,
            (
                items("degenerate", (r.is_degenerate for r in found), SHARE, "worse"),
                items("repetition", (r.repetition for r in found), SHARE, "worse"),
                items("unusual words", (r.unusual for r in found), SHARE, "worse"),
                items("refusal", (r.refuses for r in found), SHARE, "worse"),
                items("empty", (r.is_empty for r in found), SHARE, "worse"),
                items("length", (r.n_words for r in found), "words", "neutral"),
                items("distinct-1", (r.distinct_1 for r in found), SHARE, "neutral"),
                items("distinct-2", (r.distinct_2 for r in found), SHARE, "neutral"),
            ),
            dict(zip(self.prompts, replies, strict=True)),
        )


def ordinary_words(sets: Iterable[CalibrationSet], folder: Path | None) -> frozenset[str]:
    """All words, in lower case, of calibration sets, neutral texts and prompts, and of the evaluation data if there."""
    texts = [*neutral_texts(), *neutral_prompts(), *REPLY_PROMPTS]
    for axis in sets:
        texts += [text for c in axis.contrasts for text in (c.prompt, c.positive, c.negative)]
    if folder is not None:
        texts += _data_texts(folder)
    return frozenset().union(*(_WORD.findall(text.lower()) for text in texts))


def _data_texts(folder: Path) -> list[str]:
    web, wiki = folder / "capability/c4_demo_300.jsonl", folder / "capability/wikitext2_raw_test.txt"
    texts = [row["text"] for row in read_rows(web, ("text",))] if web.is_file() else []
    return [*texts, wiki.read_text(encoding="utf-8")] if wiki.is_file() else texts
