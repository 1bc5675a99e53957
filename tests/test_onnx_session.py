"""The runtime object on an ONNX model: talking, switching, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import GenerationError, InputError, ModelMismatchError, PersonaNotFoundError
from persona_edge.exporters.to_onnx import onnx_pack_path
from persona_edge.maskpack import write_pack
from persona_edge.runtime.onnx_session import OnnxRuntime
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import Message, SamplingOptions
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]

QUESTION: list[Message] = [{"role": "user", "content": "A quiet evening with a book?"}]
GREEDY = SamplingOptions(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def pack(tiny_llama: TinyOnnx, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack that was made for the GGUF."""
    path = tmp_path_factory.mktemp("pack") / "tiny.mbti.maskpack"
    write_pack(path, personas_of(tiny_llama.torch))
    return path


@pytest.fixture
def runtime(tiny_llama: TinyOnnx, pack: Path, tiny_onnx_cache: Path) -> Iterator[OnnxRuntime]:
    with OnnxRuntime.open(tiny_llama.folder, pack, n_ctx=128, n_threads=1) as opened:
        yield opened


def test_base_a_b_base_is_bit_identical(runtime: OnnxRuntime) -> None:
    tokens = runtime.tokenize_chat(QUESTION)
    found: dict[str | None, tuple[bytes, str, str]] = {}
    for persona in (None, "E", "I", None, "E"):
        runtime.base() if persona is None else runtime.switch(persona)
        state = (runtime.logits(tokens).tobytes(), runtime.chat(QUESTION, GREEDY).text, runtime.weights_digest())
        assert found.setdefault(persona, state) == state
    assert len({logits for logits, _, _ in found.values()}) == 3


def test_a_switch_reports_and_clears_the_cache(runtime: OnnxRuntime) -> None:
    runtime.chat(QUESTION, GREEDY)
    report = runtime.switch("both", 0.5)
    assert (report.persona, report.strength, runtime.persona) == ("both", 0.5, "both")
    assert report.n_units_written > 0
    assert report.n_bytes_written > 0
    assert runtime._backend.cached_tokens == ()
    runtime.chat(QUESTION, GREEDY)
    assert runtime.last_switch is not None
    assert runtime.last_switch.seconds_to_first_token is not None


def test_streaming_gives_the_same_text_and_continues_after_a_switch(runtime: OnnxRuntime) -> None:
    whole = runtime.chat(QUESTION, GREEDY)
    pieces = runtime.stream_chat(QUESTION, GREEDY)
    assert "".join(pieces) == whole.text
    pieces = runtime.stream_chat(QUESTION, replace(GREEDY, max_tokens=30))
    next(pieces)
    runtime.switch("both")
    assert list(pieces)


def test_the_cache_changes_no_bit(runtime: OnnxRuntime) -> None:
    prompt = runtime.tokenize_chat(QUESTION)
    endings = [runtime.tokenize(text, add_special=False) for text in (" the river", " one good friend", " the sea")]
    one_by_one = []
    for ending in endings:
        runtime._backend.clear()
        one_by_one.append(runtime.log_probabilities(prompt + ending, len(ending)))
    for ending, expected in zip(endings * 2, one_by_one * 2, strict=True):
        assert np.array_equal(runtime.log_probabilities(prompt + ending, len(ending)), expected)


def test_tokens_one_by_one_give_nearly_the_logits_of_all_at_once(runtime: OnnxRuntime) -> None:
    tokens, backend = runtime.tokenize_chat(QUESTION), runtime._backend
    at_once = runtime.logits(tokens)
    backend.clear()
    single = np.stack([next(iter(backend.scored_logits([*tokens[: n + 1], 0], 1)))[0] for n in range(len(tokens))])
    assert np.corrcoef(single.ravel(), at_once.ravel())[0, 1] > 0.999


