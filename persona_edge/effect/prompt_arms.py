"""Prompts as arms: a system prompt, and examples retrieved for each question. The model's weights stay as they are.

These arms have no knob: their drift on chat is measured and reported as it is. Text that is not a chat never sees them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from persona_edge.calibration import divided
from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.arm_context import ArmContext, calibration_part, pole_name, require_packages
from persona_edge.effect.interfaces import Arm, ChatMessage, Engine, user_message
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.encoding import MAX_RESPONSE_TOKENS, EncodedText, message_tokens

__all__ = ["N_RETRIEVED", "Retriever", "base_arm", "describe_pole", "retrieval_arm", "system_prompt_arm"]

N_RETRIEVED = 4
N_EXAMPLES_IN_DESCRIPTION = 3

Messages = Callable[[str], list[ChatMessage]]


def base_arm() -> Arm:
    """The unmodified model, asked plainly."""
    return Arm("base", None, 0, user_message, _unchanged)


def system_prompt_arm(context: ArmContext, axis_set: CalibrationSet, toward: int) -> Arm:
    """The pole's description as the system message; before the question where a template knows no system role."""
    started = time.perf_counter()
    name = pole_name(axis_set, toward)
    description = describe_pole(axis_set, toward)
    has_role = _accepts_system(context.model.tokenizer)

    def messages(prompt: str) -> list[ChatMessage]:
        if has_role:
            return [ChatMessage(role="system", content=description), *user_message(prompt)]
        return user_message(f"{description}\n\n{prompt}")

    facts = _facts(context, axis_set, messages, len(description.encode()))
    facts |= {"description": description, "seconds_to_make": time.perf_counter() - started}
    return Arm("system-prompt", name, toward, messages, _unchanged, facts)


def describe_pole(axis_set: CalibrationSet, toward: int) -> str:
    """What the set says of the pole; where it says nothing, three of the pole's calibration answers to imitate."""
    written = axis_set.positive_description if toward > 0 else axis_set.negative_description
    if written:
        return written
    contrasts = calibration_part(axis_set).limit(N_EXAMPLES_IN_DESCRIPTION).contrasts
    answers = [contrast.positive if toward > 0 else contrast.negative for contrast in contrasts]
    listed = "\n".join(f"- {answer}" for answer in answers)
    return f"Answer every message in the manner of these answers:\n{listed}"


def retrieval_arm(context: ArmContext, axis_set: CalibrationSet, toward: int) -> Arm:
    """The pole's answers to the most similar calibration prompts, as earlier turns, the most similar one last."""
    started = time.perf_counter()
    part = calibration_part(axis_set)
    retriever = Retriever([contrast.prompt for contrast in part.contrasts])

    def messages(prompt: str) -> list[ChatMessage]:
        turns: list[ChatMessage] = []
        for i in reversed(retriever.nearest(prompt, N_RETRIEVED)):
            contrast = part.contrasts[i]
            answer = contrast.positive if toward > 0 else contrast.negative
            turns += [*user_message(contrast.prompt), ChatMessage(role="assistant", content=answer)]
        return turns + user_message(prompt)

    stored = sum(len(f"{c.prompt}{c.positive if toward > 0 else c.negative}".encode()) for c in part.contrasts)
    facts = _facts(context, axis_set, messages, stored)
    facts |= {"n_retrieved": float(N_RETRIEVED), "seconds_to_make": time.perf_counter() - started}
    return Arm("retrieval", pole_name(axis_set, toward), toward, messages, _unchanged, facts)


class Retriever:
    """BM25 over texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises MissingDependencyError without bm25s."""
        require_packages("bm25s")
        import bm25s

        self._index: Any = bm25s.BM25()
        self._index.index([_words(text) for text in texts], show_progress=False)
        self._known = set(self._index.vocab_dict)

    def nearest(self, query: str, k: int) -> list[int]:
        """Numbers of the `k` texts most similar to `query`, the most similar first; ties go to the earlier text."""
        words = [word for word in _words(query) if word in self._known]
        n_texts = int(self._index.scores["num_docs"])
        scores = self._index.get_scores(words) if words else np.zeros(n_texts)
        return [int(i) for i in np.argsort(-np.asarray(scores), kind="stable")[:k]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _unchanged(_engine: Engine) -> AbstractContextManager[None]:
    return nullcontext()


def _accepts_system(tokenizer: Any) -> bool:
    from jinja2.exceptions import TemplateError

    try:
        message_tokens(tokenizer, [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Hi."}])
    except TemplateError:  # raised by templates that allow user and assistant only
        return False
    return True


def _facts(
    context: ArmContext, axis_set: CalibrationSet, messages: Messages, artefact_bytes: int
) -> dict[str, float | str]:
    """Bytes stored, tokens added to an average calibration prompt, drift on neutral chat."""
    tokenizer = context.model.tokenizer
    prompts = [contrast.prompt for contrast in calibration_part(axis_set).contrasts[:16]]
    added = [
        len(message_tokens(tokenizer, [dict(m) for m in messages(prompt)]))
        - len(message_tokens(tokenizer, [{"role": "user", "content": prompt}]))
        for prompt in prompts
    ]
    return {
        "artefact_bytes": float(artefact_bytes),
        "context_tokens": float(np.mean(added)),
        "chat_kl": _chat_kl(context, messages),
    }


def _chat_kl(context: ArmContext, messages: Messages) -> float:
    """KL(model || model so prompted) in nats per token, on the model's own answers to held-out neutral prompts."""
    engine = TorchEngine(context.model)
    turns = [turn for turn in context.calibrator.neutral_turns() if turn[1].strip()]
    _, held_out = divided(turns, context.calibrator.settings.held_out)
    plain: list[EncodedText] = []
    prompted: list[EncodedText] = []
    for prompt, answer in held_out:
        tokens = engine.text_tokens(answer)[:MAX_RESPONSE_TOKENS]
        for texts, asked in ((plain, user_message(prompt)), (prompted, messages(prompt))):
            texts.append(EncodedText((*engine.chat_tokens(asked), *tokens), len(tokens)))
    kl = 0.0
    for before, now in zip(engine.distributions(plain), engine.distributions(prompted), strict=True):
        kl += float((np.exp(before) * (before - now)).sum())
    return kl / float(sum(text.n_scored for text in plain))
