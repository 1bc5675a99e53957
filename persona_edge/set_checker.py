"""The rules for calibration sets as code: what a set may not differ in besides its poles.

A mask is found from what *differs* between the two answers of a contrast, so length, opening words, negations and pet
words must not tell the poles apart, and neither may their names. `check_set` measures a set and returns a finding for
each rule that it breaks; personas/README.md gives the rules in words with their reasons. What it cannot see: whether
the contrast is clear, and whether both sides are equally good. Words are counted as runs of letters and digits.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.pole_words import names_of_types, pole_words

__all__ = ["Finding", "Measures", "Rules", "Severity", "check_set", "listed", "measure", "opening_accuracy", "words"]

Severity = Literal["error", "warning"]

_WORD: Final = re.compile(r"\w[\w'’-]*")
_NEGATION: Final = re.compile(r"\b(no|not|never|nothing|nobody|without|cannot|\w+n['’]t)\b", re.IGNORECASE)
_SHOWN: Final = 8


@dataclass(frozen=True)
class Rules:
    """The limits. Shares are of all contrasts; `min_contrasts` counts both sides of the held-out split.

    `equal_lengths` False leaves out what concerns length, for an axis whose poles *are* lengths.
    """

    min_contrasts: int = 40
    min_words: int = 15
    max_words: int = 45
    max_pair_difference: float = 0.25
    max_mean_difference: float = 0.05
    equal_lengths: bool = True
    max_opening_accuracy: float = 0.6
    max_negation_difference: float = 0.1
    max_word_difference: float = 0.3
    max_prompt_similarity: float = 0.75
    max_prompt_words: int = 40


@dataclass(frozen=True)
class Finding:
    """A rule that a set breaks. `contrasts` are the numbers of those concerned, from 1, in the order of the file."""

    rule: str
    severity: Severity
    message: str
    contrasts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Measures:
    """What the rules are about, measured: words are means per answer, `negations` counts answers, accuracy is 0.5 to 1.

    `telling_word` is the word whose number of answers differs most between the sides, `telling_difference` how much, as
    a share of all contrasts (above 0: the positive side has more). None for a set without words.
    """

    n_contrasts: int
    n_held_out: int
    positive_words: float
    negative_words: float
    opening_accuracy: float
    positive_negations: int
    negative_negations: int
    telling_word: str | None
    telling_difference: float


_DEFAULT_RULES: Final = Rules()


def check_set(contrasts: CalibrationSet, rules: Rules = _DEFAULT_RULES) -> tuple[Finding, ...]:
    """What is wrong with a set, errors before warnings; nothing when it keeps all rules.

    Sets of yes/no statements have no answers to compare: only their number and prompts are checked.
    """
    findings = [*_amount(contrasts, rules), *_names(contrasts), *_prompts(contrasts, rules)]
    if not _is_yes_or_no(contrasts):
        findings += [*_repeated_answers(contrasts), *_balance(contrasts, rules)]
        if rules.equal_lengths:
            findings += _lengths(contrasts, rules)
    return tuple(sorted(findings, key=lambda finding: finding.severity == "warning"))


def measure(contrasts: CalibrationSet) -> Measures:
    """The numbers that the rules limit."""
    differences = _word_differences(contrasts.contrasts)
    telling = max(differences, key=lambda word: (abs(differences[word]), word), default=None)
    return Measures(
        n_contrasts=len(contrasts),
        n_held_out=len(contrasts.split()[1]),
        positive_words=fmean(len(words(c.positive)) for c in contrasts.contrasts),
        negative_words=fmean(len(words(c.negative)) for c in contrasts.contrasts),
        opening_accuracy=opening_accuracy(contrasts.contrasts),
        positive_negations=sum(_negates(c.positive) for c in contrasts.contrasts),
        negative_negations=sum(_negates(c.negative) for c in contrasts.contrasts),
        telling_word=telling,
        telling_difference=differences[telling] / len(contrasts) if telling is not None else 0.0,
    )


def words(text: str) -> list[str]:
    """The words of `text` in lower case."""
    return _WORD.findall(text.lower())


def opening_accuracy(contrasts: Sequence[Contrast]) -> float:
    """How often naive Bayes guesses the pole of an answer from its first two words, leaving out its own contrast.

    A tie counts a half, so 0.5 means that openings tell nothing.
    """
    positive = Counter(f for contrast in contrasts for f in _opening(contrast.positive))
    negative = Counter(f for contrast in contrasts for f in _opening(contrast.negative))
    right = 0.0
    for contrast in contrasts:
        own_positive, own_negative = _opening(contrast.positive), _opening(contrast.negative)
        for features, sign in ((own_positive, 1), (own_negative, -1)):
            score = sign * sum(
                math.log((positive[f] - (f in own_positive) + 1) / (negative[f] - (f in own_negative) + 1))
                for f in features
            )
            right += 0.5 if abs(score) < 1e-9 else float(score > 0)
    return right / (2 * len(contrasts))


def _amount(contrasts: CalibrationSet, rules: Rules) -> Iterable[Finding]:
    n_calibrated, n_held_out = (len(part) for part in contrasts.split())
    if len(contrasts) < rules.min_contrasts:
        n_contrasts = _some(len(contrasts), "contrast", "contrasts")
        yield Finding("amount", "error", f"{n_contrasts}; write at least {rules.min_contrasts}")
    # A fifth is held out on average, by a hash of each prompt; half of that does not happen unless prompts recur.
    elif n_held_out < rules.min_contrasts / 10 or n_calibrated < 2 * rules.min_contrasts / 3:
        message = f"{n_calibrated} contrasts to calibrate on and {n_held_out} held out; add some with other prompts"
        yield Finding("amount", "error", message)


def _names(contrasts: CalibrationSet) -> Iterable[Finding]:
    poles = (contrasts.positive_pole, contrasts.negative_pole)
    texts = [f"{c.prompt}\n{c.positive}\n{c.negative}" for c in contrasts.contrasts]
    named = [sorted(set(pole_words(text, poles)) | set(names_of_types(text, poles))) for text in texts]
    if any(named):
        message = f"a pole is called by its name: {listed(_distinct(named))}; show what someone does instead"
        yield Finding("names", "error", message, _numbers(named))
    related = [
        sorted(set(pole_words(text, poles, distant=True)) - set(near)) for text, near in zip(texts, named, strict=True)
    ]
    if any(related):
        message = f"words related to a pole's name: {listed(_distinct(related))}; see whether they name the pole"
        yield Finding("related names", "warning", message, _numbers(related))


def _prompts(contrasts: CalibrationSet, rules: Rules) -> Iterable[Finding]:
    alike = _near_duplicates([frozenset(words(c.prompt)) for c in contrasts.contrasts], rules.max_prompt_similarity)
    if alike:
        pairs = listed([f"{first} and {second}" for first, second in alike])
        message = f"{_some(len(alike), 'prompt is', 'prompts are')} nearly the same as an earlier one: {pairs}"
        yield Finding("similar prompts", "error", message, tuple(second for _, second in alike))
    lengthy = [len(words(c.prompt)) > rules.max_prompt_words for c in contrasts.contrasts]
    if any(lengthy):
        message = f"{_some(sum(lengthy), 'prompt', 'prompts')} of more than {rules.max_prompt_words} words"
        yield Finding("long prompts", "warning", message, _numbers(lengthy))


def _repeated_answers(contrasts: CalibrationSet) -> Iterable[Finding]:
    n_times = Counter(text for c in contrasts.contrasts for text in {_plain(c.positive), _plain(c.negative)})
    repeated = [max(n_times[_plain(c.positive)], n_times[_plain(c.negative)]) > 1 for c in contrasts.contrasts]
    same = [_plain(c.positive) == _plain(c.negative) for c in contrasts.contrasts]
    concerned = [a or b for a, b in zip(repeated, same, strict=True)]
    if any(concerned):
        n_texts = sum(n > 1 for n in n_times.values()) + sum(same)
        message = f"{_some(n_texts, 'answer occurs', 'answers occur')} more than once; write each anew"
        yield Finding("repeated answers", "error", message, _numbers(concerned))


def _lengths(contrasts: CalibrationSet, rules: Rules) -> Iterable[Finding]:
    pairs = [(len(words(c.positive)), len(words(c.negative))) for c in contrasts.contrasts]
    outside = [not all(rules.min_words <= n <= rules.max_words for n in pair) for pair in pairs]
    if any(outside):
        counts = [n for pair in pairs for n in pair]
        message = (
            f"{_some(sum(outside), 'contrast has', 'contrasts have')} an answer outside {rules.min_words} to "
            f"{rules.max_words} words; the shortest answer has {min(counts)}, the longest {max(counts)}"
        )
        yield Finding("lengths", "error", message, _numbers(outside))
    unequal = [min(pair) < (1 - rules.max_pair_difference) * max(pair) for pair in pairs]
    if any(unequal):
        n_unequal = _some(sum(unequal), "contrast has", "contrasts have")
        message = f"{n_unequal} answers more than {rules.max_pair_difference:.0%} apart in words"
        yield Finding("unequal pairs", "error", message, _numbers(unequal))
    positive, negative = (fmean(side) for side in zip(*pairs, strict=True))
    if abs(positive - negative) > rules.max_mean_difference * max(positive, negative):
        message = (
            f"{contrasts.positive_pole} has {positive:.1f} words per answer, {contrasts.negative_pole} "
            f"{negative:.1f}; the means may differ by {rules.max_mean_difference:.0%}"
        )
        yield Finding("mean lengths", "error", message)


def _balance(contrasts: CalibrationSet, rules: Rules) -> Iterable[Finding]:
    found = measure(contrasts)
    if found.opening_accuracy > rules.max_opening_accuracy:
        message = (
            f"the first two words tell the pole in {found.opening_accuracy:.0%} of answers, at most "
            f"{rules.max_opening_accuracy:.0%} may; let both answers open alike"
        )
        yield Finding("openings", "error", message, _numbers(_opens_differently(c) for c in contrasts.contrasts))
    difference = found.positive_negations - found.negative_negations
    if abs(difference) > rules.max_negation_difference * len(contrasts):
        message = (
            f"{found.positive_negations} answers of {contrasts.positive_pole} and {found.negative_negations} of "
            f"{contrasts.negative_pole} negate (no, not, never …); {_share(rules.max_negation_difference, contrasts)}"
        )
        more = (c.positive if difference > 0 else c.negative for c in contrasts.contrasts)
        yield Finding("negations", "error", message, _numbers(_negates(text) for text in more))
    yield from _telling_words(contrasts, rules)


def _telling_words(contrasts: CalibrationSet, rules: Rules) -> Iterable[Finding]:
    by_difference = sorted(_word_differences(contrasts.contrasts).items(), key=lambda item: (-abs(item[1]), item[0]))
    # One or two answers say nothing about a word, however small the set.
    limit = max(rules.max_word_difference * len(contrasts), 2)
    telling = [(word, n) for word, n in by_difference if abs(n) > limit]
    if telling:
        positive, negative = ({word for word, n in telling if n * sign > 0} for sign in (1, -1))
        poles = {word: contrasts.positive_pole if word in positive else contrasts.negative_pole for word, _ in telling}
        each = listed([f"{word!r} in {abs(n)} more answers of {poles[word]}" for word, n in telling])
        message = f"{each}; {_share(rules.max_word_difference, contrasts)}"
        pairs = ((words(c.positive), words(c.negative)) for c in contrasts.contrasts)
        has_some = (not (positive.isdisjoint(p) and negative.isdisjoint(n)) for p, n in pairs)
        yield Finding("telling words", "error", message, _numbers(has_some))


def _near_duplicates(bags: Sequence[frozenset[str]], limit: float) -> list[tuple[int, int]]:
    """(earlier, later) numbers, from 1, of prompts whose word sets have a Jaccard index above `limit`; one per later.

    Two such sets share a word among the rarest few of each, so only prompts that do are compared.
    """
    frequency = Counter(word for bag in bags for word in bag)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    found = []
    for later, bag in enumerate(bags):
        rarest_first = sorted(bag, key=lambda word: (frequency[word], word))
        rare = rarest_first[: len(bag) - math.ceil(limit * len(bag)) + 1]
        candidates = sorted({earlier for word in rare for earlier in holders[word]})
        match = next((at for at in candidates if len(bags[at] & bag) > limit * len(bags[at] | bag)), None)
        if match is not None:
            found.append((match + 1, later + 1))
        else:  # what resembles an earlier prompt is compared with that one, not listed again
            for word in rare:
                holders[word].append(later)
    return found


def _word_differences(contrasts: Sequence[Contrast]) -> dict[str, int]:
    """In how many more positive than negative answers each word stands."""
    difference = Counter(word for contrast in contrasts for word in set(words(contrast.positive)))
    difference.subtract(word for contrast in contrasts for word in set(words(contrast.negative)))
    return dict(difference)


def _opening(answer: str) -> set[str]:
    first, second = [*words(answer)[:2], "", ""][:2]
    return {f"{first} {second}", f"1 {first}", f"2 {second}"}


def _opens_differently(contrast: Contrast) -> bool:
    return _opening(contrast.positive) != _opening(contrast.negative)


def _negates(text: str) -> bool:
    return bool(_NEGATION.search(text))


def _is_yes_or_no(contrasts: CalibrationSet) -> bool:
    return all({c.positive, c.negative} == {"Yes", "No"} for c in contrasts.contrasts)


def _plain(text: str) -> str:
    return " ".join(words(text)) or text


def _numbers(flags: Iterable[object]) -> tuple[int, ...]:
    return tuple(number for number, flag in enumerate(flags, start=1) if flag)


def _distinct(lists: Iterable[Sequence[str]]) -> list[str]:
    return [text for text, _ in Counter(text for texts in lists for text in texts).most_common()]


def listed(texts: Sequence[str], most: int = _SHOWN) -> str:
    """The first `most` of `texts`, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _some(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _share(share: float, contrasts: CalibrationSet) -> str:
    return f"the sides may differ by {share:.0%} of {len(contrasts)}"
