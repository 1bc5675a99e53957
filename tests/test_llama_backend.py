"""Tokenizing, evaluating, sampling, what the KV cache keeps: on the real 135M model, and against llama_cpp.Llama."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_edge.errors import GenerationError, InputError
from persona_edge.runtime import llama_backend
from persona_edge.runtime.llama_backend import LlamaBackend, Sampler, default_n_threads
from persona_edge.runtime.llama_weights import LlamaModel, find_tensors
from persona_edge.runtime.values import SamplingOptions

pytestmark = pytest.mark.model

GREEDY = SamplingOptions(temperature=0)
TEXT = "The old lighthouse keeper climbed the stairs every evening, and every evening he counted them. "


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(smollm2_path)
    yield model
    model.close()


@pytest.fixture(scope="module")
def shared(model: LlamaModel) -> Iterator[LlamaBackend]:
    backend = LlamaBackend(model, n_ctx=256, n_threads=1)
    yield backend
    backend.close()


@pytest.fixture
def backend(shared: LlamaBackend) -> LlamaBackend:
    shared.clear()
    return shared


@pytest.fixture
def chunks(backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call to llama.cpp evaluated."""
    seen: list[int] = []
    decode = backend._decode

    def spy(chunk: Sequence[int], outputs: range) -> None:
        seen.append(len(chunk))
        decode(chunk, outputs)

    monkeypatch.setattr(backend, "_decode", spy)
    monkeypatch.setattr(llama_backend, "_BATCH", 32)
    return seen


def tokens_of(backend: LlamaBackend, n: int, text: str = TEXT) -> list[int]:
    tokens = backend.vocabulary.tokenize(text * 40)
    assert len(tokens) >= n
    return tokens[:n]


def last_logits(backend: LlamaBackend) -> np.ndarray:
    row = backend._api.llama_get_logits_ith(backend._handle, -1)
    return np.ctypeslib.as_array(row, (backend.vocabulary.n_tokens,)).copy()


def greedy(backend: LlamaBackend, prompt: list[int], n: int) -> list[int]:
    tokens, ticket = list(prompt), None
    with Sampler(backend, GREEDY) as sampler:
        for _ in range(n):
            ticket = backend.evaluate(tokens, ticket)
            tokens.append(backend.sample(sampler))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("text", ["Hello, world", "naïve 🙂 日本語\n\ttabs", "  two spaces", "nul \0 byte", ""])
def test_tokens_and_back(backend: LlamaBackend, text: str) -> None:
    vocabulary = backend.vocabulary
    tokens = vocabulary.tokenize(text)
    assert vocabulary.detokenize(tokens) == text
    assert b"".join(vocabulary.piece(token) for token in tokens).decode() == text


def test_control_tokens(backend: LlamaBackend) -> None:
    vocabulary = backend.vocabulary
    assert vocabulary.bos_text == "<|im_start|>"
    [start] = vocabulary.tokenize("<|im_start|>")
    assert len(vocabulary.tokenize("<|im_start|>", parse_special=False)) > 1
    assert vocabulary.detokenize([start]) == "<|im_start|>"
    assert vocabulary.piece(start) == b""
    assert vocabulary.is_end(vocabulary.tokenize("<|im_end|>")[0])
    assert not vocabulary.is_end(vocabulary.tokenize("a")[0])


def test_tokens_that_do_not_exist(backend: LlamaBackend) -> None:
    with pytest.raises(InputError, match="token 49152 does not exist; the model's tokens are 0 to 49151"):
        backend.vocabulary.detokenize([49152])
    with pytest.raises(InputError, match="token -1 does not exist"):
        backend.logits([1, -1])


def test_logits_are_those_of_every_position(backend: LlamaBackend) -> None:
    tokens = tokens_of(backend, 150)  # three batches
    logits = backend.logits(tokens)
    assert logits.shape == (150, 49152)
    assert backend.cached_tokens == ()
    for n in (1, 65, 150):
        backend.clear()
        backend.evaluate(tokens[:n])
        # Other batches round otherwise, and quantized activations amplify that; a wrong row would be off by tens.
        assert np.abs(logits[n - 1] - last_logits(backend)).mean() < 0.15
        assert logits[n - 1].argmax() == last_logits(backend).argmax()


def test_logits_repeat_exactly(backend: LlamaBackend) -> None:
    tokens = tokens_of(backend, 40)
    first = backend.logits(tokens)
    greedy(backend, tokens_of(backend, 30, "Something else. "), 3)
    assert np.array_equal(backend.logits(tokens), first)


@pytest.mark.parametrize("n", [0, 257])
def test_logits_of_nothing_or_too_much(backend: LlamaBackend, n: int) -> None:
    with pytest.raises(InputError, match=f"{n} tokens given; logits are computed for 1 to 256"):
        backend.logits([5] * n)


def test_the_same_prompt_gives_the_same_logits_whatever_came_before(backend: LlamaBackend, chunks: list[int]) -> None:
    prompt = tokens_of(backend, 80)
    backend.evaluate(prompt)
    cold = last_logits(backend)
    greedy(backend, prompt, 4)
    greedy(backend, prompt[:70] + prompt[:20], 4)
    n_before = len(chunks)
    backend.evaluate(prompt)
    assert chunks[n_before:] == [16]
    assert np.array_equal(last_logits(backend), cold)


def test_whole_batches_of_a_common_beginning_are_kept(backend: LlamaBackend, chunks: list[int]) -> None:
    prompt = tokens_of(backend, 75)
    backend.evaluate(prompt)
    assert chunks == [32, 32, 11]
    backend.evaluate(prompt[:66] + prompt[:4])
    assert chunks[3:] == [6]
    backend.evaluate(prompt[:38])
    assert chunks[4:] == [6]
    assert list(backend.cached_tokens) == prompt[:38]


