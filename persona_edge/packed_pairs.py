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

__all__ = [
    "ContrastPair",
    "PackedPairs",
    "PackedRows",
    "contrast_batches",
    "pack_pairs",
    "pack_rows",
    "packed_logits",
    "raw_packed_logits",
]

ContrastPair = tuple[EncodedText, EncodedText]
PromptAndEndings = tuple[Sequence[int], Sequence[Sequence[int]]]
SIDES: tuple[Literal["positive"], Literal["negative"]] = ("positive", "negative")


@dataclass(frozen=True)
class PackedRows:
    """A batch of rows of `n_tokens`, padded at the right, each a prompt with endings that do not see each other.

    `tokens`, `position_ids` (n_rows, n_tokens) int64; `visible` (n_rows, 1, n_tokens, n_tokens) bool, query by key.
    Every prediction that counts is one entry of `rows`, `positions` (what predicts) and `targets` (the token
    predicted), all (n_scored,).
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class PackedPairs(PackedRows):
    """Rows of two endings: `is_positive` says which answer a prediction is in, `shares` is 1 / that answer's length."""

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
    rows = [_prompt_and_answers(pair) for pair in pairs]
    sides, shares = [], []
    for _, answers in rows:
        for is_positive, answer in zip((True, False), answers, strict=True):
            sides += [is_positive] * len(answer)
            shares += [1 / len(answer)] * len(answer)
    packed = pack_rows(rows, device)
    return PackedPairs(
        **vars(packed),
        is_positive=torch.tensor(sides, device=device),
        shares=torch.tensor(shares, device=device),
    )


def _prompt_and_answers(pair: ContrastPair) -> PromptAndEndings:
    positive, negative = pair
    n_prompt = len(positive.tokens) - positive.n_scored
    prompt = positive.tokens[:n_prompt]
    if negative.tokens[: len(negative.tokens) - negative.n_scored] != prompt:
        raise CalibrationError("the two answers of a contrast must follow the same prompt")
    return prompt, (positive.tokens[n_prompt:], negative.tokens[n_prompt:])


def pack_rows(items: Sequence[PromptAndEndings], device: torch.device | str) -> PackedRows:
    """One row per prompt with all its endings; predictions are in the order of rows, endings and tokens."""
    import torch

    n_tokens = max(len(prompt) + sum(map(len, endings)) for prompt, endings in items)
    tokens = torch.zeros(len(items), n_tokens, dtype=torch.int64)
    position_ids = torch.zeros_like(tokens)
    # Padding sees itself: a row that sees nothing would be NaN.
    visible = torch.eye(n_tokens, dtype=torch.bool).repeat(len(items), 1, 1, 1)
    scored: list[tuple[int, int, int]] = []
    for row, (prompt, endings) in enumerate(items):
        n_prompt = start = len(prompt)
        tokens[row, :n_prompt] = torch.tensor(prompt)
        position_ids[row, :n_prompt] = torch.arange(n_prompt)
        visible[row, 0, :n_prompt, :n_prompt] = torch.ones(n_prompt, n_prompt, dtype=torch.bool).tril()
        for ending in endings:
            n, end = len(ending), start + len(ending)
            tokens[row, start:end] = torch.tensor(ending)
            position_ids[row, start:end] = torch.arange(n_prompt, n_prompt + n)
            visible[row, 0, start:end, :n_prompt] = True
            visible[row, 0, start:end, start:end] = torch.ones(n, n, dtype=torch.bool).tril()
            before = [n_prompt - 1, *range(start, end - 1)]
            scored += [(row, at, token) for at, token in zip(before, ending, strict=True)]
            start = end
    rows, positions, targets = (torch.tensor(column, device=device) for column in zip(*scored, strict=True))
    return PackedRows(tokens.to(device), position_ids.to(device), visible.to(device), rows, positions, targets)


def packed_logits(model: TorchModel, batch: PackedRows, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of every prediction that counts, (n_scored, n_vocab) float32; `inputs_embeds` replaces the embedding.

    Records a graph unless called under torch.no_grad().
    """
    return raw_packed_logits(model, batch, inputs_embeds).float()


def raw_packed_logits(model: TorchModel, batch: PackedRows, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """`packed_logits` in the model's own number format, half the size in bfloat16."""
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
    logits: torch.Tensor = output.logits[batch.rows, column_of]
    return logits


def _attention_masks(model: TorchModel, batch: PackedRows) -> torch.Tensor | dict[str, torch.Tensor]:
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
