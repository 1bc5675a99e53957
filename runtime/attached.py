"""A pack that was found to belong to the model at hand, and the way to edit that model's weights to its personas.

How weights are edited is the backend's: `session` and `onnx_session` each have their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from persona_edge.maskpack import MaskPack
from persona_edge.masks import PersonaSet, Pole
from persona_edge.runtime.programs import CompositionCache, PersonaProgram

__all__ = ["AttachedPack"]


class AttachedPack(ABC):
    """Names, and programs by persona and strength: decoded when they are first asked for, kept within a bound."""

    def __init__(self, pack: MaskPack) -> None:
        self.pack = pack
        poles = tuple(Pole(name, "", ()) for name in pack.pole_names)  # names alone: positions are decoded when needed
        self._outline = PersonaSet(pack.identity, poles, pack.personas)
        self._compositions = CompositionCache(pack.resolve)

    def name_of(self, persona: str) -> str:
        """`persona` as the pack spells it; PersonaNotFoundError when it has none."""
        return self._outline.name_of(persona)

    def program(self, name: str, strength: float) -> PersonaProgram:
        """What to write for the persona `name`, spelled as in the pack. Raises PackError or InputError."""
        return self._compositions.program(name, strength)

    @abstractmethod
    def check(self, program: PersonaProgram | None) -> None:
        """Raise what would keep `program` from being written."""

    @abstractmethod
    def write(self, program: PersonaProgram | None) -> tuple[int, int]:
        """Edit the weights to `program`, or back to base for None: units and bytes written."""
