"""What the runtime asks of the engine that evaluates a model. llama.cpp's backend and ONNX Runtime's both fit.

They inherit nothing from here: the type checker compares them with these protocols where they are handed to a session.
A backend evaluates one sequence with the weights as they are at the moment; it is not locked and knows of no personas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from persona_edge.runtime.values import SamplingOptions

__all__ = ["Backend", "Cache", "CacheState", "Vocabulary"]


@dataclass(frozen=True, eq=False)
class CacheState:
    """A copy of a cache: its `tokens`, where evaluated batches ended, and the backend's bytes."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    data: NDArray[np.uint8]


class Cache(Protocol):
    """The KV cache of one sequence."""

    recall: Callable[[Sequence[int]], None] | None
    """Called with a new prompt before it is evaluated; may load an earlier state that fits it."""

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the cache holds."""

    def clear(self) -> None:
        """Forget every token: the weights changed, so their keys and values no longer hold."""

    def save_state(self) -> CacheState | None:
        """A copy of the cache; None when there is nothing to copy, or no way to."""

    def load_state(self, state: CacheState) -> None:
        """Replace the cache by `state`, which the present weights must have computed."""


class Vocabulary(Protocol):
    """Text to tokens and back. Names of special tokens are "" where the model has none."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def bos_text(self) -> str: ...

    @property
    def eos_text(self) -> str: ...

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`. `add_special` adds what the model wants at the start or end (BOS); `parse_special` reads
        names of control tokens in the text as those tokens."""

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens by their names. Raises InputError for ids that are no tokens."""

    def piece(self, token: int) -> bytes:
        """The bytes `token` adds to a text, maybe part of a character; none for a control token."""

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation (end of turn, end of text)."""


class Backend(Cache, Protocol):
    """Evaluates tokens and keeps their keys and values. After `close` it raises GenerationError."""

    @property
    def n_ctx(self) -> int:
        """How many tokens the cache has room for."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def evaluate(self, tokens: Sequence[int], ticket: int | None = None) -> int:
        """Bring the cache to exactly `tokens`, 1 to `n_ctx`; the next token can then be sampled.

        Returns a ticket. When it is given back with the same tokens and one more, and nothing happened in between, only
        that one is evaluated. Raises GenerationError when the engine fails.
        """

    def sampler(
        self, options: SamplingOptions, prompt: Sequence[int] = ()
    ) -> AbstractContextManager[Callable[[], int]]:
        """What one generation chooses its tokens by: each call gives the next token after those evaluated last.

        `prompt` is what `repeat_penalty` counts as already said; `options.seed` None counts as 0. The call raises
        GenerationError when the model computes no numbers (NaN).
        """

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position, (n_tokens, n_vocab) float32. The cache is empty before and after.

        Raises InputError for no tokens, unknown ones, or more than `n_ctx`; GenerationError when the engine fails.
        """

    def scored_logits(self, tokens: Sequence[int], n_scored: int) -> Iterator[NDArray[np.float32]]:
        """Logits that predict the last `n_scored` of `tokens`, in pieces of (some, n_vocab) float32.

        The beginning stays in the cache for other endings; the order of questions changes no bit of the answers.
        Raises InputError unless 1 <= n_scored < len(tokens), and as `logits` does.
        """

    def close(self) -> None:
        """Free the cache, not the model."""
