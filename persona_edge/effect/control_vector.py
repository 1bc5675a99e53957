"""Control vectors as an arm: one direction per block, added to what the block passes on, at every token.

The method of representation engineering (Zou et al., 2023, arXiv:2310.01405) and of contrastive activation addition
(Rimsky et al., 2024, arXiv:2312.06681): a block's direction is the mean, over contrasts, of the difference between its
mean outputs on the two answers' tokens. Our own code on hooks: the package repeng 0.4.0 does not import with NumPy 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_edge.contrasts import CalibrationSet
from persona_edge.denormals import denormals_flushed
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
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.encoding import Batch, batches, encode_contrast
from persona_edge.errors import InputError, UnsupportedModelError
from persona_edge.modeling import TorchModel

if TYPE_CHECKING:
    import torch

__all__ = ["ControlVector", "control_vector_arm", "controlled", "find_control_vector"]

# Middle to late blocks: earlier ones read words, the last ones already choose them.
FIRST_BLOCK, LAST_BLOCK = 0.35, 0.85
FIRST_COEFFICIENT = 0.05
BYTES_PER_NUMBER = 4  # as llama.cpp stores control vectors


@dataclass(frozen=True)
class ControlVector:
    """`directions[block]` (n_hidden,) float32 points to the positive pole; its length is the poles' distance there."""

    directions: Mapping[int, torch.Tensor]

    @property
    def n_bytes(self) -> int:
        """Size as a float32 file, without its header."""
        return BYTES_PER_NUMBER * sum(direction.numel() for direction in self.directions.values())


def control_vector_arm(context: ArmContext, axis_set: CalibrationSet, toward: int) -> Arm:
    """The axis's control vector, with a coefficient as large as the limits allow."""
    name = pole_name(axis_set, toward)
    vector, seconds = _found(context, axis_set)

    def change(coefficient: float) -> AbstractContextManager[None]:
        return controlled(context.model, vector, toward * coefficient)

    blocks = sorted(vector.directions)
    digest = f"{toward} {tensors_digest(vector.directions)}"
    found = tune(context, Knob(f"control vector {name}", change, lambda _strength: digest, FIRST_COEFFICIENT))

    def active(engine: Engine) -> AbstractContextManager[None]:
        if not isinstance(engine, TorchEngine):
            raise InputError(f"the arm control-vector acts on the engine pytorch only, not on {engine.name}")
        return controlled(engine.model, vector, toward * found.budget)

    facts: dict[str, float | str] = {
        "artefact_bytes": float(vector.n_bytes),
        "seconds_to_make": seconds,
        "strength": found.budget,
        "blocks": f"{blocks[0]}-{blocks[-1]}",
        **drift_facts(found.drift),
    }
    return Arm("control-vector", name, toward, user_message, active, facts)


def _found(context: ArmContext, axis_set: CalibrationSet) -> tuple[ControlVector, float]:
    """The axis's vector, which both poles share, and the seconds that finding it took."""
    key = axis_set.content_hash()
    if key not in context.vectors:
        part = calibration_part(axis_set)
        context.progress(f"control vector {axis_set.axis}", 0, 1)
        started = time.perf_counter()
        vector = find_control_vector(context.model, part, max_tokens=context.calibrator.settings.max_batch_tokens)
        context.vectors[key] = vector, time.perf_counter() - started
        context.progress(f"control vector {axis_set.axis}", 1, 1)
    return context.vectors[key]


@denormals_flushed()
def find_control_vector(model: TorchModel, part: CalibrationSet, *, max_tokens: int = 1024) -> ControlVector:
    """Mean difference of the middle to late blocks' outputs over answer tokens, each answer weighing the same."""
    import torch

    numbers = range(round(FIRST_BLOCK * model.n_blocks), max(1, round(LAST_BLOCK * model.n_blocks)))
    sums: dict[int, torch.Tensor] = {}
    signs = (1.0, -1.0)
    pairs = [encode_contrast(model.tokenizer, contrast, i) for i, contrast in enumerate(part.contrasts)]
    for side, sign in enumerate(signs):
        for batch in batches([pair[side] for pair in pairs], max_tokens=max_tokens, device=model.device):
            shares = _answer_shares(batch) * (sign / len(pairs))

            def add(number: int, output: torch.Tensor, shares: torch.Tensor = shares) -> None:
                total = (output.float() * shares[..., None]).sum((0, 1)).cpu()
                sums[number] = sums[number] + total if number in sums else total

            with torch.no_grad(), _watching(model, numbers, add):
                model.model(
                    input_ids=batch.tokens, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1
                )
    return ControlVector(sums)


def _answer_shares(batch: Batch) -> torch.Tensor:
    """1 / the answer's length on each of its tokens, 0 elsewhere, (n_sequences, n_tokens) float32."""
    import torch

    is_answer = torch.nn.functional.pad(batch.scored, (1, 0))  # scored is where the *next* token counts
    return is_answer / is_answer.sum(1, keepdim=True)


@contextmanager
def controlled(model: TorchModel, vector: ControlVector, coefficient: float) -> Iterator[None]:
    """While open, `coefficient` times its direction is added to every output of each of the vector's blocks."""

    def add(number: int) -> Callable[[Any, Any, Any], Any]:
        step = coefficient * vector.directions[number]

        def hook(_block: Any, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden + step.to(hidden.device, hidden.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    blocks = _blocks(model)
    with ExitStack() as hooks:
        for number in vector.directions:
            hooks.callback(blocks[number].register_forward_hook(add(number)).remove)
        yield


@contextmanager
def _watching(model: TorchModel, numbers: range, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    def watch(number: int) -> Callable[[Any, Any, Any], None]:
        def hook(_block: Any, _inputs: Any, output: Any) -> None:
            see(number, output[0] if isinstance(output, tuple) else output)

        return hook

    blocks = _blocks(model)
    with ExitStack() as hooks:
        for number in numbers:
            hooks.callback(blocks[number].register_forward_hook(watch(number)).remove)
        yield


def _blocks(model: TorchModel) -> Any:
    import torch

    blocks = getattr(model.model.get_decoder(), "layers", None)
    if not isinstance(blocks, torch.nn.ModuleList):
        raise UnsupportedModelError(f"{model.name}: no list of decoder blocks to add a control vector to")
    return blocks
