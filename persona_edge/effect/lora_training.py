"""Training a LoRA adapter on contrasts: supervised on one pole's answers, or by preference (DPO) on the pairs.

DPO: Rafailov et al., 2023 (arXiv:2305.18290), loss -log sigmoid(beta (m - m_reference)), where m is the summed
log-probability of the preferred answer minus that of the other, and the reference is the unmodified model. Under both
objectives answers end with the model's end-of-turn token, and only their tokens count.

A trained adapter is kept under everything that it depends on; training that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from persona_edge.cache import writing_to
from persona_edge.calibration import Progress, silent
from persona_edge.contrasts import CalibrationSet
from persona_edge.denormals import denormals_flushed
from persona_edge.effect.lora_adapter import fresh_adapter
from persona_edge.encoding import EncodedText, batches, encode_contrast
from persona_edge.files import atomic_output
from persona_edge.forward import scored_logits, scored_targets
from persona_edge.machine import release_freed_memory
from persona_edge.modeling import TorchModel
from persona_edge.packed_pairs import PackedPairs, contrast_batches, pack_pairs, packed_logits

if TYPE_CHECKING:
    import torch

__all__ = ["DPO", "SFT", "LoraSettings", "TrainedAdapter", "train_adapter"]

SECONDS_BETWEEN_CHECKPOINTS = 20.0
Loss = Callable[[], "torch.Tensor"]


@dataclass(frozen=True)
class LoraSettings:
    """How an adapter is trained: AdamW without weight decay, a tenth of the steps warming up, then a cosine to zero.

    `batch_tokens` bounds a padded batch; `beta` is DPO's.
    """

    objective: Literal["sft", "dpo"]
    learning_rate: float
    n_epochs: int
    rank: int = 16
    alpha: int = 32
    batch_tokens: int = 512
    beta: float = 0.1
    largest_gradient: float = 1.0
    seed: int = 0


SFT = LoraSettings("sft", learning_rate=5e-4, n_epochs=3)
DPO = LoraSettings("dpo", learning_rate=2e-4, n_epochs=2)


@dataclass(frozen=True)
class TrainedAdapter:
    """`tensors` by peft's names, float16 as stored; `losses` are means per epoch; `n_bytes` is the stored file's."""

    settings: LoraSettings
    tensors: Mapping[str, torch.Tensor]
    losses: tuple[float, ...]
    n_steps: int
    seconds: float
    n_bytes: int


def train_adapter(
    model: TorchModel,
    part: CalibrationSet,
    toward: int,
    settings: LoraSettings,
    *,
    folder: Path,
    model_key: Mapping[str, object],
    progress: Progress = silent,
) -> TrainedAdapter:
    """The adapter for the pole of `part` that `toward` (+1 or -1) means, trained or from `folder`.

    `model_key` identifies the weights and their number format.
    """
    key = {"model": dict(model_key), "set": part.content_hash(), "toward": toward, "settings": asdict(settings)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"lora-{settings.objective}-{digest[:16]}.safetensors"
    stored = _load(path)
    if stored is None:
        tensors, state = _train(_Job(model, part, toward, settings), path.with_suffix(".partial"), progress)
        _save(path, {name: tensor.half() for name, tensor in tensors.items()}, state)
        path.with_suffix(".partial").unlink(missing_ok=True)
        stored = _load(path)
        assert stored is not None  # it was just written
    tensors, state = stored
    losses = tuple(sum(epoch) / len(epoch) for epoch in _by_epoch(state.losses, settings.n_epochs))
    return TrainedAdapter(settings, tensors, losses, state.n_done, state.seconds, path.stat().st_size)


@dataclass(frozen=True)
class _Job:
    """What is trained on what."""

    model: TorchModel
    part: CalibrationSet
    toward: int
    settings: LoraSettings


@dataclass(frozen=True)
class _State:
    """How far training is: steps done, the loss of each, the seconds that they took."""

    n_done: int = 0
    losses: tuple[float, ...] = field(default=())
    seconds: float = 0.0

    def after(self, loss: float, seconds: float) -> _State:
        return _State(self.n_done + 1, (*self.losses, loss), self.seconds + seconds)


@denormals_flushed()
def _train(job: _Job, partial: Path, progress: Progress) -> tuple[dict[str, torch.Tensor], _State]:
    import torch

    settings = job.settings
    losses = _losses(job)  # DPO's reference is computed here, on the unmodified model
    order = _order(len(losses), settings)
    label = f"lora-{settings.objective} {job.part.positive_pole if job.toward > 0 else job.part.negative_pole}"
    with fresh_adapter(job.model, rank=settings.rank, alpha=settings.alpha, seed=settings.seed) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
        state = _resume(partial, parameters, optimizer)
        saved = time.monotonic()
        for step in range(state.n_done, len(order)):
            progress(label, step, len(order))
            started = time.perf_counter()
            loss = _step(job, losses[order[step]], optimizer, _rate(step, len(order)))
            release_freed_memory()
            state = state.after(loss, time.perf_counter() - started)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _checkpoint(partial, parameters, optimizer, state)
                saved = time.monotonic()
        progress(label, len(order), len(order))
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}, state


def _step(job: _Job, loss_of: Loss, optimizer: torch.optim.Optimizer, rate: float) -> float:
    """One update at the share `rate` of the learning rate; the loss before it."""
    import torch

    with torch.autocast(job.model.device.type, torch.bfloat16, enabled=job.model.dtype_name == "bfloat16"):
        loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], job.settings.largest_gradient)
        group["lr"] = job.settings.learning_rate * rate
    optimizer.step()
    return float(loss.detach())


def _rate(step: int, n_steps: int) -> float:
    """The share of the full learning rate at `step`."""
    warm_up = max(1, n_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up)))


def _order(n_batches: int, settings: LoraSettings) -> list[int]:
    """Which batch each step takes: every epoch all of them, each epoch in an order of its own."""
    import torch

    random = torch.Generator().manual_seed(settings.seed)
    return [int(i) for _ in range(settings.n_epochs) for i in torch.randperm(n_batches, generator=random)]


def _losses(job: _Job) -> list[Loss]:
    """One function per batch, which computes its loss under the model as it stands then."""
    model, settings = job.model, job.settings
    end = model.tokenizer.eos_token_id
    pairs = []
    for i, contrast in enumerate(job.part.contrasts):
        positive, negative = (_ended(text, end) for text in encode_contrast(model.tokenizer, contrast, i))
        pairs.append((positive, negative) if job.toward > 0 else (negative, positive))
    if settings.objective == "sft":
        return _supervised(model, [preferred for preferred, _ in pairs], settings)
    packed = [pack_pairs(group, model.device) for group in contrast_batches(pairs, max_tokens=settings.batch_tokens)]
    return [_preference(model, batch, settings.beta) for batch in packed]


def _ended(text: EncodedText, end: object) -> EncodedText:
    """`text` with the end-of-turn token, which an answer that is learnt has to have."""
    if not isinstance(end, int):
        return text
    return replace(text, tokens=(*text.tokens, end), n_scored=text.n_scored + 1)


def _supervised(model: TorchModel, texts: Sequence[EncodedText], settings: LoraSettings) -> list[Loss]:
    """Mean negative log-probability per answer token."""
    import torch

    def one(batch: Any) -> Loss:
        return lambda: torch.nn.functional.cross_entropy(scored_logits(model, batch), scored_targets(batch))

    return [one(batch) for batch in batches(texts, max_tokens=settings.batch_tokens, device=model.device)]


def _preference(model: TorchModel, batch: PackedPairs, beta: float) -> Loss:
    import torch

    with torch.no_grad():
        reference = _summed_margins(model, batch)

    def loss() -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(beta * (_summed_margins(model, batch) - reference)).mean()

    return loss


def _summed_margins(model: TorchModel, batch: PackedPairs) -> torch.Tensor:
    """Summed log-probability of the first answer minus that of the second, (n_pairs,)."""
    import torch

    log_p = packed_logits(model, batch).float().log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    signed = torch.where(batch.is_positive, log_p, -log_p)
    return torch.zeros(len(batch.tokens), device=signed.device).index_add(0, batch.rows, signed)


def _by_epoch(losses: Sequence[float], n_epochs: int) -> list[Sequence[float]]:
    size = max(1, len(losses) // n_epochs)
    return [losses[start : start + size] for start in range(0, size * n_epochs, size)]


def _checkpoint(
    path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, state: _State
) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors[name] = parameter.detach()
        tensors |= {f"{moment}|{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
    _save(path, tensors, state)


def _resume(path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> _State:
    """Set parameters and moments to those of the checkpoint, when there is one."""
    import torch

    stored = _load(path)
    if stored is None:
        return _State()
    tensors, state = stored
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
            moments = {moment: tensors[f"{moment}|{name}"].to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(state.n_done)), **moments}
    return state


def _save(path: Path, tensors: Mapping[str, torch.Tensor], state: _State) -> None:
    from safetensors.torch import save

    flat = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_output(path) as file:
        file.write(save(flat, {"state": json.dumps(asdict(state))}))


def _load(path: Path) -> tuple[dict[str, torch.Tensor], _State] | None:
    """What `_save` wrote; None when there is no such file or it is damaged. Its name says what it is of."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return None
    if not state:
        return None
    return tensors, _State(state["n_done"], tuple(state["losses"]), state["seconds"])
