"""Answers from the torch model: sampled, in batches, reproducible by seed. The runtime generates its own way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from persona_edge.denormals import denormals_flushed
from persona_edge.encoding import prompt_tokens
from persona_edge.modeling import TorchModel

if TYPE_CHECKING:
    import torch

__all__ = ["answer", "complete_together", "continue_together"]

PROMPTS_AT_ONCE = 16


def answer(
    model: TorchModel,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """One answer per prompt, in order; `temperature` 0 decodes greedily. Special tokens are left out."""
    answers: list[str] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        if progress is not None:
            progress("neutral answers", start, len(prompts))
        part = [prompt_tokens(model.tokenizer, prompt, None) for prompt in prompts[start : start + PROMPTS_AT_ONCE]]
        answers += complete_together(model, part, max_tokens=max_tokens, temperature=temperature, seed=seed + start)
    if progress is not None:
        progress("neutral answers", len(prompts), len(prompts))
    return answers


def complete_together(
    model: TorchModel, encoded: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """What follows each of the token sequences, evaluated as one batch; `temperature` 0 decodes greedily."""
    found = continue_together(model, encoded, max_tokens=max_tokens, temperature=temperature, seed=seed)
    return [str(model.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in found]


@denormals_flushed()
def continue_together(
    model: TorchModel,
    encoded: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """The tokens that follow each of the token sequences, up to the one that ends them, if it comes.

    Without a `repetition_penalty`, greedy decoding has none and sampling has the model's own.
    """
    import torch

    longest = max(len(tokens) for tokens in encoded)
    # Left padding, so that every answer begins at the same position.
    tokens = torch.tensor([[0] * (longest - len(t)) + [*t] for t in encoded], device=model.device)
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in encoded], device=model.device)
    greedy = {"do_sample": False, "repetition_penalty": 1.0}
    options = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else greedy
    if repetition_penalty is not None:
        options = {**options, "repetition_penalty": repetition_penalty}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _in_one_piece(model):
        torch.manual_seed(seed)
        output = model.model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=max_tokens, pad_token_id=_pad_token(model), **options
        )
    ends = _end_tokens(model)
    rows = (row[longest:].tolist() for row in output)
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


@contextmanager
def _in_one_piece(model: TorchModel) -> Iterator[None]:
    """While open, the output layer gets the last tokens' hidden states copied together instead of a view into all.

    For a view, torch multiplies each batch item by a copy of the layer's own: 32 x 272 MB, and more than
    half of the time, in Qwen2.5-0.5B.
    """

    def together(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.contiguous() for tensor in inputs)

    hook = model.model.get_output_embeddings().register_forward_pre_hook(together)
    try:
        yield
    finally:
        hook.remove()


def _end_tokens(model: TorchModel) -> frozenset[int]:
    """What ends an answer, by the model or by its tokenizer; after it comes only what fills up a batch."""
    ends = model.model.generation_config.eos_token_id
    several = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*several, model.tokenizer.eos_token_id) if token is not None)


def _pad_token(model: TorchModel) -> int:
    end = model.tokenizer.eos_token_id
    return int(end) if isinstance(end, int) else 0
