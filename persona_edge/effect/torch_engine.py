"""The PyTorch engine: texts scored in batches, with logits only where they count and one copy of a shared beginning.

Results do not depend on what else is in a batch, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from persona_edge.denormals import denormals_flushed
from persona_edge.effect.interfaces import ChatMessage, EngineName
from persona_edge.encoding import EncodedText, batches, message_tokens, pad
from persona_edge.errors import GenerationError
from persona_edge.forward import scored_logits, scored_targets
from persona_edge.generate import PROMPTS_AT_ONCE, complete_together
from persona_edge.machine import release_freed_memory
from persona_edge.modeling import TorchModel
from persona_edge.packed_pairs import pack_rows, packed_logits

if TYPE_CHECKING:
    import torch

__all__ = ["TorchEngine"]

LOGITS_AT_ONCE = 48 << 20  # floats: bounds the memory of a batch whose tokens are all scored
ROWS_AT_ONCE = 256  # of logits, where a copy of them is needed
Floats = NDArray[np.float64]
Beginning = tuple[int, ...]


class TorchEngine:
    """`model` as it stands; arms edit `model` itself."""

    name: ClassVar[EngineName] = "pytorch"

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        n_vocab = int(model.model.get_input_embeddings().weight.shape[0])
        self._max_tokens = min(2048, max(256, LOGITS_AT_ONCE // n_vocab))

    def chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Tokens of the messages in the model's template, or in a plain one, up to where the answer begins."""
        return message_tokens(self.model.tokenizer, messages)

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of plain text without any special token added."""
        return list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def start_tokens(self) -> list[int]:
        """BOS where the model wants one, else nothing."""
        return list(self.model.tokenizer("")["input_ids"])

    def log_probabilities(self, texts: Sequence[EncodedText]) -> list[Floats]:
        """Log-probability of every scored token, (n_scored,) each, in the order of `texts`.

        Raises GenerationError when the model computes no numbers.
        """
        found = [np.empty(0)] * len(texts)
        alone, shared = _by_beginning(texts)
        for batch in batches(alone, max_tokens=self._max_tokens, device=self.model.device):
            with _inference():
                values = _log_p(scored_logits(self.model, batch), scored_targets(batch))
            _hand_out(values, batch.items, texts, found)
        for group in _batches_of_rows(shared, texts, self._max_tokens):
            rows = [(beginning, [texts[i].tokens[len(beginning) :] for i in items]) for beginning, items in group]
            with _inference():
                packed = pack_rows(rows, self.model.device)
                values = _log_p(packed_logits(self.model, packed), packed.targets)
            _hand_out(values, [i for _, items in group for i in items], texts, found)
        release_freed_memory()
        return found

    def distributions(self, texts: Sequence[EncodedText]) -> Iterator[NDArray[np.float32]]:
        """Log-probabilities over the vocabulary at every scored token, (n_scored, n_vocab), one text at a time."""
        for group in _neighbours(texts, self._max_tokens):
            batch = pad(group, self.model.device)
            with _inference():
                log_p = scored_logits(self.model, batch).log_softmax(-1).cpu().numpy()
            yield from np.split(log_p, np.cumsum([text.n_scored for text in group])[:-1])
        release_freed_memory()

    def generate(self, conversations: Sequence[Sequence[ChatMessage]], *, max_tokens: int) -> list[str]:
        """Greedy answers without repetition penalty, in the order of `conversations`."""
        encoded = [self.chat_tokens(messages) for messages in conversations]
        answers = [""] * len(encoded)
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
        for start in range(0, len(order), PROMPTS_AT_ONCE):
            part = order[start : start + PROMPTS_AT_ONCE]
            texts = complete_together(self.model, [encoded[i] for i in part], max_tokens=max_tokens)
            for i, text in zip(part, texts, strict=True):
                answers[i] = text
        release_freed_memory()
        return answers


@contextmanager
def _inference() -> Iterator[None]:
    import torch

    with torch.no_grad(), denormals_flushed():
        yield


def _by_beginning(texts: Sequence[EncodedText]) -> tuple[list[EncodedText], dict[Beginning, list[int]]]:
    """Texts that share their unscored beginning with no other, numbered by `item`; and the numbers of the others."""
    numbers: dict[Beginning, list[int]] = {}
    for i, text in enumerate(texts):
        if text.n_scored:
            numbers.setdefault(text.tokens[: -text.n_scored], []).append(i)
    alone = [replace(texts[found[0]], item=found[0]) for found in numbers.values() if len(found) == 1]
    return alone, {beginning: found for beginning, found in numbers.items() if len(found) > 1}


def _batches_of_rows(
    shared: dict[Beginning, list[int]], texts: Sequence[EncodedText], max_tokens: int
) -> Iterator[list[tuple[Beginning, list[int]]]]:
    """Beginnings with all their endings, of similar length together, each batch within `max_tokens` or one row."""

    def length(row: tuple[Beginning, list[int]]) -> int:
        return len(row[0]) + sum(texts[i].n_scored for i in row[1])

    group: list[tuple[Beginning, list[int]]] = []
    for row in sorted(_rows(shared, texts, max_tokens), key=lambda row: (-length(row), row[1])):
        if group and (len(group) + 1) * length(group[0]) > max_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _rows(
    shared: dict[Beginning, list[int]], texts: Sequence[EncodedText], max_tokens: int
) -> Iterator[tuple[Beginning, list[int]]]:
    """The beginnings, again for every so many endings where these would make a row longer than `max_tokens`."""
    for beginning, items in shared.items():
        part: list[int] = []
        room = max_tokens - len(beginning)
        for i in items:
            if part and texts[i].n_scored > room:
                yield beginning, part
                part, room = [], max_tokens - len(beginning)
            part.append(i)
            room -= texts[i].n_scored
        yield beginning, part


def _neighbours(texts: Sequence[EncodedText], max_tokens: int) -> Iterator[list[EncodedText]]:
    """Runs of `texts` in their order, each within `max_tokens` when padded, or one text."""
    group: list[EncodedText] = []
    for text in texts:
        longest = max(len(t.tokens) for t in [*group, text])
        if group and (len(group) + 1) * longest > max_tokens:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _log_p(logits: torch.Tensor, targets: torch.Tensor) -> Floats:
    """Log-probabilities of `targets` (n,) under `logits` (n, n_vocab)."""
    import torch

    parts = zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    values = [part.gather(-1, wanted[:, None])[:, 0].double() - part.logsumexp(-1).double() for part, wanted in parts]
    found: Floats = torch.cat(values).cpu().numpy()
    if np.isnan(found).any():
        raise GenerationError("the model computes no numbers any more (NaN); make the arm weaker")
    return found


def _hand_out(values: Floats, items: Sequence[int], texts: Sequence[EncodedText], found: list[Floats]) -> None:
    """Writes into `found` each item's part of `values`, which come item by item."""
    start = 0
    for i in items:
        found[i] = values[start : start + texts[i].n_scored]
        start += texts[i].n_scored
