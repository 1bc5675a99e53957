"""What every arm said to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from persona_edge.effect.record import ArmRecord, Record
from persona_edge.effect.tables import BASE, engines_of

__all__ = ["Transcripts", "transcripts_of"]


@dataclass(frozen=True)
class Transcripts:
    """Replies of base and of the arms of one pole: arm's name -> prompt -> reply. `prompts` are all of them."""

    title: str
    prompts: tuple[str, ...]
    replies: Mapping[str, Mapping[str, str]]


def transcripts_of(record: Record) -> tuple[Transcripts, ...]:
    """One part per engine and pole for which there are any."""
    found = []
    for engine in engines_of(record):
        arms = [arm for arm in record.arms if arm.engine == engine]
        base = [arm for arm in arms if arm.name == BASE]
        for pole in dict.fromkeys(arm.pole for arm in arms if arm.pole is not None) or [None]:
            of_pole = [*base, *(arm for arm in arms if arm.pole is not None and arm.pole == pole)]
            replies = {arm.name: texts for arm in of_pole if (texts := _texts(arm))}
            prompts = dict.fromkeys(prompt for texts in replies.values() for prompt in texts)
            if prompts:
                found.append(Transcripts(f"{engine}, {pole or 'unmodified'}", tuple(prompts), replies))
    return tuple(found)


def _texts(arm: ArmRecord) -> dict[str, str]:
    return {prompt: reply for outcome in arm.outcomes for prompt, reply in outcome.transcripts.items()}
