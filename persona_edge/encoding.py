"""Text to tokens: chat template, which tokens count, and batches of similar length.

A token is *scored* when its log-probability counts; prompts and padding are context only. Everything downstream
(margins, drift, perplexity) is a sum over scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_edge.contrasts import Contrast
from persona_edge.errors import CalibrationError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Batch",
    "EncodedText",
    "batches",
    "encode_chat",
    "encode_contrast",
    "encode_text",
    "message_tokens",
    "pad",
    "prompt_tokens",
]

MAX_PROMPT_TOKENS = 384
MAX_RESPONSE_TOKENS = 192


@dataclass(frozen=True)
class EncodedText:
    """Token ids, of which the last `n_scored` count. `item` says which contrast or prompt it came from.

    The first token is never scored, as nothing predicts it: ValueError otherwise.
    """

    tokens: tuple[int, ...]
    n_scored: int
    item: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.n_scored <= max(len(self.tokens) - 1, 0):
            raise ValueError(f"{self.n_scored} of {len(self.tokens)} tokens cannot be scored")


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences.

    `tokens`, `attention_mask` (n_sequences, n_tokens) int64; `scored` (n_sequences, n_tokens - 1) float32, 1 where the
    prediction of the *next* token counts; `items` as in EncodedText.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    scored: torch.Tensor
    items: tuple[int, ...]


def encode_chat(tokenizer: Any, prompt: str, response: str, *, item: int = 0, system: str | None = None) -> EncodedText:
    """`prompt` in the model's chat template, then `response`, of which every token counts.

    A tokenizer without a template gets a plain one. Prompts lose their beginning beyond MAX_PROMPT_TOKENS and responses
    their end beyond MAX_RESPONSE_TOKENS. Raises CalibrationError when the response has no token.
    """
    before = prompt_tokens(tokenizer, prompt, system)[-MAX_PROMPT_TOKENS:]
    answer = tokenizer(response, add_special_tokens=False)["input_ids"][:MAX_RESPONSE_TOKENS]
    if not answer:
        raise CalibrationError(f"the response {response!r} has no tokens")
    return EncodedText((*before, *answer), len(answer), item)


def prompt_tokens(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    """Tokens of one question, after `system` if given, up to where the answer begins."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return message_tokens(tokenizer, [*messages, {"role": "user", "content": prompt}])


def message_tokens(tokenizer: Any, messages: Sequence[Mapping[str, object]]) -> list[int]:
    """Tokens of a conversation in the model's chat template, or in a plain one, up to where the answer begins."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    speakers = {"user": "User: {}\n", "assistant": "Assistant: {}\n"}
    turns = [speakers.get(str(message["role"]), "{}\n\n").format(message["content"]) for message in messages]
    return list(tokenizer("".join(turns) + "Assistant:")["input_ids"])


def encode_contrast(tokenizer: Any, contrast: Contrast, item: int) -> tuple[EncodedText, EncodedText]:
    """The positive and the negative answer of a contrast, each after the same prompt."""
    positive = encode_chat(tokenizer, contrast.prompt, contrast.positive, item=item)
    return positive, encode_chat(tokenizer, contrast.prompt, contrast.negative, item=item)


def encode_text(tokenizer: Any, text: str, *, max_tokens: int, item: int = 0) -> EncodedText:
    """Running text, cut to `max_tokens`; every token but the first counts. Begins with BOS where the model has one."""
    tokens = list(tokenizer(text)["input_ids"])[:max_tokens]
    return EncodedText(tuple(tokens), max(len(tokens) - 1, 0), item)


def batches(texts: Sequence[EncodedText], *, max_tokens: int, device: torch.device | str) -> Iterator[Batch]:
    """Padded batches of at most `max_tokens` (or one sequence): similar lengths together, in a fixed order."""
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].tokens), i))
    group: list[EncodedText] = []
    for i in order:
        longest = len(group[0].tokens) if group else len(texts[i].tokens)
        if group and (len(group) + 1) * longest > max_tokens:
            yield pad(group, device)
            group = []
        group.append(texts[i])
    if group:
        yield pad(group, device)


def pad(texts: Sequence[EncodedText], device: torch.device | str) -> Batch:
    """Right-pad `texts` with token 0 to the longest of them."""
    import torch

    n_tokens = max(len(text.tokens) for text in texts)
    tokens = torch.zeros(len(texts), n_tokens, dtype=torch.int64)
    mask = torch.zeros(len(texts), n_tokens, dtype=torch.int64)
    scored = torch.zeros(len(texts), n_tokens - 1)
    for row, text in enumerate(texts):
        end = len(text.tokens)
        tokens[row, :end] = torch.tensor(text.tokens)
        mask[row, :end] = 1
        scored[row, end - 1 - text.n_scored : end - 1] = 1
    return Batch(tokens.to(device), mask.to(device), scored.to(device), tuple(text.item for text in texts))
