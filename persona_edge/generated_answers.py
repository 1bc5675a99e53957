"""What becomes of a small model's raw answers: whole sentences of a sensible length, or the reason to drop them.

An answer is usable when it can end after one of its sentences with 15 to 45 words. A pair is usable when both answers
have such an ending at about the same length and say different things. Among possible endings those are taken that keep
the two sides' total lengths together, since length goes into a mask like everything else that differs.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

from persona_edge.pole_words import pole_words
from persona_edge.set_checker import words

__all__ = ["MAX_WORDS", "MIN_WORDS", "DropReason", "Pair", "choose_pair", "opening_of", "sentences", "why_unusable"]

MIN_WORDS: Final = 15
MAX_WORDS: Final = 45
OPENING_WORDS: Final = 2
MAX_PAIR_DIFFERENCE: Final = 0.25
MAX_OVERLAP: Final = 0.7

DropReason = Literal[
    "no sentence of that length",
    "a refusal",
    "another script",
    "a placeholder or markup",
    "repeats itself",
    "names the pole",
    "lengths too different",
    "both answers alike",
    "occurred before",
]

_LIST_ITEM: Final = re.compile(r"(?:^|\n|:)\s*(?:\d{1,2}[.)]|[-*•–])\s")
_SENTENCE_END: Final = re.compile(r"[.!?…。！？]+[\"”’')\]]*(?=\s|$)|[。！？]+")
_ABBREVIATION: Final = re.compile(r"(?<![\w'’])(?:mr|mrs|ms|dr|st|vs|etc|e\.g|i\.e|\w|\d\d)\.$", re.IGNORECASE)
_REFUSAL: Final = re.compile(
    r"\b(?:as an? (?:ai|artificial|digital|virtual|(?:large )?language)\b"
    r"|(?:i am|i'm) (?:just |only )?an? (?:ai\b|artificial|computer|machine|digital|chatbot|(?:large )?language model)"
    r"|i (?:can't|cannot|can not|am unable to|am not able to|won't) (?:help|assist|fulfil|provide|comply|answer)"
    r"|i (?:do not|don't) have (?:personal|feelings|emotions|opinions|access|a body)"
    r"|(?:ai|virtual) assistant\b)",
    re.IGNORECASE,
)
_MARKUP: Final = re.compile(r"[\[\]<>{}|\\]|```|https?:|\b(?:user|assistant|system|subject):", re.IGNORECASE)
_SHARED_SCRIPTS: Final = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "FULLWIDTH": "LATIN"}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as they go into a set."""

    positive: str
    negative: str


def sentences(raw: str) -> str:
    """A raw answer as one line of running text: what comes before a list, without emphasis marks."""
    start = raw.strip()
    listed = _LIST_ITEM.search(start)
    if listed is not None:
        start = start[: listed.start()]
    return " ".join(re.sub(r"[*_#`]+", "", start).split())


def opening_of(raw: str) -> str:
    """The first words of an answer, for the other answer to open alike; "" when it has too few."""
    found = re.match(rf"(?:\S+\s+){{{OPENING_WORDS}}}", sentences(raw) + " ")
    return found.group().strip() if found is not None else ""


def why_unusable(raw: str, prompt: str, poles: Sequence[str]) -> DropReason | None:
    """The reason to drop an answer whatever the other one says, None when there is none."""
    text = sentences(raw)
    if _REFUSAL.search(text.replace("’", "'")):
        return "a refusal"
    if _MARKUP.search(text):
        return "a placeholder or markup"
    if not _scripts(text) <= _scripts(prompt):
        return "another script"
    if _repeats_itself(text):
        return "repeats itself"
    if pole_words(text, poles):
        return "names the pole"
    return None if _endings(text) else "no sentence of that length"


def choose_pair(positive: str, negative: str, surplus: int, before: Collection[str]) -> Pair | DropReason:
    """Both answers cut at the ends of sentences, or why they make no contrast.

    `surplus` is how many more words the positive answers have so far; `before` are the answers that a set has already.
    """
    cuts = [
        (abs(surplus + len(words(p)) - len(words(n))), -len(words(p)) - len(words(n)), p, n)
        for p, n in product(_endings(sentences(positive)), _endings(sentences(negative)))
        if _similar_lengths(len(words(p)), len(words(n)))
    ]
    if not cuts:
        return "lengths too different"
    *_, chosen_positive, chosen_negative = min(cuts)
    if _overlap(chosen_positive, chosen_negative) > MAX_OVERLAP:
        return "both answers alike"
    if chosen_positive in before or chosen_negative in before:
        return "occurred before"
    return Pair(chosen_positive, chosen_negative)


def _endings(text: str) -> list[str]:
    """The beginnings of `text` that end with a sentence and have 15 to 45 words."""
    ends = (text[: match.end()] for match in _SENTENCE_END.finditer(text))
    return [end for end in ends if MIN_WORDS <= len(words(end)) <= MAX_WORDS and not _ABBREVIATION.search(end)]


def _similar_lengths(first: int, second: int) -> bool:
    return min(first, second) >= (1 - MAX_PAIR_DIFFERENCE) * max(first, second)


def _overlap(first: str, second: str) -> float:
    a, b = set(words(first)), set(words(second))
    return len(a & b) / len(a | b)


def _repeats_itself(text: str) -> bool:
    """Whether three words in a row occur three times, or nearly all words are the same few."""
    found = words(text)
    triples = Counter(zip(found, found[1:], found[2:], strict=False))
    return max(triples.values(), default=0) >= 3 or len(set(found)) < 0.4 * len(found)


def _scripts(text: str) -> set[str]:
    """The writing systems of the letters of `text`, by the first word of their Unicode names."""
    names = {unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha()}
    return {_SHARED_SCRIPTS.get(name, name) for name in names}
