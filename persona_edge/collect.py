"""Statistics from a model and calibration data: hooks, one backward pass, no weight gradients.

With x the input of a layer (n_tokens, n_columns) and delta the gradient at its output (n_tokens, n_rows), the
derivative for the gate of group g in row i is  sum_t delta_ti sum_{j in g} w_ij x_tj  (docs/method.md). For margins it
is summed over tokens, so it is the group sums of w * (delta^T x); so it is for the drift of a masked model. For damage
every token's term is squared first.

Nothing is kept for longer than one layer of one batch, except the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.denormals import denormals_flushed
from persona_edge.encoding import Batch
from persona_edge.forward import ROWS_AT_ONCE, raw_scored_logits, target_log_probabilities
from persona_edge.masked_model import masked
from persona_edge.masks import Granularity, Plane
from persona_edge.modeling import LinearLayer, TorchModel
from persona_edge.packed_pairs import ContrastPair, pack_pairs, raw_packed_logits
from persona_edge.statistics import Kind, Statistics

if TYPE_CHECKING:
    import torch

__all__ = ["Focus", "collect_damage", "collect_drift", "collect_margins"]

ForwardConsumer = Callable[[LinearLayer, "torch.Tensor"], None]
BackwardConsumer = Callable[[LinearLayer, "torch.Tensor", "torch.Tensor", "torch.Tensor"], None]
CHUNK_TOKENS = 128
# The gates' own Fisher costs ten times the rest of a batch; a fifth of the tokens estimates it as well. Odd, because
# neutral texts are cut to even lengths: a divisor would take each one's first token, the oddest of all, every time.
GATE_TOKEN_STRIDE = 5


@dataclass(frozen=True)
class Focus:
    """Which contrasts still count while a mask grows: those that the pole has not won yet.

    A contrast of margin m weighs sigmoid(sharpness (enough - toward m)): nearly 1 while the other pole's answer is
    likelier, nearly 0 once the own answer leads by far more than `enough` nats per token. `toward` is +1 for the
    axis's positive pole and -1 for the negative one. It is the derivative of the logistic loss that preference tuning
    minimises (Rafailov et al., 2023, arXiv:2305.18290), without its reference model.

    The pole's own answers count `own` times what the other pole's do: a margin also grows when both answers become
    unlikely and the other's more so, which is breaking the model, not a persona.
    """

    toward: Literal[1, -1]
    enough: float = 0.5
    sharpness: float = 2.0
    own: float = 1.25

    def weights(self, margins: torch.Tensor) -> torch.Tensor:
        """The weight of each contrast, (n_contrasts,), from margins in nats per token."""
        return (self.sharpness * (self.enough - self.toward * margins)).sigmoid()


class _Sums:
    """Running float32 sums on the CPU, by field and tensor; on top of `onto`, whose arrays they take over."""

    def __init__(self, layers: Sequence[LinearLayer], onto: Statistics | None) -> None:
        self.order = tuple(layer.name for layer in layers)
        self.counts: Mapping[str, int] = {} if onto is None else onto.counts
        self.values: dict[str, dict[str, NDArray[np.float32]]] = {}
        if onto is not None:
            self.values = {field: dict(tensors) for field, tensors in onto.sums.items()}

    def add(self, field: str, tensor: str, values: torch.Tensor) -> None:
        import torch

        tensors = self.values.setdefault(field, {})
        if tensor in tensors:
            tensors[tensor] += values.detach().float().cpu().numpy()
        else:
            tensors[tensor] = values.detach().to("cpu", torch.float32, copy=True).numpy()

    def finish(self, kind: Kind, counts: Mapping[str, int]) -> Statistics:
        sums = {
            field: {name: tensors[name] for name in self.order if name in tensors}
            for field, tensors in self.values.items()
        }
        return Statistics(kind, {name: n + self.counts.get(name, 0) for name, n in counts.items()}, sums)


@contextmanager
def _watching(
    layers: Sequence[LinearLayer], forward: ForwardConsumer | None, backward: BackwardConsumer
) -> Iterator[None]:
    """While open, `forward(layer, x)` and `backward(layer, x, delta, weight)` see every layer's run.

    `x` and `delta` are (n_sequences, n_tokens, …). `weight` is what the layer ran with: under layer streaming a copy on
    the device, which the module itself has given up again by the time of the backward pass. A streamed layer runs
    twice; only the run that records gradients is watched.
    """
    import torch

    def watch(layer: LinearLayer) -> Callable[..., None]:
        def hook(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            x, weight = inputs[0].detach(), module.weight.detach()
            if forward is not None:
                forward(layer, x)

            def gradient_hook(gradient: torch.Tensor) -> None:
                with torch.no_grad():
                    backward(layer, x, gradient, weight)

            output.register_hook(gradient_hook)

        return hook

    handles = [layer.module.register_forward_hook(watch(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: TorchModel, batch: Batch) -> torch.Tensor:
    """Logits at the scored positions, (n_scored, n_vocab), row-major, with a graph from the embeddings on."""
    embeddings = model.model.get_input_embeddings()(batch.tokens).requires_grad_(True)
    return raw_scored_logits(model, batch, inputs_embeds=embeddings)


@denormals_flushed()
def collect_margins(
    model: TorchModel,
    layers: Sequence[LinearLayer],
    pairs: Sequence[ContrastPair],
    *,
    granularity: Granularity = 32,
    focus: Focus | None = None,
    onto: Statistics | None = None,
) -> Statistics:
    """Margin statistics of one batch of contrasts on the model as it stands; see statistics.py for the fields.

    The margin of a contrast is the mean log-probability of the positive answer's tokens minus the negative's, in nats.
    With a `focus`, contrasts weigh as it says and channel statistics are left out. On a masked model the derivative of
    a closed gate is 0, as its weights are. `onto` are the sums of earlier batches: they are added to in place.
    """
    import torch

    batch = pack_pairs(pairs, model.device)
    sums = _Sums(layers, onto)
    seen_by = {"positive": batch.is_positive, "negative": ~batch.is_positive}

    def channels(layer: LinearLayer, x: torch.Tensor) -> None:
        for side, chosen in seen_by.items():
            seen = x[batch.rows[chosen], batch.positions[chosen]].float()
            sums.add(f"{side}_abs", layer.name, seen.abs().sum(0))
            sums.add(f"{side}_sum", layer.name, seen.sum(0))
            sums.add(f"{side}_square", layer.name, seen.square().sum(0))

    gates = _gate_sums(sums, "gate_gradient", granularity)
    with _watching(layers, channels if focus is None else None, gates):
        embeddings = model.model.get_input_embeddings()(batch.tokens).requires_grad_(True)
        log_p = target_log_probabilities(raw_packed_logits(model, batch, embeddings), batch.targets)
        terms = log_p * torch.where(batch.is_positive, batch.shares, -batch.shares)
        if focus is not None:
            margins = torch.zeros(len(pairs), device=terms.device).index_add(0, batch.rows, terms.detach())
            is_own = batch.is_positive == (focus.toward > 0)
            terms = terms * focus.weights(margins)[batch.rows] * torch.where(is_own, focus.own, 1.0)
        terms.sum().backward()
    counts = {
        "contrasts": len(pairs),
        "batches": 1,
        "positive_tokens": int(batch.is_positive.sum()),
        "negative_tokens": int((~batch.is_positive).sum()),
    }
    return sums.finish("margin", counts)


def _gate_sums(sums: _Sums, field: str, granularity: Granularity) -> BackwardConsumer:
    """What adds the derivative by every gate, summed over tokens, to `field`."""

    def gates(layer: LinearLayer, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> None:
        product = delta.flatten(0, -2).T @ x.flatten(0, -2)
        sums.add(field, layer.name, layer.to_gguf_rows(_group_sums(product * weight, granularity)))

    return gates


def _group_sums(values: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    import torch

    if granularity == 1:
        return values.float()
    sums: torch.Tensor = values.unflatten(-1, (-1, granularity)).sum(-1, dtype=torch.float32)
    return sums


@denormals_flushed()
def collect_damage(
    model: TorchModel,
    layers: Sequence[LinearLayer],
    batch: Batch,
    *,
    seed: int,
    gate_fisher: bool = True,
    onto: Statistics | None = None,
) -> Statistics:
    """Damage statistics of one batch of neutral text; see statistics.py for the fields.

    Labels are sampled from the model itself, so that squared gradients estimate the Fisher information. `onto` are the
    sums of earlier batches: they are added to in place.
    """
    import torch

    sums = _Sums(layers, onto)
    kept = batch.attention_mask.bool()

    def moments(layer: LinearLayer, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> None:
        inputs, gradients = x[kept], delta[kept]
        sums.add("input_square", layer.name, inputs.float().square().sum(0))
        squares = gradients.float().square().sum(0)
        sums.add("output_gradient_square", layer.name, layer.to_gguf_rows(squares))
        if gate_fisher:
            some = slice(None, None, GATE_TOKEN_STRIDE)
            squared = _squared_gates(weight, inputs[some], gradients[some]) * (len(inputs) / len(inputs[some]))
            sums.add("gate_gradient_square", layer.name, layer.to_gguf_rows(squared))

    with _watching(layers, None, moments):
        logits = _logits(model, batch)
        with torch.no_grad():
            generator = torch.Generator(device=logits.device).manual_seed(seed)
            probabilities = logits.to(torch.float32, copy=True)
            torch.softmax(probabilities, -1, out=probabilities)
            labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            del probabilities
        target_log_probabilities(logits, labels).sum().backward()
    return sums.finish("damage", {"batches": 1, "tokens": int(batch.scored.sum())})


@denormals_flushed()
def collect_drift(
    model: TorchModel,
    layers: Sequence[LinearLayer],
    batch: Batch,
    planes: Sequence[Plane],
    *,
    granularity: Granularity = 32,
    onto: Statistics | None = None,
) -> Statistics:
    """How the drift of `model` with `planes` on changes with each gate, on one batch of neutral text.

    The drift is KL(model || model with planes), nats summed over the batch's predictions; see statistics.py for the
    field. The derivative of a closed gate is 0, as its weights are. The model comes unmasked; the mask is put on here,
    since the model is asked without it first: keeping those predictions for all texts would take gigabytes. `onto` are
    the sums of earlier batches: they are added to in place.
    """
    import torch

    sums = _Sums(layers, onto)
    with torch.no_grad():
        before = raw_scored_logits(model, batch)
    with masked(model, planes), _watching(layers, None, _gate_sums(sums, "drift_gradient", granularity)):
        logits = _logits(model, batch)
        gradient = torch.empty_like(logits)
        with torch.no_grad():  # of KL(softmax(b) || softmax(l)) by l: softmax(l) - softmax(b)
            rows = (tensor.split(ROWS_AT_ONCE) for tensor in (gradient, logits, before))
            for into, now, then in zip(*rows, strict=True):
                into.copy_(now.float().softmax(-1).sub_(then.float().softmax(-1)))
        del before
        logits.backward(gradient)
    return sums.finish("drift", {"batches": 1, "tokens": int(batch.scored.sum())})


def _squared_gates(weight: torch.Tensor, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared gate derivative, (n_rows, n_groups); a chunk of tokens at a time for the cache."""
    import torch

    weight = weight.unflatten(-1, (-1, 32)).permute(1, 2, 0)  # (n_groups, 32, n_rows)
    total = torch.zeros(weight.shape[0], weight.shape[2], dtype=torch.float32, device=weight.device)
    for inputs, gradients in zip(x.split(CHUNK_TOKENS), delta.split(CHUNK_TOKENS), strict=True):
        groups = inputs.unflatten(-1, (-1, 32)).transpose(0, 1)  # (n_groups, n_tokens, 32)
        # In place: of the largest layers of an 8B model this is half a GB.
        total += torch.bmm(groups, weight).mul_(gradients).square_().sum(1, dtype=torch.float32)
    return total.T
