"""The runtime engine: the quantized model as it ships, with masks applied by the runtime itself.

A GGUF file runs on llama.cpp and is called `runtime` in records; an ONNX model runs on ONNX Runtime, called `onnx`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.interfaces import ChatMessage, EngineName
from persona_edge.encoding import EncodedText
from persona_edge.errors import GenerationError
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import PersonaSet
from persona_edge.onnx_model import find_onnx
from persona_edge.runtime.open_runtime import open_runtime
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.values import Message, SamplingOptions

__all__ = ["RuntimeEngine"]

Floats = NDArray[np.float64]


class RuntimeEngine:
    """`runtime` in whatever persona it is in now; a mask arm opens `wearing`."""

    def __init__(self, runtime: PersonaSession, name: EngineName = "runtime") -> None:
        self.runtime = runtime
        self.name: EngineName = name

    @classmethod
    @contextmanager
    def open(cls, model: Path, *, n_ctx: int = 4096, n_threads: int | None = None) -> Iterator[RuntimeEngine]:
        """An engine on `model`, a GGUF file or an ONNX folder or graph; raises what `open_runtime` raises."""
        with open_runtime(model, n_ctx=n_ctx, n_threads=n_threads) as runtime:
            yield cls(runtime, "runtime" if find_onnx(model) is None else "onnx")

    @contextmanager
    def wearing(self, personas: PersonaSet | MaskPack, persona: str, *, strength: float = 1.0) -> Iterator[None]:
        """While open, the model is `persona`; then every byte is as before.

        A PersonaSet goes through the bytes of a pack, as a user's would. Raises ModelMismatchError for another model's.
        """
        pack = personas if isinstance(personas, MaskPack) else MaskPack.from_bytes(encode_pack(personas)[0])
        self.runtime.attach(pack)
        self.runtime.switch(persona, strength)
        try:
            yield
        finally:
            self.runtime.base()

    def chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Tokens of the messages in the model's template, up to where the answer begins."""
        return self.runtime.tokenize_chat(_messages(messages))

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of plain text; names of control tokens in it are plain text too."""
        return self.runtime.tokenize(text, add_special=False, parse_special=False)

    def start_tokens(self) -> list[int]:
        """BOS where the model wants one, else nothing."""
        return self.runtime.tokenize("")

    def log_probabilities(self, texts: Sequence[EncodedText]) -> list[Floats]:
        """Log-probability of every scored token, (n_scored,) each, in the order of `texts`.

        Raises InputError for a text longer than the context, GenerationError when the model computes no numbers.
        """
        found = [np.empty(0)] * len(texts)
        # Texts with a common beginning follow each other, so that it is evaluated once.
        for i in sorted(range(len(texts)), key=lambda i: texts[i].tokens):
            if texts[i].n_scored:
                found[i] = self.runtime.log_probabilities(texts[i].tokens, texts[i].n_scored)
                _check(found[i])
        return found

    def distributions(self, texts: Sequence[EncodedText]) -> Iterator[NDArray[np.float32]]:
        """Log-probabilities over the vocabulary at every scored token, (n_scored, n_vocab), one text at a time."""
        for text in texts:
            if text.n_scored:
                yield self.runtime.log_distributions(text.tokens, text.n_scored)
            else:
                yield np.empty((0, self.runtime.n_vocab), np.float32)

    def generate(self, conversations: Sequence[Sequence[ChatMessage]], *, max_tokens: int) -> list[str]:
        """Greedy answers without repetition penalty, in the order of `conversations`."""
        options = SamplingOptions(max_tokens=max_tokens, temperature=0, repeat_penalty=1.0)
        return [self.runtime.chat(_messages(messages), options).text for messages in conversations]


def _messages(messages: Sequence[ChatMessage]) -> list[Message]:
    return [Message(role=message["role"], content=message["content"]) for message in messages]


def _check(values: Floats) -> None:
    if np.isnan(values).any():
        raise GenerationError("the model computes no numbers any more (NaN); make the arm weaker")
