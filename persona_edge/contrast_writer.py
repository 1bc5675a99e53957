"""Writing a calibration set with a model: ordinary prompts, each answered in the manner of either pole.

A *manner* is a pole's name and the description by which a system message asks for it. For each prompt one pole answers
freely, and the other has to open with the same two words, in turn, so that openings tell nothing. Pairs that make no
contrast are dropped (persona_edge.generated_answers). Other prompts take their place, then other answers to the same.

Every attempt is noted in a journal beside the output at once. The same call goes on from there after an interruption,
and ends with the same set as one that was never interrupted. The set is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from persona_edge.answer_journal import Attempt, AttemptKey, Journal
from persona_edge.character_card import CharacterCard
from persona_edge.contrasts import CalibrationSet, Contrast, load_texts, parse_texts
from persona_edge.errors import GenerationError, InputError
from persona_edge.generated_answers import Pair, choose_pair, opening_of, why_unusable
from persona_edge.set_checker import words
from persona_edge.set_file import checked_name, write_set

__all__ = [
    "Manner",
    "Speaker",
    "WritingRequest",
    "WrittenSet",
    "generation_prompts",
    "journal_path",
    "manner_of_card",
    "manner_of_description",
    "neutral_manner",
    "write_contrasts",
]

MAX_DESCRIPTION_CHARACTERS: Final = 3_000
N_ROUNDS: Final = 3
_PLAINLY: Final = "Answer in two or three plain sentences, without lists."
_MAX_SAYINGS_CHARACTERS: Final = 600

Progress = Callable[[str, int, int], None]


class Speaker(Protocol):
    """Whoever answers. The same arguments should give the same answer; `opening` is part of it."""

    name: str

    def answer(self, system: str, prompt: str, opening: str, seed: int) -> str:
        """An answer to `prompt` under the system message, that begins with `opening` ("": however it likes)."""
        ...


@dataclass(frozen=True)
class Manner:
    """A pole: its name, and a description of it that is said to the model ("You are a gruff man of few words.")."""

    pole: str
    description: str

    @property
    def system(self) -> str:
        """The system message under which a model answers in this manner."""
        return f"{self.description} {_PLAINLY}"


@dataclass(frozen=True)
class WritingRequest:
    """What to write: `n_contrasts` contrasts between two manners, on prompts drawn by `seed`."""

    axis: str
    positive: Manner
    negative: Manner
    prompts: tuple[str, ...]
    n_contrasts: int
    seed: int = 0

    def check(self) -> None:
        """Raises InputError when the poles have one name, or when there are fewer prompts than contrasts."""
        if self.positive.pole.casefold() == self.negative.pole.casefold():
            raise InputError(f"both poles are called {self.positive.pole!r}; give them two names")
        if not 1 <= self.n_contrasts <= len(self.prompts):
            raise InputError(
                f"{self.n_contrasts} contrasts asked for, and {len(self.prompts)} prompts to write them on; ask for 1 "
                "to that many, or give a file with more prompts"
            )


@dataclass(frozen=True)
class WrittenSet:
    """The set, how many pairs were tried for it, and how many were dropped for which reason."""

    contrasts: CalibrationSet
    n_attempts: int
    dropped: Mapping[str, int]


def generation_prompts(path: Path | None = None) -> tuple[str, ...]:
    """The ordinary prompts that ship, or those of a JSONL file of {"prompt"}. Raises CalibrationError."""
    if path is not None:
        return tuple(dict.fromkeys(load_texts(path, "prompt")))
    from importlib import resources

    data = resources.files("persona_edge.personas").joinpath("generation_prompts.jsonl").read_bytes()
    return parse_texts(data, "prompt", source="generation_prompts.jsonl")


def manner_of_description(pole: str, description: str) -> Manner:
    """The manner of a person described in a few words or sentences ("a gruff man of few words"). Raises InputError."""
    name = checked_name(pole, "the pole")
    text = " ".join(description.split())
    if not text:
        raise InputError(f"the description of {name} is empty; say in a sentence what such a person does")
    if len(text) > MAX_DESCRIPTION_CHARACTERS:
        raise InputError(
            f"the description of {name} has {len(text)} characters; shorten it to {MAX_DESCRIPTION_CHARACTERS}"
        )
    if not text.casefold().startswith(("you ", "you'", "your ")):
        text = f"You are {text}"
    return Manner(name, _sentence(text))


def manner_of_card(card: CharacterCard) -> Manner:
    """The manner of a character: description, personality, and a few of its sayings. Long texts are cut at a word."""
    parts = [f"You are {card.name}.", _cut(card.description, MAX_DESCRIPTION_CHARACTERS // 2)]
    if card.personality:
        parts.append(f"Personality: {_sentence(_cut(card.personality, MAX_DESCRIPTION_CHARACTERS // 4))}")
    sayings = [" ".join(saying.split()) for saying in card.sayings]
    if sayings:
        parts.append(f"This is how {card.name} talks: {_cut(' '.join(sayings), _MAX_SAYINGS_CHARACTERS)}")
    text = " ".join(" ".join(part.split()) for part in parts if part)
    return Manner(checked_name(card.name, "the character"), _sentence(_cut(text, MAX_DESCRIPTION_CHARACTERS)))


def neutral_manner(pole: str = "neutral") -> Manner:
    """The manner of an ordinary assistant."""
    return Manner(checked_name(pole, "the pole"), "You are a helpful assistant.")


def journal_path(output: Path) -> Path:
    """Where the attempts for the set `output` are kept until it is written."""
    return output.with_name(f"{output.name}.journal")


def write_contrasts(
    request: WritingRequest,
    speaker: Speaker,
    output: Path,
    progress: Progress = lambda stage, done, total: None,
) -> WrittenSet:
    """Write the set that `request` asks for to `output`, going on from its journal if there is one.

    When the prompts do not yield enough usable pairs, the set is smaller. Raises InputError when there are fewer
    prompts than contrasts or the journal belongs to another request, GenerationError when no pair at all is usable,
    OutputError.
    """
    request.check()
    journal = Journal.open(journal_path(output), _fingerprint(request, speaker))
    attempts: list[Attempt] = []
    pairs: dict[str, Pair] = {}
    for key in _plan(request, pairs):
        if len(pairs) == request.n_contrasts:
            break
        progress("writing contrasts", len(pairs), request.n_contrasts)
        attempt = journal.get(key)
        if attempt is None:
            attempt = _attempt(request, speaker, key, pairs)
            journal.add(attempt)
        attempts.append(attempt)
        if attempt.pair is not None:
            pairs[key.prompt] = attempt.pair
    progress("writing contrasts", len(pairs), request.n_contrasts)
    written = _collected(request, attempts, output)
    write_set(output, written.contrasts)
    journal.remove()
    return written


def _plan(request: WritingRequest, pairs: Mapping[str, Pair]) -> Iterator[AttemptKey]:
    """What to try in turn: every prompt, then those without a pair again. `pairs` grows while this is iterated over."""
    order = random.Random(request.seed).sample(request.prompts, len(request.prompts))
    for number in range(N_ROUNDS):
        for prompt in order:
            if prompt not in pairs:
                yield AttemptKey(prompt, number)


def _attempt(request: WritingRequest, speaker: Speaker, key: AttemptKey, pairs: Mapping[str, Pair]) -> Attempt:
    poles = (request.positive.pole, request.negative.pole)
    seed = int.from_bytes(hashlib.sha256(f"{request.seed}\n{key.number}\n{key.prompt}".encode()).digest()[:4], "big")
    positive_leads = seed % 2 == 0
    leader, follower = (request.positive, request.negative)[:: 1 if positive_leads else -1]
    led = speaker.answer(leader.system, key.prompt, "", seed)
    reason = why_unusable(led, key.prompt, poles)
    if reason is not None:
        return Attempt(key, dropped=reason)
    followed = speaker.answer(follower.system, key.prompt, opening_of(led), seed)
    reason = why_unusable(followed, key.prompt, poles)
    if reason is not None:
        return Attempt(key, dropped=reason)
    positive, negative = (led, followed) if positive_leads else (followed, led)
    found = choose_pair(positive, negative, _surplus(pairs), {text for p in pairs.values() for text in _texts(p)})
    return Attempt(key, pair=found) if isinstance(found, Pair) else Attempt(key, dropped=found)


def _collected(request: WritingRequest, attempts: Sequence[Attempt], output: Path) -> WrittenSet:
    dropped = Counter(attempt.dropped for attempt in attempts if attempt.dropped is not None)
    contrasts = tuple(Contrast(a.key.prompt, a.pair.positive, a.pair.negative) for a in attempts if a.pair is not None)
    if not contrasts:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in dropped.most_common())
        raise GenerationError(f"none of {len(attempts)} pairs of answers is usable: {reasons}; try a larger model")
    found = CalibrationSet(
        output.stem,
        request.axis,
        request.positive.pole,
        request.negative.pole,
        contrasts,
        request.positive.description,
        request.negative.description,
    )
    return WrittenSet(found, len(attempts), dict(dropped.most_common()))


def _fingerprint(request: WritingRequest, speaker: Speaker) -> str:
    """The same for requests that would write the same set, but for its size: attempts do not depend on that."""
    content: dict[str, Any] = {"speaker": speaker.name, **asdict(replace(request, n_contrasts=0))}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _surplus(pairs: Mapping[str, Pair]) -> int:
    return sum(len(words(pair.positive)) - len(words(pair.negative)) for pair in pairs.values())


def _texts(pair: Pair) -> tuple[str, str]:
    return pair.positive, pair.negative


def _cut(text: str, longest: int) -> str:
    """`text`, or its beginning up to a space."""
    return text if len(text) <= longest else text[:longest].rpartition(" ")[0] or text[:longest]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…", '"', "”")) else f"{text}."
