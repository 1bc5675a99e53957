"""Generating on the real 135M model: greedy and sampled, streamed and whole, with a warm and a full context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import InputError
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import Message, SamplingOptions
from tests.real_chat import GREEDY, QUESTION, STORY

pytestmark = pytest.mark.model


def test_greedy_chat(runtime: PersonaRuntime) -> None:
    completion = runtime.chat(QUESTION, GREEDY)
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"
    assert completion.n_tokens == len(runtime.tokenize(completion.text))
    assert completion.n_prompt_tokens == 36
    assert 0 < completion.seconds_to_first_token < completion.seconds


def test_the_template_is_the_models_own(runtime: PersonaRuntime) -> None:
    tokens, _ = runtime._rendered(QUESTION, GREEDY)
    assert runtime.detokenize(tokens) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(max_tokens=12, seed=5, temperature=1.2)])
def test_a_stream_is_the_text(runtime: PersonaRuntime, options: SamplingOptions) -> None:
    pieces = list(runtime.stream(STORY, options))
    assert len(pieces) > 6
    assert "".join(pieces) == runtime.generate(STORY, options).text
    assert "".join(runtime.stream_chat(QUESTION, options)) == runtime.chat(QUESTION, options).text


def test_seeds(runtime: PersonaRuntime, smollm2_path: Path) -> None:
    wild = SamplingOptions(max_tokens=10, temperature=1.5)
    assert runtime.generate(STORY, replace(wild, seed=1)).text == runtime.generate(STORY, replace(wild, seed=1)).text
    assert runtime.generate(STORY, replace(wild, seed=1)).text != runtime.generate(STORY, replace(wild, seed=2)).text
    sessions = []
    for _ in range(2):
        with PersonaRuntime.open(smollm2_path, n_ctx=256, n_threads=1, seed=7) as session:
            sessions.append([session.generate(STORY, wild).text for _ in range(2)])
    assert sessions[0] == sessions[1]
    assert sessions[0][0] != sessions[0][1]


def test_stop_strings(runtime: PersonaRuntime) -> None:
    text = runtime.generate(STORY, GREEDY).text
    stop = text[len(text) // 2 :][:5]
    stopped = runtime.generate(STORY, replace(GREEDY, stop=(stop, "never said")))
    assert stopped.text == text.partition(stop)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.n_tokens < GREEDY.max_tokens


def test_max_tokens(runtime: PersonaRuntime) -> None:
    completion = runtime.generate(STORY, replace(GREEDY, max_tokens=3))
    assert (completion.n_tokens, completion.finish_reason) == (3, "length")


def test_a_character_of_several_tokens_is_never_cut(runtime: PersonaRuntime) -> None:
    row = "🦙🦜🦚🦙🦜🦚🦙🦜🦚🦙"
    assert any(len(runtime._backend.vocabulary.piece(t).decode("utf-8", "ignore")) == 0 for t in runtime.tokenize(row))
    pieces = list(runtime.stream(row, replace(GREEDY, max_tokens=16)))
    text = "".join(pieces)
    assert set(text) & set(row), "the model goes on with the row of emoji"
    assert "�" not in "".join(pieces[:-1])  # at max_tokens the last character may remain incomplete
    assert all(pieces)


def test_the_same_prompt_from_a_warm_cache_gives_the_cold_text(runtime: PersonaRuntime, cold_text: str) -> None:
    for _ in range(2):
        assert runtime.generate(STORY, GREEDY).text == cold_text
        runtime.chat(QUESTION, GREEDY)


def test_a_conversation_reuses_its_cache(runtime: PersonaRuntime) -> None:
    answer = runtime.chat(QUESTION, GREEDY)
    cached = runtime._backend.cached_tokens
    messages: list[Message] = [*QUESTION, {"role": "assistant", "content": answer.text}, *QUESTION]
    again = runtime.chat(messages, GREEDY)
    assert runtime._backend.cached_tokens[: len(cached)] == cached
    assert again.n_prompt_tokens > answer.n_prompt_tokens


def test_a_full_context_ends_the_text(runtime: PersonaRuntime) -> None:
    room = runtime.n_ctx - 3
    completion = runtime.generate(
        runtime.detokenize(runtime.tokenize("la " * room)[:room]), replace(GREEDY, max_tokens=99)
    )
    assert completion.n_prompt_tokens == room
    assert (completion.n_tokens, completion.finish_reason) == (4, "context")


def test_prompts_that_do_not_fit(runtime: PersonaRuntime) -> None:
    n = len(runtime.tokenize("word " * 300))
    with pytest.raises(InputError, match=f"the prompt has {n} tokens, but the context holds 256; shorten it"):
        runtime.stream("word " * 300)  # before anything is asked of the stream
    with pytest.raises(InputError, match="the prompt is empty"):
        runtime.generate("")
    with pytest.raises(InputError, match="no message to answer"):
        runtime.chat([])


def test_logits(runtime: PersonaRuntime) -> None:
    tokens = runtime.tokenize(STORY)
    base = runtime.logits(tokens)
    assert base.shape == (len(tokens), runtime.n_vocab)
    assert base.dtype == np.float32
    runtime.switch("Aye")
    assert np.abs(runtime.logits(tokens) - base).mean() > 0.1
    runtime.base()
    assert np.array_equal(runtime.logits(tokens), base)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"repeat_penalty": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": "text"},
    ],
)
def test_options_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(bad))} is .*; it must be"):
        SamplingOptions(**bad)  # type: ignore[arg-type]
