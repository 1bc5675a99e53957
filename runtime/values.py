"""What users of the runtime pass in and get back: small frozen values, no behaviour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from persona_edge.errors import InputError

__all__ = ["Completion", "FinishReason", "KvPolicy", "Message", "SamplingOptions", "SwitchReport"]

KvPolicy = Literal["reprefill", "snapshot", "keep"]
"""What becomes of the KV cache when the weights change (`kv_cache`)."""

FinishReason = Literal["stop", "length", "context"]
"""Why a text ended: the model or a stop string ended it, `max_tokens` was reached, or the context is full."""


class Message(TypedDict):
    """One turn of a conversation; `role` is usually "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and when to stop.

    Temperature 0 is greedy: always the likeliest token. `seed` None means the session's seed, moved on by one with each
    generation. `repeat_penalty` looks back 64 tokens, 1 is none. `stop` strings end the text and are not part of it.
    Raises InputError for values that make no sense.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1")
        _check("repeat_penalty", self.repeat_penalty, 0 < self.repeat_penalty < math.inf, "above 0; 1 is off")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**32, "between 0 and 4294967295")
        good_stop = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        _check("stop", self.stop, good_stop, "a tuple of non-empty strings")


def _check(name: str, value: object, is_valid: bool, wanted: str) -> None:
    if not is_valid:
        raise InputError(f"{name} is {value!r}; it must be {wanted}")


@dataclass(frozen=True)
class Completion:
    """A generated text. `n_tokens` counts generated tokens without the one that ends the text; times in seconds.

    `seconds_to_first_token` runs from the call to the first token: evaluating what of the prompt was not yet evaluated.
    """

    text: str
    n_prompt_tokens: int
    n_tokens: int
    seconds_to_first_token: float
    seconds: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class SwitchReport:
    """What a switch did. `persona` None is the unmodified model; `seconds` is the time to edit the weights.

    `kv` says what became of the KV cache, `kv_seconds` how long that took (putting a snapshot aside).
    `seconds_to_first_token` is what the user waits in all: these two plus what is evaluated, or recalled, of the prompt
    up to the first token. It is None until the next generation has got there; `PersonaSession.last_switch` then has it.
    """

    persona: str | None
    strength: float
    n_units_written: int
    n_bytes_written: int
    seconds: float
    seconds_to_first_token: float | None = None
    kv: KvPolicy = "reprefill"
    kv_seconds: float = 0.0
