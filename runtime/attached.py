"""A pack that was found to belong to the model at hand, and the way to edit that model's weights to its personas."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from persona_edge.maskpack import MaskPack
from persona_edge.masks import PersonaSet, Pole, TensorShape
from persona_edge.runtime.dequantize import dequantize
from persona_edge.runtime.llama_device import DeviceMirror
from persona_edge.runtime.programs import CompositionCache, PersonaProgram
from persona_edge.runtime.switcher import Switcher, WeightTensor
from persona_edge.sketch import check_identity

__all__ = ["AttachedPack", "LlamaAttachedPack"]


class AttachedPack(ABC):
    """Names, and programs by persona and strength: decoded when they are first asked for, kept within a bound."""

    def __init__(self, pack: MaskPack) -> None:
        self.pack = pack
        poles = tuple(Pole(name, "", ()) for name in pack.pole_names)  # names alone: positions are decoded when needed
        self._outline = PersonaSet(pack.identity, poles, pack.personas)
        self._compositions = CompositionCache(
            lambda name: [pack.pole(pole.name) for pole in self._outline.resolve(name)]
        )

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


class LlamaAttachedPack(AttachedPack):
    """On the tensors of a GGUF model in llama.cpp's memory."""

    def __init__(self, pack: MaskPack, architecture: str, tensors: dict[str, WeightTensor]) -> None:
        """Raises ModelMismatchError unless the pack was made from these weights, UnsupportedModelError."""
        shapes = (TensorShape(tensor.name, tensor.n_rows, tensor.n_columns) for tensor in tensors.values())
        check_identity(pack.identity, architecture, shapes, lambda name, at: _weights_at(tensors[name], at))
        super().__init__(pack)
        gated = {shape.name: tensors[shape.name] for shape in pack.identity.tensors}
        self._switcher, self._devices = Switcher(gated), DeviceMirror(gated)

    def check(self, program: PersonaProgram | None) -> None:
        if program is not None:
            self._switcher.check(program)

    def write(self, program: PersonaProgram | None) -> tuple[int, int]:
        self._devices.will_change(self._switcher.active, program)
        stats = self._switcher.restore() if program is None else self._switcher.apply(program)
        self._devices.send()
        return stats.n_units_written, stats.n_bytes


def _weights_at(tensor: WeightTensor, positions: NDArray[np.uint32]) -> NDArray[np.float32]:
    return dequantize(tensor.data, tensor.ggml_type, positions)