def test_a_persona_that_returns_finds_its_cache(tiny_llama: TinyOnnx, pack: Path) -> None:
    with OnnxRuntime.open(tiny_llama.folder, pack, n_ctx=128, n_threads=1, kv="snapshot") as model:
        first = {}
        for persona in ("E", "I"):
            model.switch(persona)
            first[persona] = model.chat(QUESTION, GREEDY).text
        model.switch("E")
        assert model._backend.cached_tokens == ()
        longer = model.tokenize_chat(QUESTION)
        assert model.chat(QUESTION, GREEDY).text == first["E"]
        assert model._backend.cached_tokens[: len(longer)] == tuple(longer)
        with OnnxRuntime.open(tiny_llama.folder, pack, n_ctx=128, n_threads=1) as plain:
            plain.switch("E")
            tokens = [*longer, *plain.tokenize(first["E"], add_special=False), 5]
            assert np.allclose(plain.log_probabilities(tokens, 3), model.log_probabilities(tokens, 3), atol=0.2)


def test_where_weights_lie_is_told(runtime: OnnxRuntime) -> None:
    assert not runtime.has_gpu
    assert runtime.placement.is_fallback == bool(runtime.mechanism_notes)
    assert "ONNX Runtime" in runtime.placement.text


def test_a_seed_makes_answers_repeatable(runtime: OnnxRuntime) -> None:
    options = SamplingOptions(max_tokens=12, temperature=1.0, seed=5)
    assert runtime.chat(QUESTION, options).text == runtime.chat(QUESTION, options).text
    assert runtime.chat(QUESTION, options).text != runtime.chat(QUESTION, replace(options, seed=6)).text


def test_a_stop_string_ends_the_text(runtime: OnnxRuntime) -> None:
    text = runtime.chat(QUESTION, GREEDY).text
    done = runtime.chat(QUESTION, replace(GREEDY, stop=(text[3:5],)))
    assert (done.finish_reason, text.startswith(done.text)) == ("stop", True)


def test_what_cannot_be_asked_is_refused(runtime: OnnxRuntime, tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    with pytest.raises(PersonaNotFoundError, match="no persona 'Z'"):
        runtime.switch("Z")
    with pytest.raises(InputError, match="strength"):
        runtime.switch("E", 2)
    with pytest.raises(InputError, match="the context holds 128"):
        runtime.generate("word " * 400)
    with pytest.raises(InputError, match="does not exist"):
        runtime.logits([10**6])
    personas = personas_of(tiny_llama.torch)
    write_pack(tmp_path / "p.maskpack", replace(personas, identity=replace(personas.identity, architecture="qwen2")))
    with pytest.raises(ModelMismatchError):
        runtime.attach(tmp_path / "p.maskpack")
    assert runtime.personas == ("E", "I", "both")


def test_a_full_context_ends_the_text(runtime: OnnxRuntime) -> None:
    done = runtime.generate("the river rises " * 16, SamplingOptions(max_tokens=200, temperature=0))
    assert done.finish_reason in ("context", "stop")
    assert done.n_prompt_tokens + done.n_tokens <= runtime.n_ctx + 1


def test_after_close_everything_is_refused(tiny_llama: TinyOnnx, pack: Path) -> None:
    runtime = OnnxRuntime.open(tiny_llama.folder, pack, n_threads=1)
    runtime.close()
    runtime.close()
    with pytest.raises(GenerationError, match="closed"):
        runtime.logits([1])
    with pytest.raises(GenerationError, match="closed"):
        runtime.switch("E")


def test_tokens_are_those_of_the_gguf(runtime: OnnxRuntime, tiny_llama: TinyOnnx) -> None:
    with PersonaRuntime.open(tiny_llama.gguf, n_threads=1) as other:
        assert runtime.tokenize_chat(QUESTION) == other.tokenize_chat(QUESTION)
        for text in ("the mill", "<|im_start|>user", "ÄÖ ✓ \x00"):
            for special in (True, False):
                found = runtime.tokenize(text, add_special=False, parse_special=special)
                assert found == other.tokenize(text, add_special=False, parse_special=special)
                assert runtime.detokenize(found) == other.detokenize(found)


def test_the_pack_s_place_is_named_after_the_graph() -> None:
    assert onnx_pack_path(Path("m.onnx-int4/model.onnx"), "mbti") == Path("m.onnx-int4/model.mbti.maskpack")
