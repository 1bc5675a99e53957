"""Which tokens count, and that batches hold every text once, padded and within their limit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_edge.contrasts import Contrast
from persona_edge.encoding import (
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    EncodedText,
    batches,
    encode_chat,
    encode_contrast,
    encode_text,
    pad,
)
from persona_edge.errors import CalibrationError
from tests.tiny_models import tokenizer


def text_of(length: int, n_scored: int, item: int = 0) -> EncodedText:
    return EncodedText(tuple(range(1, length + 1)), n_scored, item)


def test_a_chat_counts_the_answer_and_nothing_of_the_prompt() -> None:
    encoded = encode_chat(tokenizer(), "How are you?", "Quite well.", item=7)
    n = encoded.n_scored
    assert tokenizer().decode(encoded.tokens[-n:]) == "Quite well."
    assert (
        tokenizer().decode(encoded.tokens[:-n]) == "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoded.item == 7


def test_a_system_prompt_comes_before_the_question() -> None:
    encoded = encode_chat(tokenizer(), "How are you?", "Well.", system="Be brief.")
    assert tokenizer().decode(encoded.tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_a_tokenizer_without_a_template_gets_a_plain_one() -> None:
    plain = copy.deepcopy(tokenizer())
    plain.chat_template = None
    encoded = encode_chat(plain, "How are you?", " Well.", system="Be brief.")
    assert plain.decode(encoded.tokens) == "Be brief.\n\nUser: How are you?\nAssistant: Well."


def test_long_prompts_lose_their_beginning_and_long_answers_their_end() -> None:
    encoded = encode_chat(tokenizer(), "first" + " x" * 600 + " last", "begin" + " y" * 600 + " end")
    assert len(encoded.tokens) == MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS
    assert encoded.n_scored == MAX_RESPONSE_TOKENS
    prompt = tokenizer().decode(encoded.tokens[:MAX_PROMPT_TOKENS])
    assert prompt.endswith(" last<|im_end|>\n<|im_start|>assistant\n")
    assert "first" not in prompt
    assert tokenizer().decode(encoded.tokens[MAX_PROMPT_TOKENS:]).startswith("begin y")


def test_an_answer_without_tokens_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no tokens"):
        encode_chat(tokenizer(), "How are you?", "")


def test_a_contrast_shares_its_prompt() -> None:
    positive, negative = encode_contrast(tokenizer(), Contrast("Who?", "All of us.", "Me."), 3)
    assert positive.tokens[: -positive.n_scored] == negative.tokens[: -negative.n_scored]
    assert tokenizer().decode(negative.tokens[-negative.n_scored :]) == "Me."
    assert positive.item == negative.item == 3


def test_running_text_counts_all_but_its_first_token() -> None:
    text = "The river rises in the hills and reaches the sea."
    whole = encode_text(tokenizer(), text, max_tokens=100)
    assert whole.n_scored == len(whole.tokens) - 1
    assert encode_text(tokenizer(), text, max_tokens=5).tokens == whole.tokens[:5]
    assert encode_text(tokenizer(), "", max_tokens=5) == EncodedText((), 0)


@pytest.mark.parametrize(("length", "n_scored"), [(3, 3), (0, 1), (3, -1)])
def test_the_first_token_is_never_scored(length: int, n_scored: int) -> None:
    with pytest.raises(ValueError, match="cannot be scored"):
        text_of(length, n_scored)


def test_padding_on_the_right_scores_the_predictions_of_the_last_tokens() -> None:
    batch = pad([text_of(2, 1, 5), text_of(4, 3, 6), text_of(3, 1, 7), text_of(1, 0, 8)], "cpu")
    assert batch.tokens.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [1, 2, 3, 0], [1, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.scored.tolist() == [[1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert batch.items == (5, 6, 7, 8)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 120))
def test_batches_hold_every_text_once_within_the_limit(lengths: list[int], max_tokens: int) -> None:
    texts = [text_of(length, length - 1, i) for i, length in enumerate(lengths)]
    found = list(batches(texts, max_tokens=max_tokens, device="cpu"))
    assert sorted(i for batch in found for i in batch.items) == list(range(len(texts)))
    assert all(batch.tokens.numel() <= max_tokens or len(batch.items) == 1 for batch in found)
    for batch in found:
        for row, item in enumerate(batch.items):
            assert tuple(batch.tokens[row][batch.attention_mask[row].bool()].tolist()) == texts[item].tokens
            assert int(batch.scored[row].sum()) == texts[item].n_scored
    repeated = batches(texts, max_tokens=max_tokens, device="cpu")
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, repeated, strict=True))