def test_a_conversation_goes_on_from_its_reply(backend: LlamaBackend, chunks: list[int]) -> None:
    prompt = tokens_of(backend, 30)
    reply = greedy(backend, prompt, 5)
    assert chunks == [30, 1, 1, 1, 1]
    backend.evaluate(prompt + reply + prompt[:7])
    assert chunks[5:] == [8]  # the last token of the reply was sampled, but not evaluated yet


def test_a_ticket_of_before_a_change_is_worth_nothing(backend: LlamaBackend, chunks: list[int]) -> None:
    prompt = tokens_of(backend, 20)
    ticket = backend.evaluate(prompt)
    backend.clear()
    backend.evaluate([*prompt, 5], ticket)
    assert chunks == [20, 21]


def test_what_cannot_be_evaluated_is_an_error_and_the_next_prompt_works(model: LlamaModel) -> None:
    backend = LlamaBackend(model, n_ctx=256, n_threads=1)
    prompt = tokens_of(backend, 20)
    cold = greedy(backend, prompt, 3)
    with pytest.raises(GenerationError, match="context of 256 tokens has no room for 4 more"):
        backend.evaluate([5] * 260)
    with pytest.raises(GenerationError, match="could not evaluate 1 tokens"):
        backend.evaluate([10**6])
    assert greedy(backend, prompt, 3) == cold
    backend.close()


def test_an_interrupt_between_evaluation_and_bookkeeping(
    backend: LlamaBackend, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens_of(backend, 50)
    cold = greedy(backend, prompt, 3)
    decode = backend._api.llama_decode

    def interrupted(*arguments: object) -> None:
        decode(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend._api, "llama_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.evaluate([*prompt[:40], 5, 6, 7])
    assert list(backend.cached_tokens) == prompt[:32]
    assert greedy(backend, prompt, 3) == cold
    assert chunks[-3:] == [18, 1, 1]


def test_seeds(backend: LlamaBackend) -> None:
    prompt = tokens_of(backend, 20)

    def sampled(seed: int) -> list[int]:
        options = SamplingOptions(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed)
        backend.evaluate(prompt)
        with Sampler(backend, options) as sampler:
            return [backend.sample(sampler) for _ in range(8)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


@pytest.mark.parametrize("options", [SamplingOptions(top_k=1), SamplingOptions(top_p=1e-6), SamplingOptions(min_p=1)])
def test_cutting_the_choice_to_one_is_greedy(backend: LlamaBackend, options: SamplingOptions) -> None:
    backend.evaluate(tokens_of(backend, 20))
    with Sampler(backend, options) as sampler:
        assert {backend.sample(sampler) for _ in range(5)} == {int(last_logits(backend).argmax())}


def test_repeat_penalty_counts_the_prompt(backend: LlamaBackend) -> None:
    prompt = backend.vocabulary.tokenize("one two one two one two one two one")
    options = SamplingOptions(temperature=0, repeat_penalty=10)
    backend.evaluate(prompt)
    with Sampler(backend, GREEDY, prompt) as plain, Sampler(backend, options, prompt) as penalized:
        assert backend.sample(plain) in prompt
        assert backend.sample(penalized) not in prompt


def test_weights_that_compute_no_numbers(model: LlamaModel, backend: LlamaBackend) -> None:
    norm = find_tensors(model)["output_norm.weight"].data.view(np.float32)
    saved = norm.copy()
    try:
        norm[:] = np.nan
        with pytest.raises(GenerationError, match="no numbers any more"):
            greedy(backend, [5, 6], 1)
    finally:
        norm[:] = saved


def test_the_context_is_capped_at_what_the_model_was_trained_for(model: LlamaModel) -> None:
    backend = LlamaBackend(model, n_ctx=1 << 20, n_threads=1)
    assert backend.n_ctx == 8192
    backend.close()


@pytest.mark.parametrize("bad", [{"n_ctx": 0}, {"n_threads": 0}, {"n_threads": -3}])
def test_sizes_below_one(model: LlamaModel, bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        LlamaBackend(model, **bad)


def test_a_closed_backend(model: LlamaModel) -> None:
    backend = LlamaBackend(model, n_ctx=256, n_threads=1)
    backend.close()
    backend.close()
    for use in (lambda: backend.evaluate([5]), lambda: backend.logits([5]), backend.clear):
        with pytest.raises(GenerationError, match="session is closed"):
            use()


def test_threads_by_default() -> None:
    assert 1 <= default_n_threads() <= (os.cpu_count() or 1)


def test_agrees_with_the_stock_high_level_api(smollm2_path: Path, backend: LlamaBackend) -> None:
    """Stock llama-cpp-python maps the file and may repack weights; it must compute the same nonetheless."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists() and "amx_int8" in cpu_info.read_text():
        pytest.skip("stock llama.cpp repacks for AMX, which some virtual machines announce but cannot run")
    from llama_cpp import Llama

    stock = Llama(str(smollm2_path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    try:
        question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        prompt = backend.vocabulary.tokenize(question)
        assert prompt == stock.tokenize(question.encode(), add_bos=False, special=True)
        stock.eval(prompt)
        difference = np.abs(backend.logits(prompt) - stock.scores[: len(prompt)])
        assert difference.mean() < 0.05
        completion: Any = stock.create_completion(prompt, max_tokens=8, temperature=0)
        ours = greedy(backend, prompt, 8)
        ours = ours[: next((i for i, t in enumerate(ours) if backend.vocabulary.is_end(t)), len(ours))]
        assert backend.vocabulary.detokenize(ours) == completion["choices"][0]["text"]
    finally:
        stock.close()
