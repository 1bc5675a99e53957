"""An engine whose every number can be computed by hand: tokens are characters, and rules say which are likely.

The logit of a character is the sum of the boosts of all rules whose `after` stands somewhere before it. So the
log-probability of a text follows from a softmax over the ALPHABET. Arms add rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.interfaces import Arm, ChatMessage, Engine, EngineName, Task, TaskResult, user_message
from persona_edge.encoding import EncodedText

ALPHABET = "".join(chr(i) for i in range(32, 127)) + "\n"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """Once `after` has been said, `characters` have `boost` more nats of logit."""

    characters: str
    boost: float
    after: str = ""


class RuleEngine:
    """Implements `Engine` with `rules`; characters outside the alphabet become spaces."""

    name: ClassVar[EngineName] = "pytorch"

    def __init__(self, *rules: Rule, start: str = "") -> None:
        self.rules = list(rules)
        self.start = start

    def chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.text_tokens("".join(f"{m['role'][0].upper()}: {m['content']}\n" for m in messages) + "A: ")

    def text_tokens(self, text: str) -> list[int]:
        return [max(ALPHABET.find(character), 0) for character in text]

    def start_tokens(self) -> list[int]:
        return self.text_tokens(self.start)

    def log_probabilities(self, texts: Sequence[EncodedText]) -> list[Floats]:
        found = []
        for text, log_p in zip(texts, self.distributions(texts), strict=True):
            targets = list(text.tokens[len(text.tokens) - text.n_scored :])
            found.append(log_p.astype(np.float64)[np.arange(len(targets)), targets])
        return found

    def distributions(self, texts: Sequence[EncodedText]) -> Iterator[NDArray[np.float32]]:
        for text in texts:
            said = "".join(ALPHABET[token] for token in text.tokens)
            yield self._log_p(said, np.arange(len(said) - text.n_scored, len(said))).astype(np.float32)

    def _log_p(self, said: str, ends: NDArray[np.int64]) -> Floats:
        """Log-probabilities of the character after each of the first `ends` characters of `said`, (n_ends, n_vocab)."""
        logits = np.zeros((len(ends), len(ALPHABET)))
        for rule in self.rules:
            found = said.find(rule.after)
            if found >= 0:
                columns = np.array([ALPHABET.index(c) for c in rule.characters], dtype=np.int64)
                logits[np.ix_(ends >= found + len(rule.after), columns)] += rule.boost
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))

    def generate(self, conversations: Sequence[Sequence[ChatMessage]], *, max_tokens: int) -> list[str]:
        answers = []
        for messages in conversations:
            said = "".join(ALPHABET[token] for token in self.chat_tokens(messages))
            n = len(said)
            for _ in range(max_tokens):
                said += ALPHABET[int(self._log_p(said, np.array([len(said)])).argmax())]
            answers.append(said[n:])
        return answers


def base() -> Arm:
    """The unmodified model."""
    return Arm("base", None, 0, user_message, lambda engine: nullcontext())


def ruled(*rules: Rule, pole: str = "E", toward: int = 1) -> Arm:
    """An arm that changes the model by `rules`."""

    @contextmanager
    def active(engine: Engine) -> Iterator[None]:
        assert isinstance(engine, RuleEngine)
        engine.rules += rules
        try:
            yield
        finally:
            del engine.rules[-len(rules) :]

    return Arm("ruled", pole, toward, user_message, active)


def prompted(words: str, *, pole: str = "E", toward: int = 1) -> Arm:
    """An arm that acts through a system message."""

    def messages(prompt: str) -> list[ChatMessage]:
        return [ChatMessage(role="system", content=words), *user_message(prompt)]

    active: Callable[[Engine], AbstractContextManager[None]] = lambda engine: nullcontext()  # noqa: E731
    return Arm("prompted", pole, toward, messages, active)


def measure(task: Task, engine: Engine, arm: Arm) -> TaskResult:
    """What `task` finds on `engine` while `arm` acts."""
    task.prepare(engine)
    with arm.active(engine):
        return task.measure(engine, arm)


def means(result: TaskResult) -> dict[str, float]:
    """The mean of each measure, over the items that have one."""
    return {items.measure: float(np.nanmean(items.values)) for items in result.measures}
