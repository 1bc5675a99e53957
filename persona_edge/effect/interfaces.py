"""The three small interfaces that an evaluation is made of: what runs a model, what gives it a persona, what is asked.

Log-probabilities are natural. A *message list* is what a chat template takes: dictionaries of role and content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from persona_edge.encoding import EncodedText

if TYPE_CHECKING:
    from persona_edge.contrasts import CalibrationSet

__all__ = [
    "CHAT_KL",
    "SHARE",
    "TOWARD_POLE",
    "WEB_KL",
    "Arm",
    "ChatMessage",
    "Engine",
    "EngineName",
    "Items",
    "Task",
    "TaskResult",
    "user_message",
]

EngineName = Literal["pytorch", "runtime", "onnx"]  # the runtime on a GGUF file, and on an ONNX model
Floats = NDArray[np.float64]

# Names that the reports look for. A task may call other measures what it likes.
SHARE: Final = "share"  # unit of values between 0 and 1, printed in percent
TOWARD_POLE: Final = "positive likelier"  # measure: 1 where the positive pole's answer is the likelier by mean log p
CHAT_KL: Final = "chat KL"  # measure: KL(base || arm) on neutral chat turns
WEB_KL: Final = "web KL"  # measure: KL(base || arm) on neutral web text


class ChatMessage(TypedDict):
    """One turn: role is system, user or assistant."""

    role: str
    content: str


def user_message(prompt: str) -> list[ChatMessage]:
    """The message list of a plain question."""
    return [ChatMessage(role="user", content=prompt)]


class Engine(Protocol):
    """A model that can be scored and asked, as it stands: whatever arm is active acts on every call."""

    @property
    def name(self) -> EngineName:
        """Which engine: the reports call it so."""
        ...

    def chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Tokens of the messages in the model's template, up to where the assistant's answer begins."""
        ...

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of plain text without any special token."""
        ...

    def start_tokens(self) -> list[int]:
        """What stands before plain text: BOS where the model wants one, else nothing."""
        ...

    def log_probabilities(self, texts: Sequence[EncodedText]) -> list[Floats]:
        """Log-probability of every scored token of every text, each (n_scored,), in the order of `texts`."""
        ...

    def distributions(self, texts: Sequence[EncodedText]) -> Iterator[NDArray[np.float32]]:
        """Log-probabilities over the vocabulary at every scored token, (n_scored, n_vocab), one text at a time."""
        ...

    def generate(self, conversations: Sequence[Sequence[ChatMessage]], *, max_tokens: int) -> list[str]:
        """Greedy answers without repetition penalty."""
        ...


@dataclass(frozen=True)
class Arm:
    """One way of giving the model a persona, ready to use.

    `messages(prompt)` is the conversation that the prompt becomes (prompt arms add to it, the others leave it alone);
    `active(engine)` changes the model while it is open, and nothing stays behind. `pole` is the pole meant, None for
    the base model. `toward` is +1 when the pole is its axis's positive one, -1 when it is the negative one, 0 for base.
    `facts` are numbers worth reporting: artefact_bytes, seconds_to_make, strength, context_tokens …
    """

    name: str
    pole: str | None
    toward: int
    messages: Callable[[str], list[ChatMessage]]
    active: Callable[[Engine], AbstractContextManager[None]]
    facts: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Items:
    """What a task found: `values` per item (n_items,) of one measure, from which means and intervals are taken.

    `higher_is`: a higher mean is toward the axis's positive pole (`positive`), `better`, `worse` or `neutral`.
    `unit` is SHARE, or such as `nats per token`. An item that could not be measured is NaN. Where the number people
    know is exp of the mean (perplexity), give the mean's values (nats per token, per window).
    """

    measure: str
    values: Floats
    unit: str
    higher_is: Literal["positive", "better", "worse", "neutral"]


@dataclass(frozen=True)
class TaskResult:
    """All measures of one task on one arm, and texts worth reading (prompt -> answer)."""

    task: str
    measures: tuple[Items, ...]
    transcripts: Mapping[str, str] = field(default_factory=dict)


class Task(Protocol):
    """A measurement of the model as an arm leaves it. `kind` says which part of the report it belongs to.

    `settings` is what its results depend on besides model and arm: numbers of items, seed, a digest of the data (of the
    axis's contrasts, for a persona task). Results are kept under name and settings, so that an interrupted run goes on.
    """

    @property
    def name(self) -> str:
        """Unique among the tasks of a run."""
        ...

    @property
    def kind(self) -> Literal["persona", "side effect", "replies"]:
        """Persona tasks belong to an axis; the others are measured once per arm."""
        ...

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        """JSON-compatible, and the same for the same results."""
        ...

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """Measure with `arm` already active on `engine`; prompts go through `arm.messages`."""
        ...

    def prepare(self, engine: Engine) -> None:
        """Record what is needed of the unmodified model (its answers, its distributions); called once, before arms."""
        ...


ArmMaker = Callable[["CalibrationSet", int], Arm]
"""(calibration part of an axis, toward) -> the arm for that pole."""
