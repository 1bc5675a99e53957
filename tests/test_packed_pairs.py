"""Two answers behind one prompt say exactly what two sequences of their own say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_edge.encoding import EncodedText
from persona_edge.errors import CalibrationError
from persona_edge.modeling import TorchModel
from persona_edge.packed_pairs import contrast_batches, pack_pairs, packed_logits
from tests.tiny_models import (
    ARCHITECTURES,
    contrast_pairs,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
)


def pair_of(prompt: int, positive: int, negative: int, item: int = 0) -> tuple[EncodedText, EncodedText]:
    before = tuple(range(1, prompt + 1))
    return (
        EncodedText((*before, *range(100, 100 + positive)), positive, item),
        EncodedText((*before, *range(200, 200 + negative)), negative, item),
    )


def test_a_row_holds_the_prompt_once_and_hides_one_answer_from_the_other() -> None:
    batch = pack_pairs([pair_of(2, 1, 2), pair_of(1, 1, 1)], "cpu")
    assert batch.tokens.tolist() == [[1, 2, 100, 200, 201], [1, 100, 200, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 1, 0, 0]]
    assert batch.visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert batch.visible[1, 0, 3:].int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    scored = zip(batch.rows.tolist(), batch.positions.tolist(), batch.targets.tolist(), strict=True)
    assert list(scored) == [(0, 1, 100), (0, 1, 200), (0, 3, 201), (1, 0, 100), (1, 0, 200)]
    assert batch.is_positive.tolist() == [True, False, False, True, False]
    assert batch.shares.tolist() == [1, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logits_are_those_of_separate_sequences(architecture: str, tmp_path: Path) -> None:
    model = load(save_folder(tmp_path, architecture))
    pairs = contrast_pairs(model, 5)
    batch = pack_pairs(pairs, model.device)
    with torch.no_grad():
        packed = packed_logits(model, batch)
        for row, pair in enumerate(pairs):
            for is_positive, text in zip((True, False), pair, strict=True):
                chosen = (batch.rows == row) & (batch.is_positive == is_positive)
                assert tuple(batch.targets[chosen].tolist()) == text.tokens[-text.n_scored :]
                torch.testing.assert_close(packed[chosen], alone(model, text), rtol=1e-4, atol=1e-4)


def alone(model: TorchModel, text: EncodedText) -> torch.Tensor:
    logits: torch.Tensor = model.model(input_ids=torch.tensor([text.tokens])).logits[0, -1 - text.n_scored : -1]
    return logits


def test_answers_after_different_prompts_are_no_pair() -> None:
    (positive, _), (_, negative) = pair_of(2, 1, 1), pair_of(3, 1, 1)
    with pytest.raises(CalibrationError, match="same prompt"):
        pack_pairs([(positive, negative)], "cpu")


@given(st.lists(st.tuples(*[st.integers(1, 20)] * 3), max_size=20), st.integers(3, 200))
def test_batches_hold_every_contrast_once_within_the_limit(
    lengths: list[tuple[int, int, int]], max_tokens: int
) -> None:
    pairs = [pair_of(*each, item=i) for i, each in enumerate(lengths)]
    found = contrast_batches(pairs, max_tokens=max_tokens)
    assert sorted((pair for group in found for pair in group), key=lambda pair: pair[0].item) == pairs
    assert all(pack_pairs(group, "cpu").tokens.numel() <= max_tokens or len(group) == 1 for group in found)
