"""A model of this machine as the one who answers: the runtime behind persona_edge.contrast_writer's `Speaker`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from persona_edge.errors import InputError
from persona_edge.runtime.values import Message, SamplingOptions

if TYPE_CHECKING:
    from persona_edge.runtime.persona_session import PersonaSession

__all__ = ["ModelSpeaker"]

_MAX_TOKENS = 90  # 45 words and the rest of a sentence
_STOP = ("\nUser:",)  # what a model without a chat template writes when it goes on with the conversation


class ModelSpeaker:
    """Answers with an open model, as it stands. The caller opens and closes it.

    An answer that has to open with given words is continued from them, as if the model had begun with them itself.
    """

    def __init__(self, runtime: PersonaSession, name: str, *, temperature: float = 0.7) -> None:
        """`name` stands for the model where runs are told apart. Raises InputError for a temperature that is none."""
        self.name = f"{name} at temperature {temperature}"
        self._runtime = runtime
        self._options = SamplingOptions(max_tokens=_MAX_TOKENS, temperature=temperature, repeat_penalty=1.1, stop=_STOP)
        self._takes_system = self._accepts(_messages("x", "x"))
        self._beginning = runtime.detokenize(runtime.tokenize(""))

    def answer(self, system: str, prompt: str, opening: str, seed: int) -> str:
        """The answer, `opening` included. Raises InputError when the prompt is longer than the model's context."""
        messages = _messages(system, prompt) if self._takes_system else _messages(None, f"{system}\n\n{prompt}")
        options = replace(self._options, seed=seed)
        if not opening:
            return self._runtime.chat(messages, options).text
        asked = self._runtime.detokenize(self._runtime.tokenize_chat(messages))
        space = " " if asked.endswith((":", "]")) else ""
        # `generate` puts the model's first token before the text itself.
        text = f"{asked.removeprefix(self._beginning)}{space}{opening}"
        return opening + self._runtime.generate(text, options).text

    def _accepts(self, messages: list[Message]) -> bool:
        with suppress(InputError):
            self._runtime.tokenize_chat(messages)
            return True
        return False


def _messages(system: str | None, prompt: str) -> list[Message]:
    instructions = [Message(role="system", content=system)] if system is not None else []
    return [*instructions, Message(role="user", content=prompt)]
