"""Words that call a pole by its name: the name itself, what is derived from it, and the vocabulary of the MBTI types.

Names have no dictionary here, so derivation is by form: `warm` has warmer, warmly, warmth; `optimistic` has optimism
and optimist. *Distant* relatives share a stem but may be ordinary words (`decisive` and decision), so they are only
worth a look. Names of one or two letters stand for themselves (the `I` of MBTI is a pronoun) and are not searched for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Final

__all__ = ["names_of_types", "pole_words"]

_WORD: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_TYPE_NAME: Final = re.compile(
    r"\b(introver\w*|extr[ao]ver\w*|outgoing|introspect\w*|sociable|gregarious|intuit\w*|sensing|sensor"
    r"|thinkers?|feelers?|(?:thinking|feeling) type|judg(?:ing|er)|perceiv\w*|prospecting|mbti|myers|personality"
    r"|[ei][sn][tf][jp])\b",
    re.IGNORECASE,
)
_TYPE_POLES: Final = frozenset("EISNTFJP")
_NOT_NAMES: Final = frozenset({"anti", "non", "not", "very", "more", "less", "the", "and", "seeking", "style", "like"})

_GROWN: Final = (
    *("s", "es", "ed", "er", "ers", "est", "ing", "ings", "ish", "ly", "ness", "th", "y", "ity", "ities", "ism"),
    *("ist", "ists", "istic", "ally", "ful", "fully", "less", "ier", "iest", "ily", "iness", "'s", "’s"),
)
_ISTIC: Final = ("m", "t", "ts", "tic", "tically")
_ENDINGS: Final = (
    *("e", "y", "ic", "ical", "ive", "ively", "iveness", "ious", "iously", "ous", "ously", "ion", "ions", "ence"),
    *("ance", "ent", "ant", "al", "ful", "ity", "ate", "ation", "ing", "ed", "ish", "less"),
)
_SHORTEST_STEM: Final = 4


def pole_words(text: str, poles: Sequence[str], *, distant: bool = False) -> list[str]:
    """The words of `text`, in lower case, that name one of `poles`; with `distant`, those that share its stem too."""
    names = [name for pole in poles for name in _names(pole)]
    found = (word.lower() for word in _WORD.findall(text))
    return [word for word in found if any(_is_named_after(word, name, distant) for name in names)]


def names_of_types(text: str, poles: Sequence[str]) -> list[str]:
    """The words of `text` that name an MBTI type, where `poles` are two of the eight letters."""
    if not _TYPE_POLES.issuperset(poles):
        return []
    return [match.group().lower() for match in _TYPE_NAME.finditer(text)]


@cache
def _names(pole: str) -> tuple[str, ...]:
    found = (word.lower() for word in _WORD.findall(pole))
    return tuple(name for name in found if len(name) > 2 and name not in _NOT_NAMES)


@cache
def _is_named_after(word: str, name: str, distant: bool) -> bool:
    if word == name:
        return True
    if len(name) < _SHORTEST_STEM:
        return word in {f"{name}s", f"{name}'s", f"{name}ly", f"{name}ness", f"{name}er"}
    stems = {name, name[:-1]} if name[-1] in "ey" else {name}  # concise, concision; moody, moodiness
    if any(word == stem + ending for stem in stems for ending in _GROWN):
        return True
    if name.endswith("istic") and word in {name[:-3] + ending for ending in _ISTIC}:
        return True
    return distant and bool(_stems(word) & _stems(name))


@cache
def _stems(word: str) -> frozenset[str]:
    shortened = {word.removesuffix(ending) for ending in _ENDINGS} | {word}
    return frozenset(stem for stem in shortened if len(stem) >= _SHORTEST_STEM)
