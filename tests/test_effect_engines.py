"""Both engines say what one plain forward pass per text says, whatever is batched, shared or kept in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_edge.effect import torch_engine
from persona_edge.effect.interfaces import ChatMessage, Engine, user_message
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.encoding import EncodedText
from persona_edge.errors import GenerationError, InputError, ModelMismatchError
from persona_edge.modeling import TorchModel
from persona_edge.runtime import llama_backend
from persona_edge.runtime.persona_session import PersonaSession
from tests import tiny_chat
from tests.tiny_models import (
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
)

CONVERSATION = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="Who are you?"),
    ChatMessage(role="assistant", content="A friend."),
    ChatMessage(role="user", content="What do you do on a free evening?"),
]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny"), request.param))


@pytest.fixture
def engine(model: TorchModel) -> TorchEngine:
    return TorchEngine(model)


@pytest.fixture(scope="module")
def runtime_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuntimeEngine]:
    path = tiny_chat.write_model(tmp_path_factory.mktemp("chat") / "tiny.gguf")
    with RuntimeEngine.open(path, n_ctx=400, n_threads=1) as engine:
        yield engine


def texts(engine: Engine, *, longest: int = 60) -> list[EncodedText]:
    """Endings that share a beginning, with and without neighbours; one of all but its first token; an unscored one."""
    long = engine.text_tokens("The river rises in the hills, runs past the old mill and reaches the sea. " * 3)[
        :longest
    ]
    prompt = engine.chat_tokens(user_message("What now?"))
    other = engine.chat_tokens(user_message("What was it that you saw on the way to the river?"))
    answers = [engine.text_tokens(text) for text in ("Nothing at all.", "A book!", "Wait and see, then decide.", "A")]
    found = [EncodedText((*prompt, *answer), len(answer)) for answer in answers]
    found.insert(1, EncodedText((*other, *answers[0]), len(answers[0])))
    return [*found, EncodedText(tuple(long), len(long) - 1), EncodedText(tuple(long), 0), found[0]]


def one_by_one(model: TorchModel, text: EncodedText) -> np.ndarray:
    """Log-probabilities over the vocabulary of the scored tokens, (n_scored, n_vocab)."""
    with torch.no_grad():
        logits = model.model(torch.tensor([text.tokens])).logits[0].double()
    end = len(text.tokens) - 1
    return np.asarray(logits.log_softmax(-1)[end - text.n_scored : end].numpy())


def targets(text: EncodedText) -> np.ndarray:
    return np.array(text.tokens[len(text.tokens) - text.n_scored :], dtype=np.int64)


# PyTorch


@pytest.mark.parametrize("max_tokens", [1, 64, 2048])
def test_scores_are_those_of_one_forward_pass_per_text(engine: TorchEngine, max_tokens: int) -> None:
    engine._max_tokens = max_tokens
    given = texts(engine)
    for text, found in zip(given, engine.log_probabilities(given), strict=True):
        expected = one_by_one(engine.model, text)[np.arange(text.n_scored), targets(text)]
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert engine.log_probabilities([]) == []


@pytest.mark.parametrize("max_tokens", [1, 64, 2048])
def test_distributions_are_those_of_one_forward_pass_per_text(engine: TorchEngine, max_tokens: int) -> None:
    engine._max_tokens = max_tokens
    given = texts(engine)
    for text, found in zip(given, engine.distributions(given), strict=True):
        np.testing.assert_allclose(found, one_by_one(engine.model, text), atol=2e-5)
    assert list(engine.distributions([])) == []


def test_endings_too_many_for_one_row_share_several(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "ROWS_AT_ONCE", 3)
    prompt = engine.chat_tokens(user_message("What now?"))
    given = [EncodedText((*prompt, *range(20, 20 + n)), n) for n in (9, 4, 7, 1, 5)]
    engine._max_tokens = len(prompt) + 12
    for text, found in zip(given, engine.log_probabilities(given), strict=True):
        expected = one_by_one(engine.model, text)[np.arange(text.n_scored), targets(text)]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_chat_tokens_follow_the_template_and_text_tokens_are_bare(engine: TorchEngine) -> None:
    decode = engine.model.tokenizer.decode
    assert decode(engine.chat_tokens(CONVERSATION)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\nA friend.<|im_end|>\n"
        "<|im_start|>user\nWhat do you do on a free evening?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert decode(engine.text_tokens(" a book")) == " a book"
    assert engine.start_tokens() == []


def test_generation_is_greedy_and_in_order(engine: TorchEngine) -> None:
    conversations = [CONVERSATION, *(user_message(f"{'Really, ' * i}why?") for i in range(18))]
    answers = engine.generate(conversations, max_tokens=6)
    model = engine.model
    for messages, answer in zip(conversations, answers, strict=True):
        tokens = engine.chat_tokens(messages)
        n_prompt = len(tokens)
        with torch.no_grad():
            while len(tokens) < n_prompt + 6 and tokens[-1] != model.tokenizer.eos_token_id:
                tokens.append(int(model.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert answer == model.tokenizer.decode(tokens[n_prompt:], skip_special_tokens=True)


def test_a_model_that_computes_no_numbers_is_an_error(engine: TorchEngine) -> None:
    weight = engine.model.layers[0].module.weight
    before = weight.detach().clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(GenerationError, match="no numbers"):
            engine.log_probabilities(texts(engine))
    finally:
        weight.data.copy_(before)


# The runtime


def whole(runtime: PersonaSession, text: EncodedText) -> np.ndarray:
    """The same as `one_by_one`, from logits at every position."""
    end = len(text.tokens) - 1
    logits = torch.from_numpy(runtime.logits(text.tokens)).double()
    return np.asarray(logits.log_softmax(-1)[end - text.n_scored : end].numpy())


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_backend, "_BATCH", 32)
    monkeypatch.setattr(llama_backend, "_LOGITS_BATCH", 16)


@pytest.mark.usefixtures("small_batches")
def test_the_runtime_scores_what_its_logits_say(runtime_engine: RuntimeEngine) -> None:
    given = texts(runtime_engine, longest=180)
    pairs = zip(given, runtime_engine.log_probabilities(given), runtime_engine.distributions(given), strict=True)
    for text, found, distribution in pairs:
        expected = whole(runtime_engine.runtime, text)
        # Other batches round the 8-bit inputs of matrix products otherwise.
        assert np.abs(distribution - expected).mean() < 0.02 if text.n_scored else distribution.shape[0] == 0
        np.testing.assert_allclose(np.exp(distribution).sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(found, distribution[np.arange(text.n_scored), targets(text)], atol=1e-5)


@pytest.mark.usefixtures("small_batches")
def test_the_order_of_questions_changes_no_bit(runtime_engine: RuntimeEngine) -> None:
    given = texts(runtime_engine, longest=180)
    runtime = runtime_engine.runtime

    def scores(order: list[int]) -> list[bytes]:
        found = {i: runtime.log_probabilities(given[i].tokens, given[i].n_scored).tobytes() for i in order}
        return [found[i] for i in sorted(found)]

    scored = [i for i, text in enumerate(given) if text.n_scored]
    cold = []
    for i in scored:
        runtime._backend.clear()
        cold += scores([i])
    assert scores(scored) == scores(scored[::-1]) == cold
    runtime_engine.generate([CONVERSATION], max_tokens=40)
    assert scores(scored) == cold


@pytest.mark.usefixtures("small_batches")
def test_a_shared_prompt_is_evaluated_once(runtime_engine: RuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = runtime_engine.runtime._backend
    assert isinstance(backend, llama_backend.LlamaBackend)
    sizes: list[int] = []
    decode = backend._decode

    def spy(chunk: Sequence[int], outputs: range) -> None:
        sizes.append(len(chunk))
        decode(chunk, outputs)

    monkeypatch.setattr(backend, "_decode", spy)
    backend.clear()
    texts = [EncodedText((*range(70), *range(100, 100 + n)), n) for n in (5, 3, 1)]
    runtime_engine.log_probabilities(texts)
    assert sorted(sizes) == sorted([32, 32, 5, 5, 3, 1])


def test_a_text_beyond_the_context_is_refused(runtime_engine: RuntimeEngine) -> None:
    n_ctx = runtime_engine.runtime.n_ctx
    assert len(runtime_engine.log_probabilities([EncodedText((5,) * (n_ctx + 1), 2)])[0]) == 2
    with pytest.raises(InputError, match=f"2 of {n_ctx + 2} tokens cannot be scored"):
        runtime_engine.log_probabilities([EncodedText((5,) * (n_ctx + 2), 2)])
    with pytest.raises(InputError, match="cannot be scored"):
        runtime_engine.runtime.log_probabilities([5, 6], 2)


def test_wearing_a_persona_leaves_nothing_behind(runtime_engine: RuntimeEngine, tmp_path: Path) -> None:
    path = tiny_chat.write_model(tmp_path / "same.gguf")
    personas, given = tiny_chat.personas_for(path), texts(runtime_engine)
    before, digest = runtime_engine.log_probabilities(given), runtime_engine.runtime.weights_digest()
    with runtime_engine.wearing(personas, "INFP"):
        changed = runtime_engine.log_probabilities(given)
    assert not any(np.array_equal(a, b) for a, b in zip(before, changed, strict=True) if len(a))
    assert runtime_engine.runtime.weights_digest() == digest
    after = runtime_engine.log_probabilities(given)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    other = tiny_chat.personas_for(tiny_chat.write_model(tmp_path / "other.gguf", seed=1))
    with pytest.raises(ModelMismatchError), runtime_engine.wearing(other, "INFP"):
        pass


def test_the_runtime_answers_greedily(runtime_engine: RuntimeEngine) -> None:
    first = runtime_engine.generate([CONVERSATION, user_message("Why?")], max_tokens=5)
    assert runtime_engine.generate([user_message("Why?"), CONVERSATION], max_tokens=5) == first[::-1]


@pytest.mark.model
def test_both_engines_agree_on_the_real_model(smollm2_path: Path, smollm2_torch: TorchModel) -> None:
    torch_side = TorchEngine(smollm2_torch)
    with RuntimeEngine.open(smollm2_path, n_ctx=256, n_threads=1) as runtime_side:
        assert runtime_side.chat_tokens(CONVERSATION) == torch_side.chat_tokens(CONVERSATION)
        assert runtime_side.text_tokens(" naïve — yes") == torch_side.text_tokens(" naïve — yes")
        assert runtime_side.start_tokens() == torch_side.start_tokens()
        given = texts(torch_side)
        expected, found = torch_side.log_probabilities(given), runtime_side.log_probabilities(given)
        # The runtime rounds activations to 8 bits: single tokens differ by tenths, means by hundredths.
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(a, b, atol=0.6)
        difference = np.concatenate(expected) - np.concatenate(found)
        assert abs(difference.mean()) < 0.05
        both = zip(torch_side.distributions(given), runtime_side.distributions(given), strict=True)
        kl = np.concatenate([(np.exp(a) * (a - b)).sum(-1) for a, b in both])
        assert kl.mean() < 0.03
        question = [user_message("Name the capital of France.")]
        assert "Paris" in torch_side.generate(question, max_tokens=8)[0]
        assert "Paris" in runtime_side.generate(question, max_tokens=8)[0]
