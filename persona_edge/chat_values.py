"""What a chat hands to whoever shows it: small frozen values, and the protocol of a place to show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from persona_edge.runtime.values import Completion, SamplingOptions, SwitchReport

__all__ = ["BASE", "Answer", "ChatOutput", "ChatSettings", "Speaker", "Switch", "speaker_name"]

BASE = "base"
"""What the unmodified model is called where a persona may be named."""

Speaker: TypeAlias = str | None
"""Who answers: a persona of the pack, or None for the unmodified model."""


@dataclass(frozen=True)
class ChatSettings:
    """How a chat begins.

    `compare` names the personas that each question is asked of; empty for an ordinary chat. `seed` is moved on by one
    with each question; all answers of one comparison use the same. `no_pack` tells how to get personas when there are
    none.
    """

    options: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    strength: float = 1.0
    system: str | None = None
    compare: tuple[str, ...] = ()
    no_pack: str = "no mask pack is attached; start the chat with --pack"


@dataclass(frozen=True)
class Switch:
    """What a switch did, and the persona that it left."""

    before: Speaker
    report: SwitchReport


@dataclass(frozen=True)
class Answer:
    """One answer, with all that was measured. `completion` is None when it was stopped before its end.

    `text` has no white space around it. `switch` is the last switch when this is the first answer after it.
    """

    persona: Speaker
    strength: float
    question: str
    text: str
    seed: int
    completion: Completion | None
    switch: Switch | None


class ChatOutput(Protocol):
    """Where a chat's results go. All texts are raw: an output makes them safe to show."""

    def note(self, text: str) -> None:
        """Something that a person would like to know happened: a switch, turns that were dropped."""

    def show(self, text: str) -> None:
        """What a command asked for, in one or more lines."""

    def problem(self, text: str) -> None:
        """Why a line could not be carried out."""

    def comparison_begins(self, question: str) -> None:
        """Several answers to `question` follow."""

    def comparison_ends(self, switches: Sequence[Switch]) -> None:
        """No more answers; these switches were made, the one back included."""

    def answer_begins(self, speaker: Speaker, strength: float) -> None:
        """The pieces of an answer follow."""

    def answer_piece(self, text: str) -> None:
        """The next part of the answer."""

    def answer_ends(self, answer: Answer) -> None:
        """The answer as a whole, whether it was finished or stopped."""


def speaker_name(speaker: Speaker) -> str:
    """The persona's name, or `base`."""
    return BASE if speaker is None else speaker
