"""One forward pass, with logits only where they are scored: the output layer is a fifth of a small model's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_edge.encoding import Batch
from persona_edge.modeling import TorchModel

if TYPE_CHECKING:
    import torch

__all__ = ["scored_logits", "scored_targets"]


def scored_logits(model: TorchModel, batch: Batch, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """Logits that predict the scored tokens, (n_scored, n_vocab) float32, row-major over (sequence, position).

    `inputs_embeds` (n_sequences, n_tokens, n_hidden) replaces the embedding of the batch's tokens. Records a graph
    unless called under torch.no_grad().
    """
    scored = batch.scored.bool()
    columns = scored.any(0).nonzero()[:, 0]
    inputs = {"input_ids": batch.tokens} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    output = model.model(**inputs, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=columns)
    logits: torch.Tensor = output.logits[scored[:, columns]].float()
    return logits


def scored_targets(batch: Batch) -> torch.Tensor:
    """The tokens that `scored_logits` predicts, (n_scored,) int64."""
    return batch.tokens[:, 1:][batch.scored.bool()]
