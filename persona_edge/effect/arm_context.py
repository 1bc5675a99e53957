"""What every arm is made from, and the one rule for how strong it may be.

An arm with a knob (density, coefficient, scale) is as strong as the limits on side effects allow, measured as
build.py measures a mask: on the calibrator's held-out neutral web text and chat turns. So arms are compared at equal
side effects, not at equal settings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_edge.budget_search import BudgetResult, Drift, search_budget
from persona_edge.build import BuildSettings
from persona_edge.cache import cache_folder
from persona_edge.calibration import Calibrator, Progress, silent
from persona_edge.contrasts import CalibrationSet
from persona_edge.encoding import EncodedText
from persona_edge.errors import CalibrationError, InputError, MissingDependencyError, SelectionError
from persona_edge.evaluation import BaseBehaviour, mean_kl, measure_base
from persona_edge.growth import expected
from persona_edge.masks import PersonaSet
from persona_edge.modeling import TorchModel

if TYPE_CHECKING:
    import torch

    from persona_edge.effect.control_vector import ControlVector

__all__ = [
    "ArmContext",
    "Knob",
    "calibration_part",
    "drift_facts",
    "pole_name",
    "require_packages",
    "tensors_digest",
    "tune",
]

N_TRIALS = 6
EVAL_PACKAGES = {"bm25s": "retrieval", "peft": "LoRA"}


@dataclass(frozen=True)
class ArmContext:
    """The model, its calibrator and the limits that every arm keeps.

    `settings` are those of contrastive-fisher, save method and limits, which come from here: `max_chat_kl` in nats per
    token, `max_perplexity_ratio` with the arm / without. `cache` holds trained adapters; None is the user's cache.
    """

    model: TorchModel
    calibrator: Calibrator
    settings: BuildSettings = field(default_factory=BuildSettings)
    max_chat_kl: float | None = 0.2
    max_perplexity_ratio: float | None = 1.02
    seed: int = 0
    progress: Progress = silent
    cache: Path | None = None
    built: dict[str, PersonaSet] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Masks of an axis by what they were built from: both poles of an axis come from one build."""
    vectors: dict[str, tuple[ControlVector, float]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Control vectors by their set's content, and the seconds each took: an axis has one, its poles two signs."""

    def __post_init__(self) -> None:
        if self.calibrator.model is not self.model:
            raise InputError("the calibrator calibrates another model than the arms are for; give both the same")

    @property
    def adapter_folder(self) -> Path:
        """Where trained adapters are kept."""
        return cache_folder() / "adapters" if self.cache is None else self.cache

    @cached_property
    def side_effects(self) -> SideEffects:
        """What drift is measured on. First used while the model is unmodified."""
        return SideEffects(self.calibrator)


class SideEffects:
    """Drift on neutral text that no arm is made from. Made while the model is as it came: it records what that says."""

    def __init__(self, calibrator: Calibrator) -> None:
        data = calibrator.neutral_data()
        self._model = calibrator.model
        self._texts: tuple[Sequence[EncodedText], ...] = (data.held_out_web, data.held_out_chat)
        self.key = _hash([[text.tokens for text in texts] for texts in self._texts])

    @cached_property
    def _base(self) -> tuple[BaseBehaviour, BaseBehaviour]:
        web, chat = self._texts
        return measure_base(self._model, web), measure_base(self._model, chat)

    def drift(self, change: AbstractContextManager[None]) -> Drift:
        """Drift with `change` open."""
        base_web, base_chat = self._base  # before the change
        with change:
            web, chat = mean_kl(self._model, base_web), mean_kl(self._model, base_chat)
        return Drift(web.perplexity_ratio, chat.kl_divergence, web.kl_divergence)


@dataclass(frozen=True)
class Knob:
    """How strong an arm is: `change(strength)` opens it. Strengths run from 0 to `largest`; `start` is tried first.

    `content(strength)` is a digest of what acts then: measurements are kept under it.
    """

    label: str
    change: Callable[[float], AbstractContextManager[None]]
    content: Callable[[float], str]
    start: float
    largest: float = math.inf


def tune(context: ArmContext, knob: Knob) -> BudgetResult:
    """The largest strength within the context's limits; its `budget` is the strength.

    Raises SelectionError when no strength tried is within them, InputError when there is no limit.
    """
    done = 0

    def measure(strength: float) -> Drift:
        nonlocal done
        context.progress(f"strength of {knob.label}", done, N_TRIALS)
        done += 1
        try:
            return expected(_cached_drift(context, knob, min(strength, knob.largest)))
        except SelectionError:  # too little for even one unit: nothing changes
            return Drift(1.0, 0.0, 0.0)

    found = search_budget(
        measure,
        start=knob.start,
        max_perplexity_ratio=context.max_perplexity_ratio,
        max_chat_kl=context.max_chat_kl,
        n_steps=N_TRIALS,
    )
    context.progress(f"strength of {knob.label}", N_TRIALS, N_TRIALS)
    return replace(found, budget=min(found.budget, knob.largest))


def _cached_drift(context: ArmContext, knob: Knob, strength: float) -> Drift:
    effects = context.side_effects
    key = {"acting": knob.content(strength), "strength": strength, "texts": effects.key}
    found = context.calibrator.cached_json("arm-drift", key, lambda: asdict(effects.drift(knob.change(strength))))
    return Drift(**found)  # type: ignore[arg-type]


def drift_facts(drift: Drift) -> dict[str, float]:
    """What tuning measured, under the names that facts have."""
    facts = {"tuned_perplexity_ratio": drift.perplexity_ratio, "tuned_chat_kl": drift.chat_kl}
    return facts if drift.web_kl is None else {**facts, "tuned_web_kl": drift.web_kl}


def calibration_part(axis_set: CalibrationSet) -> CalibrationSet:
    """What arms are made from: all but the held-out contrasts. CalibrationError when nothing is left."""
    part, _held_out = axis_set.split()
    if not len(part):
        raise CalibrationError(f"{axis_set.name}: no contrasts to make an arm from; add some with other prompts")
    return part


def pole_name(axis_set: CalibrationSet, toward: int) -> str:
    """The pole that `toward` (+1 or -1) means; InputError for another number."""
    if toward not in (1, -1):
        raise InputError(f"toward is {toward}; it must be 1 (the positive pole) or -1 (the negative pole)")
    return axis_set.positive_pole if toward > 0 else axis_set.negative_pole


def require_packages(*names: str) -> None:
    """Raise MissingDependencyError, saying what to install, unless the packages of the extra `eval` are there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"the arm {EVAL_PACKAGES[name]} needs {name}, not installed here; run: pip install 'persona-edge[eval]'"
            )


def tensors_digest(tensors: Mapping[Any, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
