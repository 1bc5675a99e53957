"""What an evaluation was asked for, resolved before any work: arms, and per axis the poles and compositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.arm_registry import ARM_NAMES, RUNTIME_ARMS, check_arms
from persona_edge.effect.tables import BASE, REFERENCE
from persona_edge.effect.task_registry import QUICK_TASKS, TASK_NAMES
from persona_edge.errors import InputError, MissingDependencyError, PersonaNotFoundError
from persona_edge.maskpack import MaskPack
from persona_edge.masks import match_name
from persona_edge.modeling import DType
from persona_edge.persona_sets import PersonaSpec, load_persona_set

__all__ = ["QUICK_ARMS", "EvalRequest", "Section", "chosen_arms", "chosen_tasks", "from_pack", "sections_of"]

QUICK_ARMS: Final = ("base", "system-prompt", "contrastive-fisher", "control-vector")
QUICK_ITEMS: Final = 16
QUICK_CONTRASTS: Final = 200
USUAL_ITEMS: Final = 100


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate; names are as on the command line, None means all of them.

    Of everything that is not given, `quick` takes fewer: arms, tasks, items, and of each set the first axis, with arms
    from at most `QUICK_CONTRASTS` of its contrasts. `n_contrasts`, 1 or more, limits what arms are made from, as in
    `export`, and not what tasks ask. `output` is the reports' path without suffix, `data` the folder of the evaluation
    data. `command` is kept in the record.
    """

    model: str
    output: Path
    personas: Sequence[str] = ("mbti16",)
    poles: Sequence[str] | None = None
    arms: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    engine: Literal["pytorch", "runtime", "both"] = "pytorch"
    backend: Literal["auto", "gguf", "onnx", "both"] = "auto"
    pack: Path | None = None
    n_contrasts: int | None = None
    n_items: int | None = None
    seed: int = 0
    quick: bool = False
    max_chat_kl: float = 0.2
    max_perplexity_ratio: float = 1.02
    data: Path | None = None
    device: str = "auto"
    dtype: DType = "auto"
    n_threads: int | None = None
    command: Sequence[str] = ()

    @property
    def items(self) -> int:
        """How many items a task draws."""
        return self.n_items or (QUICK_ITEMS if self.quick else USUAL_ITEMS)


@dataclass(frozen=True)
class Section:
    """One axis of a set, with the poles and compositions to measure on it and each one's direction there.

    Tasks ask the held-out part of `axis_set`; arms are made from the calibration part of `made_from`, which is all of
    `axis_set` or a draw from it.
    """

    spec: PersonaSpec
    axis_set: CalibrationSet
    wearers: tuple[tuple[str, int], ...]
    made_from: CalibrationSet


def chosen_arms(request: EvalRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arms to measure, and notes on those left out. Base is always there: the others are compared with it.

    Raises InputError for a name that is no arm, MissingDependencyError when a package is missing for one that was
    asked for by name.
    """
    if request.arms is not None:
        check_arms(request.arms)
        return tuple(dict.fromkeys(("base", *request.arms))), _not_on_the_runtime(request, request.arms)
    names, notes = [], []
    for name in QUICK_ARMS if request.quick else ARM_NAMES:
        try:
            check_arms([name])
            names.append(name)
        except MissingDependencyError as error:
            notes.append(f"left out: {error}")
    return tuple(names), (*notes, *_not_on_the_runtime(request, names))


def _not_on_the_runtime(request: EvalRequest, names: Sequence[str]) -> tuple[str, ...]:
    others = [name for name in names if name not in RUNTIME_ARMS]
    if request.engine == "pytorch" or not others:
        return ()
    return (f"on PyTorch only, as the runtime knows prompts and masks but no activations: {', '.join(others)}",)


def from_pack(names: Sequence[str], pack: MaskPack | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the arms `names` those that need no PyTorch, and notes on the others. InputError without a pack."""
    if pack is None:
        raise InputError(
            "an ONNX model by itself is measured with a pack; add --pack, or pass its GGUF file with --backend onnx"
        )
    kept = tuple(name for name in names if name in (BASE, REFERENCE))
    others = ", ".join(name for name in names if name not in kept)
    return kept, (f"made with PyTorch, so they need the GGUF file and --backend onnx: {others}",) if others else ()


def chosen_tasks(request: EvalRequest) -> tuple[str, ...]:
    """The names of the tasks; InputError for one that there is not."""
    if request.tasks is None:
        return QUICK_TASKS if request.quick else TASK_NAMES
    unknown = [name for name in request.tasks if name not in TASK_NAMES]
    if unknown:
        raise InputError(f"no task {unknown[0]!r}; choose from {', '.join(TASK_NAMES)}")
    return tuple(dict.fromkeys(request.tasks))


def sections_of(request: EvalRequest, pack: MaskPack | None) -> tuple[Section, ...]:
    """The axes to measure. Raises PersonaNotFoundError for a pole that no set, or not the pack, has, and InputError for
    a composition without a pack, or fewer than 1 contrast.
    """
    specs = [load_persona_set(name) for name in request.personas]
    wanted = None if request.poles is None else [_spelled(name, specs, pack) for name in request.poles]
    found = [section for spec in specs for section in _sections(spec, wanted, pack)]
    n_contrasts = request.n_contrasts
    if request.quick and wanted is None:
        firsts = {section.spec.name: section for section in reversed(found)}
        found = [section for section in found if firsts[section.spec.name] is section]
        n_contrasts = QUICK_CONTRASTS if n_contrasts is None else n_contrasts
    if not found:
        asked = ", ".join(request.personas)
        raise PersonaNotFoundError(f"{request.pack} holds no pole of {asked}; give --personas the set it was made from")
    if n_contrasts is None:
        return tuple(found)
    return tuple(replace(section, made_from=section.axis_set.limit(n_contrasts)) for section in found)


def _spelled(wanted: str, specs: Sequence[PersonaSpec], pack: MaskPack | None) -> str:
    """`wanted` as its set spells it."""
    for spec in specs:
        name = match_name(wanted, spec.personas)
        if name is not None:
            if len(spec.personas[name]) > 1 and pack is None:
                raise InputError(f"{name} is composed of several poles; give --pack with a pack that has it")
            if pack is not None and match_name(name, pack.personas) is None:
                raise PersonaNotFoundError(f"no persona {name!r} in the pack; it has {', '.join(pack.personas)}")
            return name
    known = ", ".join(dict.fromkeys(name for spec in specs for name in spec.personas))
    raise PersonaNotFoundError(f"no pole or persona {wanted!r}; these sets have {known}")


def _sections(spec: PersonaSpec, wanted: Sequence[str] | None, pack: MaskPack | None) -> Iterator[Section]:
    names = spec.poles if wanted is None else wanted
    held = [name for name in names if pack is None or match_name(name, pack.personas) is not None]
    for axis_set in spec.sets:
        sides = {axis_set.positive_pole: 1, axis_set.negative_pole: -1}
        wearers = [
            (name, sides[pole]) for name in dict.fromkeys(held) for pole in spec.personas.get(name, ()) if pole in sides
        ]
        if wearers:
            yield Section(spec, axis_set, tuple(wearers), axis_set)
