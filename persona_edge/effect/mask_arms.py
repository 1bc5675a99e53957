"""Masks as arms: the paper's three methods, contrastive-fisher, and any pack that already exists.

On PyTorch a mask gates the model's weights (masked_model.py); on the runtime it becomes a pack and the weights are
switched as a user's would be. Both undo every bit.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache

from persona_edge.build import build_personas
from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.arm_context import ArmContext, Knob, calibration_part, drift_facts, pole_name, tune
from persona_edge.effect.interfaces import Arm, Engine, user_message
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.errors import InputError
from persona_edge.masked_model import masked
from persona_edge.maskpack import MaskPack, PackSummary, encode_pack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, planes_digest
from persona_edge.persona_sets import PersonaSpec
from persona_edge.pole_masks import Method, PlaneMaker, Side, paper_planes
from persona_edge.tensor_filter import filter_tensors

__all__ = ["PAPER_METHODS", "fisher_arm", "mask_arm", "mask_arm_from_pack", "paper_arm"]

PAPER_METHODS: tuple[Method, ...] = ("wanda", "contrastive-wanda", "contrastive-sparse")
FIRST_DENSITY = 0.02
LARGEST_DENSITY = 0.9


def mask_arm(name: str, personas: PersonaSet, persona: str, toward: int, facts: dict[str, float | str]) -> Arm:
    """`persona` of `personas` as an arm called `name`; its pack's size and share of gated units join `facts`."""
    pole = personas.name_of(persona)
    one = _only(personas, pole)
    encoded, summary = encode_pack(one)
    planes = _planes(one)
    sizes = {
        "artefact_bytes": float(len(encoded)),
        "mask_bytes": float(sum(plane.n_bytes for plane in summary.planes)),
        "share_of_units": _share_of_units(one.identity, planes, summary),
    }

    def active(engine: Engine) -> AbstractContextManager[None]:
        if isinstance(engine, RuntimeEngine):
            return engine.wearing(one, pole)
        if isinstance(engine, TorchEngine):
            return masked(engine.model, planes)
        raise InputError(f"the arm {name} cannot act on the engine {engine.name!r}; use pytorch, runtime or onnx")

    return Arm(name, pole, toward, user_message, active, {**facts, **sizes})


def mask_arm_from_pack(pack: MaskPack, persona: str, toward: int) -> Arm:
    """A persona of an existing pack, compositions such as INFP included, as the arm contrastive-fisher.

    Raises PersonaNotFoundError, or a PackError for a damaged plane.
    """
    return mask_arm("contrastive-fisher", pack.load(), persona, toward, {"source": "pack"})


def fisher_arm(context: ArmContext, axis_set: CalibrationSet, toward: int) -> Arm:
    """contrastive-fisher as `persona-edge export` builds it, at the context's limits. Both poles come of one build.

    Raises what build_personas raises.
    """
    name = pole_name(axis_set, toward)
    settings = replace(
        context.settings,
        method="contrastive-fisher",
        budget=None,
        density=None,
        max_chat_kl=context.max_chat_kl,
        max_perplexity_ratio=context.max_perplexity_ratio,
    )
    key = hashlib.sha256(f"{axis_set.content_hash()} {settings}".encode()).hexdigest()
    started = time.perf_counter()
    if key not in context.built:
        poles = (axis_set.positive_pole, axis_set.negative_pole)
        spec = PersonaSpec(axis_set.name, (axis_set,), {pole: (pole,) for pole in poles})
        context.built[key] = build_personas(context.calibrator, spec, settings)
    personas = context.built[key]
    report = personas.report["poles"][name]
    facts: dict[str, float | str] = {
        "seconds_to_make": time.perf_counter() - started,
        "tuned_chat_kl": float(report["drift"]["chat_kl"]),
        "tuned_perplexity_ratio": float(report["drift"]["perplexity_ratio"]),
        "tuned_web_kl": float(report["drift"]["web_kl"]),
    }
    if report.get("budget_nats") is not None:
        facts["strength"] = float(report["budget_nats"])
    return mask_arm("contrastive-fisher", personas, name, toward, facts)


def paper_arm(context: ArmContext, method: Method, axis_set: CalibrationSet, toward: int) -> Arm:
    """One of the paper's methods with gate 0; its density is what the limits allow."""
    name = pole_name(axis_set, toward)
    started = time.perf_counter()
    # A mask is made, hashed and applied: the last one is kept meanwhile, for it takes seconds to make.
    make = lru_cache(maxsize=1)(_maker(context, method, axis_set, "positive" if toward > 0 else "negative"))

    def change(density: float) -> AbstractContextManager[None]:
        return masked(context.model, make(density))

    def content(density: float) -> str:
        return planes_digest(make(density))

    found = tune(context, Knob(f"{method} {name}", change, content, FIRST_DENSITY, LARGEST_DENSITY))
    pole = Pole(name, axis_set.axis, make(found.budget))
    personas = PersonaSet(context.model.identity(), (pole,), {name: (name,)})
    facts: dict[str, float | str] = {
        "strength": found.budget,
        "seconds_to_make": time.perf_counter() - started,
        **drift_facts(found.drift),
    }
    return mask_arm(method, personas, name, toward, facts)


def _maker(context: ArmContext, method: Method, axis_set: CalibrationSet, side: Side) -> PlaneMaker:
    statistics = context.calibrator.margins_by_halves(calibration_part(axis_set))
    return paper_planes(context.model, _names(context), statistics, method=method, side=side, gate=0.0)


def _names(context: ArmContext) -> tuple[str, ...]:
    settings = context.settings
    all_names = [layer.name for layer in context.calibrator.layers]
    return filter_tensors(all_names, settings.include, settings.exclude, settings.layers)


def _only(personas: PersonaSet, persona: str) -> PersonaSet:
    """`personas` with nothing but `persona` and its poles: what a pack for it alone holds."""
    poles = personas.resolve(persona)
    return PersonaSet(personas.identity, poles, {persona: tuple(pole.name for pole in poles)})


def _planes(personas: PersonaSet) -> tuple[Plane, ...]:
    return tuple(plane for pole in personas.poles for plane in pole.planes)


def _share_of_units(identity: ModelIdentity, planes: tuple[Plane, ...], summary: PackSummary) -> float:
    """Gated units, a unit of two planes counted twice, of all units there are at the planes' granularity."""
    if not planes:
        return 0.0
    n_units = sum(shape.n_units(planes[0].granularity) for shape in identity.tensors)
    return sum(plane.n_positions for plane in summary.planes) / n_units
