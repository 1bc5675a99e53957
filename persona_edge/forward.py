"""One forward pass, with logits only where they are scored: the output layer is a fifth of a small model's work.

With 128,000 words in the vocabulary the logits of a batch are the largest tensor there is, 0.5 GB in float32, and a
softmax with its gradient would hold four more like it. Hence log-probabilities of targets a few rows at a time, with
their gradient worked out again from the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persona_edge.encoding import Batch
from persona_edge.modeling import TorchModel

if TYPE_CHECKING:
    import torch

__all__ = ["ROWS_AT_ONCE", "raw_scored_logits", "scored_logits", "scored_targets", "target_log_probabilities"]

ROWS_AT_ONCE = 64


def scored_logits(model: TorchModel, batch: Batch, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """Logits that predict the scored tokens, (n_scored, n_vocab) float32, row-major over (sequence, position).

    `inputs_embeds` (n_sequences, n_tokens, n_hidden) replaces the embedding of the batch's tokens. Records a graph
    unless called under torch.no_grad().
    """
    return raw_scored_logits(model, batch, inputs_embeds).float()


def raw_scored_logits(model: TorchModel, batch: Batch, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """`scored_logits` in the model's own number format, half the size in bfloat16."""
    scored = batch.scored.bool()
    columns = scored.any(0).nonzero()[:, 0]
    inputs = {"input_ids": batch.tokens} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    output = model.model(**inputs, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=columns)
    logits: torch.Tensor = output.logits[scored[:, columns]]
    return logits


def scored_targets(batch: Batch) -> torch.Tensor:
    """The tokens that `scored_logits` predicts, (n_scored,) int64."""
    return batch.tokens[:, 1:][batch.scored.bool()]


def target_log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[targets], (n,) float32, from logits (n, n_vocab) of any float type and targets (n,).

    Has a first derivative by the logits, in their type: what float32 in between would give.
    """
    import torch

    class Chosen(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(logits, targets)
            parts = zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
            return torch.cat([x.float().log_softmax(-1).gather(-1, own[:, None])[:, 0] for x, own in parts])

        @staticmethod
        def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            logits, targets = context.saved_tensors
            result = torch.empty_like(logits)
            weights = gradients[0][:, None]
            rows = (tensor.split(ROWS_AT_ONCE) for tensor in (result, logits, targets, weights))
            for into, x, own, weight in zip(*rows, strict=True):
                part = x.float().softmax(-1).mul_(-weight)
                into.copy_(part.scatter_add_(-1, own[:, None], weight))
            return result, None

    chosen: torch.Tensor = Chosen.apply(logits, targets)  # type: ignore[no-untyped-call]
    return chosen
