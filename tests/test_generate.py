"""Batched answers are each prompt's own answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from persona_edge import generate
from persona_edge.encoding import prompt_tokens
from persona_edge.generate import answer, continue_together
from persona_edge.modeling import TorchModel
from tests.tiny_models import (
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
)

PROMPTS = ["Hi!", "What is the quickest way to the river from the old mill?", "Why?", "Who will come tonight?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny")))


def greedy(model: TorchModel, prompt: str, n: int) -> str:
    tokens = prompt_tokens(model.tokenizer, prompt, None)
    found: list[int] = []
    with torch.no_grad():
        while len(found) < n:
            found.append(int(model.model(torch.tensor([tokens + found])).logits[0, -1].argmax()))
            if found[-1] == model.tokenizer.eos_token_id:
                break
    return str(model.tokenizer.decode(found, skip_special_tokens=True))


def test_greedy_answers_ignore_padding_and_company(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert answer(model, PROMPTS, max_tokens=8, temperature=0) == expected
    monkeypatch.setattr(generate, "PROMPTS_AT_ONCE", 3)
    assert answer(model, PROMPTS, max_tokens=8, temperature=0) == expected


def test_sampled_answers_follow_the_seed_and_leave_the_global_generator_alone(model: TorchModel) -> None:
    state = torch.get_rng_state()
    first = answer(model, PROMPTS, max_tokens=8, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert answer(model, PROMPTS, max_tokens=8, seed=4) == first
    assert answer(model, PROMPTS, max_tokens=8, seed=5) != first


def test_continuations_end_before_the_token_that_ends_them(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = [prompt_tokens(model.tokenizer, prompt, None) for prompt in PROMPTS]
    whole = continue_together(model, encoded, max_tokens=12)
    assert [model.tokenizer.decode(tokens) for tokens in whole] == [greedy(model, prompt, 12) for prompt in PROMPTS]
    end = whole[1][5]
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [end, model.tokenizer.eos_token_id])
    cut = continue_together(model, encoded, max_tokens=12)
    assert cut == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]
    assert len(cut[1]) <= 5


def test_a_penalty_keeps_tokens_from_coming_again(model: TorchModel) -> None:
    encoded = [prompt_tokens(model.tokenizer, prompt, None) for prompt in PROMPTS]
    free, held = (
        continue_together(model, encoded, max_tokens=40, repetition_penalty=penalty) for penalty in (None, 50.0)
    )
    assert sum(len(tokens) - len(set(tokens)) for tokens in free) > 10
    assert sum(len(tokens) - len(set(tokens)) for tokens in held) == 0


def test_the_output_layer_is_asked_for_all_last_tokens_in_one_piece(model: TorchModel) -> None:
    head = model.model.get_output_embeddings()
    in_one_piece: list[bool] = []
    hook = head.register_forward_hook(lambda _module, inputs, _output: in_one_piece.append(inputs[0].is_contiguous()))
    encoded = [prompt_tokens(model.tokenizer, prompt, None) for prompt in PROMPTS]
    continue_together(model, encoded, max_tokens=3)
    hook.remove()
    assert len(in_one_piece) == 3
    assert all(in_one_piece)
    assert not head._forward_pre_hooks


def test_progress_counts_prompts(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PROMPTS_AT_ONCE", 3)
    seen: list[tuple[str, int, int]] = []
    answer(model, PROMPTS, max_tokens=1, progress=lambda *call: seen.append(call))
    assert [call[1:] for call in seen] == [(0, 4), (3, 4), (4, 4)]
    assert answer(model, [], max_tokens=1) == []


def test_a_models_own_end_of_text_pads_what_ended(model: TorchModel, tmp_path: Path) -> None:
    answers = answer(model, PROMPTS, max_tokens=40, seed=1)
    assert not any("<|" in text for text in answers)
