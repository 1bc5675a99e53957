"""How likely an arm finds given answers to given prompts: what most persona tasks are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.interfaces import Arm, ChatMessage, Engine
from persona_edge.encoding import MAX_RESPONSE_TOKENS, EncodedText
from persona_edge.errors import CalibrationError

__all__ = ["MAX_CONTEXT_TOKENS", "AnswerLevels", "Turn", "answer_levels", "encode_answer"]

MAX_CONTEXT_TOKENS = 1536  # more than calibration's prompts may have: prompt arms put a persona before them

Floats = NDArray[np.float64]
Turn = tuple[str, str]  # a prompt and an answer to it


@dataclass(frozen=True)
class AnswerLevels:
    """Log-probabilities of answers, summed over their tokens, and how many tokens each has; both (n_answers,)."""

    summed: Floats
    n_tokens: NDArray[np.int64]

    @property
    def mean(self) -> Floats:
        """Nats per token, (n_answers,)."""
        return np.asarray(self.summed / self.n_tokens, dtype=np.float64)


def encode_answer(
    engine: Engine, context: Sequence[int], answer: str, *, max_tokens: int = MAX_RESPONSE_TOKENS
) -> EncodedText:
    """`answer` after the tokens of a conversation; every token of the answer counts.

    The conversation loses its beginning beyond MAX_CONTEXT_TOKENS, the answer its end beyond `max_tokens`. Raises
    CalibrationError when the answer has no token.
    """
    tokens = engine.text_tokens(answer)[:max_tokens]
    if not tokens:
        raise CalibrationError(f"the answer {answer!r} has no tokens")
    return EncodedText((*context[-MAX_CONTEXT_TOKENS:], *tokens), len(tokens))


def answer_levels(
    engine: Engine, arm: Arm | None, turns: Sequence[Turn], *, max_tokens: int = MAX_RESPONSE_TOKENS
) -> AnswerLevels:
    """The levels of `turns`, in order, each prompt as `arm` puts it; None puts it plainly (the unmodified model)."""
    contexts: dict[str, list[int]] = {}
    texts = []
    for prompt, answer in turns:
        if prompt not in contexts:
            contexts[prompt] = engine.chat_tokens(conversation(arm, prompt))
        texts.append(encode_answer(engine, contexts[prompt], answer, max_tokens=max_tokens))
    scores = engine.log_probabilities(texts)
    return AnswerLevels(
        np.array([score.sum() for score in scores], dtype=np.float64),
        np.array([text.n_scored for text in texts], dtype=np.int64),
    )


def conversation(arm: Arm | None, prompt: str) -> list[ChatMessage]:
    """What `prompt` becomes under `arm`, or as a plain question."""
    return [ChatMessage(role="user", content=prompt)] if arm is None else arm.messages(prompt)
