"""LoRA adapters as arms: trained on the same contrasts (lora_training.py), then scaled to what the limits allow."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

from persona_edge.contrasts import CalibrationSet
from persona_edge.effect.arm_context import (
    ArmContext,
    Knob,
    calibration_part,
    drift_facts,
    pole_name,
    tensors_digest,
    tune,
)
from persona_edge.effect.interfaces import Arm, Engine, user_message
from persona_edge.effect.lora_adapter import adapted
from persona_edge.effect.lora_training import LoraSettings, TrainedAdapter, train_adapter
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.errors import InputError

__all__ = ["lora_arm"]

LARGEST_SCALE = 2.0  # beyond it an adapter does what it was not trained to do


def lora_arm(context: ArmContext, settings: LoraSettings, axis_set: CalibrationSet, toward: int) -> Arm:
    """`lora-sft` or `lora-dpo`; its scale (1 is as trained) is as large as the limits allow, up to 2."""
    name, pole = f"lora-{settings.objective}", pole_name(axis_set, toward)
    part = calibration_part(axis_set)
    settings = replace(settings, seed=context.seed)
    model_key = context.calibrator.model_key
    adapter = train_adapter(
        context.model,
        part,
        toward,
        settings,
        folder=context.adapter_folder,
        model_key=model_key,
        progress=context.progress,
    )
    wear = partial(adapted, tensors=adapter.tensors, rank=settings.rank, alpha=settings.alpha)

    def change(scale: float) -> AbstractContextManager[None]:
        return wear(context.model, scale=scale)

    digest = f"{settings.alpha / settings.rank} {tensors_digest(adapter.tensors)}"
    found = tune(context, Knob(f"{name} {pole}", change, lambda _scale: digest, start=1.0, largest=LARGEST_SCALE))

    def active(engine: Engine) -> AbstractContextManager[None]:
        if not isinstance(engine, TorchEngine):
            raise InputError(f"the arm {name} acts on the engine pytorch only, not on {engine.name}")
        return wear(engine.model, scale=found.budget)

    facts = {"strength": found.budget, **_training_facts(adapter), **drift_facts(found.drift)}
    return Arm(name, pole, toward, user_message, active, facts)


def _training_facts(adapter: TrainedAdapter) -> dict[str, float | str]:
    settings = adapter.settings
    facts: dict[str, float | str] = {
        "artefact_bytes": float(adapter.n_bytes),
        "seconds_to_make": adapter.seconds,
        "rank": float(settings.rank),
        "alpha": settings.alpha,
        "learning_rate": settings.learning_rate,
        "n_epochs": float(settings.n_epochs),
        "n_steps": float(adapter.n_steps),
        "batch_tokens": float(settings.batch_tokens),
        "loss_first_epoch": adapter.losses[0],
        "loss_last_epoch": adapter.losses[-1],
    }
    return facts if settings.objective == "sft" else {**facts, "beta": settings.beta}
