"""The arms by name, in the order in which reports show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.arm_context import ArmContext, pole_name, require_packages
from persona_edge.effect.control_vector import control_vector_arm
from persona_edge.effect.interfaces import Arm
from persona_edge.effect.lora_arms import lora_arm
from persona_edge.effect.lora_training import DPO, SFT, LoraSettings
from persona_edge.effect.mask_arms import PAPER_METHODS, fisher_arm, paper_arm
from persona_edge.effect.prompt_arms import base_arm, retrieval_arm, system_prompt_arm
from persona_edge.errors import InputError
from persona_edge.pole_masks import Method

__all__ = ["ARM_NAMES", "RUNTIME_ARMS", "ArmContext", "check_arms", "make_arms"]

Maker = Callable[[ArmContext, CalibrationSet, int], Arm]


def _paper(method: Method) -> Maker:
    return lambda context, axis_set, toward: paper_arm(context, method, axis_set, toward)


def _lora(settings: LoraSettings) -> Maker:
    return lambda context, axis_set, toward: lora_arm(context, settings, axis_set, toward)


MAKERS: Final[Mapping[str, Maker]] = {
    "base": lambda _context, _axis_set, _toward: base_arm(),
    "system-prompt": system_prompt_arm,
    "retrieval": retrieval_arm,
    **{method: _paper(method) for method in PAPER_METHODS},
    "contrastive-fisher": fisher_arm,
    "control-vector": control_vector_arm,
    "lora-sft": _lora(SFT),
    "lora-dpo": _lora(DPO),
}
ARM_NAMES: Final = tuple(MAKERS)

RUNTIME_ARMS: Final = frozenset({"base", "system-prompt", "retrieval", "contrastive-fisher", *PAPER_METHODS})
"""Arms that also act on the engines `runtime` and `onnx`."""

_PACKAGES = {"retrieval": "bm25s", "lora-sft": "peft", "lora-dpo": "peft"}


def check_arms(names: Sequence[str]) -> None:
    """Raise what `make_arms` would raise about names and packages, without making anything."""
    for name in names:
        if name not in MAKERS:
            raise InputError(f"no arm {name!r}; choose from {', '.join(ARM_NAMES)}")
        if name in _PACKAGES:
            require_packages(_PACKAGES[name])


def make_arms(names: Sequence[str], context: ArmContext, axis_set: CalibrationSet, toward: int) -> Iterator[Arm]:
    """The arms `names` for the pole of `axis_set` that `toward` (+1 or -1) means, each made when it is asked for.

    `axis_set` is the whole set; arms are made from its calibration part only. Raises InputError for an unknown name and
    MissingDependencyError for an arm whose package is not installed, both at once; the rest when an arm is made.
    """
    check_arms(names)
    pole_name(axis_set, toward)  # InputError for another number
    return (MAKERS[name](context, axis_set, toward) for name in names)
