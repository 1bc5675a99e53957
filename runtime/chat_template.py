"""From messages to the prompt a model was trained on: the Jinja template in the GGUF's metadata, in a sandbox.

Templates follow Hugging Face's conventions: `messages`, `add_generation_prompt`, `bos_token`, `raise_exception` and so
on. They come from downloaded files, so they run in Jinja's immutable sandbox: they can read the messages, nothing else.

A model without a template (a base model) gets a plain transcript instead:

    The system text

    User: a question
    Assistant: an answer
    User: the next question
    Assistant:

and generation stops where the model starts to write the user's next line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

from persona_edge.errors import InputError, ModelFileError
from persona_edge.runtime.values import Message

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "RenderedPrompt"]

_PLAIN_SPEAKERS = {"user": "User", "assistant": "Assistant"}
_PLAIN_STOP = ("\nUser:",)


@dataclass(frozen=True)
class RenderedPrompt:
    """The prompt as text, and the strings besides the model's own end token at which its answer ends."""

    text: str
    stop: tuple[str, ...] = ()


class ChatTemplate:
    """Renders messages. `source` is the Jinja text or None; the tokens are the model's, as text, "" for none."""

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "") -> None:
        """Compile `source`; ModelFileError when it is not valid Jinja."""
        self._template = None if source is None else _compile(source)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[Message]) -> RenderedPrompt:
        """The prompt that asks for the next assistant message.

        Raises InputError for messages that are malformed or that the template refuses, e.g. two user turns in a row.
        """
        _check_messages(messages)
        if self._template is None:
            return RenderedPrompt(_plain_transcript(messages), _PLAIN_STOP)
        import jinja2

        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise InputError(f"the model's chat template does not accept these messages: {_one_line(error)}") from None
        return RenderedPrompt(text)


def _compile(source: str) -> jinja2.Template:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelFileError(
            f"the model's chat template is not valid: {_one_line(error)}; use another GGUF file"
        ) from None


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InputError("there is no message to answer; give at least one")
    for number, message in enumerate(messages, 1):
        is_mapping = isinstance(message, Mapping)
        if not (is_mapping and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise InputError(f"message {number} needs a role and a content, both text; it is {message!r:.80}")


def _plain_transcript(messages: Sequence[Message]) -> str:
    turns = []
    for message in messages:
        speaker, content = _PLAIN_SPEAKERS.get(message["role"]), message["content"].strip()
        turns.append(f"{speaker}: {content}\n" if speaker else f"{content}\n\n")
    return "".join(turns) + "Assistant:"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
