"""LoRA matrices on a model's maskable layers (attention and MLP), put there by peft and taken away without a trace.

Tensors are known by peft's names; A is (rank, n_columns), B is (n_rows, rank), float32 while they act, whatever the
model is in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from persona_edge.effect.arm_context import require_packages
from persona_edge.modeling import TorchModel

if TYPE_CHECKING:
    import torch

__all__ = ["adapted", "fresh_adapter"]


@contextmanager
def adapted(
    model: TorchModel, tensors: Mapping[str, torch.Tensor], *, rank: int, alpha: int, scale: float = 1.0
) -> Iterator[None]:
    """While open, every layer adds `scale` * alpha / rank * B A x to its output; then the model is as before."""
    import torch

    with fresh_adapter(model, rank=rank, alpha=alpha, scale=scale) as parameters:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
                parameter.requires_grad_(False)
        yield


@contextmanager
def fresh_adapter(
    model: TorchModel, *, rank: int, alpha: int, scale: float = 1.0, seed: int = 0
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """While open, the model has a new adapter (B is zero, A drawn by `seed`); yields its parameters by name.

    Raises MissingDependencyError without peft.
    """
    require_packages("peft")
    import peft
    import torch

    with _putting_back(model) as targets:
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by a name that it deprecates
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(model.model, config)
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", scale)
        yield {name: parameter for name, parameter in wrapped.named_parameters() if ".lora_" in name}


@contextmanager
def _putting_back(model: TorchModel) -> Iterator[list[str]]:
    """Yields the paths of the maskable layers; at the end they stand there again, however far peft came."""
    base: Any = model.model
    maskable = {id(layer.module) for layer in model.layers}
    originals = [(name, module) for name, module in base.named_modules() if id(module) in maskable]
    try:
        yield [name for name, _ in originals]
    finally:
        for name, module in originals:
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, module)
        vars(base).pop("peft_config", None)  # peft leaves it, and warns of it the next time
