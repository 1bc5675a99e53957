"""Both answers of a contrast behind one copy of their prompt, so that the prompt is evaluated once.

A row is [prompt, positive answer, negative answer]. The negative answer does not see the positive one (attention mask)
and continues the prompt's positions, so its log-probabilities and gradients are those of a sequence of its own. The
prompt's last position predicts the first token of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from persona_edge.encoding import EncodedText
from persona_edge.errors import CalibrationError
from persona_edge.modeling import TorchModel, text_config

if TYPE_CHECKING:
    import torch

__all__ = ["ContrastPair", "PackedPairs", "contrast_batches", "pack_pairs", "packed_logits"]

ContrastPair = tuple[EncodedText, EncodedText]
SIDES: tuple[Literal["positive"], Literal["negative"]] = ("positive", "negative")


@dataclass(frozen=True)
class PackedPairs:
    """A batch of `n_pairs` rows of `n_tokens`, padded at the right.

    `tokens`, `position_ids` (n_pairs, n_tokens) int64; `visible` (n_pairs, 1, n_tokens, n_tokens) bool, query by key.
    Every prediction that counts is one entry of `rows`, `positions` (what predicts), `targets` (the token predicted),
    `is_positive` (which answer) and `shares` (1 / the answer's length), all (n_scored,).
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    is_positive: torch.Tensor
    shares: torch.Tensor


def contrast_batches(pairs: Sequence[ContrastPair], *, max_tokens: int) -> list[list[ContrastPair]]:
    """Pairs of similar length together, each batch at most `max_tokens` when packed (or one pair), in a fixed order."""
    groups: list[list[ContrastPair]] = []
    for pair in sorted(pairs, key=lambda pair: (-_packed_length(pair), pair[0].item)):
        if groups and (len(groups[-1]) + 1) * _packed_length(groups[-1][0]) <= max_tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _packed_length(pair: ContrastPair) -> int:
    return len(pair[0].tokens) + pair[1].n_scored


def pack_pairs(pairs: Sequence[ContrastPair], device: torch.device | str) -> PackedPairs:
    """Pack a batch; CalibrationError when there is none, or when a pair's answers do not follow the same prompt."""
    import torch

    if not pairs:
        raise CalibrationError("no contrasts to calibrate on")
    n_tokens = max(map(_packed_length, pairs))
    tokens = torch.zeros(len(pairs), n_tokens, dtype=torch.int64)
    position_ids = torch.zeros_like(tokens)
    # Padding sees itself: a row that sees nothing would be NaN.
    visible = torch.eye(n_tokens, dtype=torch.bool).repeat(len(pairs), 1, 1, 1)
    scored: list[tuple[int, int, int, bool, float]] = []
    for row, (positive, negative) in enumerate(pairs):
        n_prompt = len(positive.tokens) - positive.n_scored
        if negative.tokens[: len(negative.tokens) - negative.n_scored] != positive.tokens[:n_prompt]:
            raise CalibrationError("the two answers of a contrast must follow the same prompt")
        start, end = len(positive.tokens), len(positive.tokens) + negative.n_scored
        answers = (positive.tokens[n_prompt:], negative.tokens[n_prompt:])
        tokens[row, :end] = torch.tensor((*positive.tokens, *answers[1]))
        position_ids[row, :end] = torch.cat([torch.arange(start), torch.arange(n_prompt, n_prompt + end - start)])
        visible[row, 0, :end, :end] = torch.ones(end, end, dtype=torch.bool).tril()
        visible[row, 0, start:end, n_prompt:start] = False
        for is_positive, first, answer in zip((True, False), (n_prompt, start), answers, strict=True):
            before = [n_prompt - 1, *range(first, first + len(answer) - 1)]
            scored += [(row, at, t, is_positive, 1 / len(answer)) for at, t in zip(before, answer, strict=True)]
    rows, positions, targets, sides, shares = zip(*scored, strict=True)
    return PackedPairs(
        tokens.to(device),
        position_ids.to(device),
        visible.to(device),
        torch.tensor(rows, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(sides, device=device),
        torch.tensor(shares, device=device),
    )


def packed_logits(model: TorchModel, batch: PackedPairs, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of every prediction that counts, (n_scored, n_vocab) float32; `inputs_embeds` replaces the embedding.

    Records a graph unless called under torch.no_grad().
    """
    import torch

    columns, column_of = torch.unique(batch.positions, return_inverse=True)
    inputs = {"input_ids": batch.tokens} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    output = model.model(
        **inputs,
        attention_mask=_attention_masks(model, batch),
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=columns,
    )
    logits: torch.Tensor = output.logits[batch.rows, column_of].float()
    return logits


def _attention_masks(model: TorchModel, batch: PackedPairs) -> torch.Tensor | dict[str, torch.Tensor]:
    """What is added to attention scores; by kind of layer for a model of which some see only a sliding window.

    transformers takes a mask of four dimensions as it comes, so that the window has to be in it.
    """
    import torch

    dtype = model.layers[0].module.weight.dtype

    def additive(visible: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zeros.masked_fill_(~visible, torch.finfo(dtype).min)

    config = text_config(model.model.config)
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if window is None or kinds == {"full_attention"}:
        return additive(batch.visible)
    distance = batch.position_ids[:, None, :, None] - batch.position_ids[:, None, None, :]
    sliding = additive(batch.visible & (distance < window))
    return {"full_attention": additive(batch.visible), "sliding_attention": sliding} if kinds else sliding
