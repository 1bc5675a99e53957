"""The object users hold: switching, generating, streaming, and doing both at once; on the real 135M model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import (
    GenerationError,
    InputError,
    ModelMismatchError,
    ModelNotFoundError,
    PackError,
    PersonaNotFoundError,
    UnsupportedModelError,
)
from persona_edge.maskpack import MaskPack, encode_pack, write_pack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, TensorShape
from persona_edge.runtime.dequantize import dequantize
from persona_edge.runtime.session import Message, PersonaRuntime, SamplingOptions
from persona_edge.runtime.switcher import Switcher
from persona_edge.sketch import sample_signs

pytestmark = pytest.mark.model

GREEDY = SamplingOptions(temperature=0, max_tokens=12)
QUESTION: list[Message] = [{"role": "user", "content": "Name the capital of France."}]
STORY = "Once upon a time there was a"


def personas_for(runtime: PersonaRuntime, seed: int = 0) -> PersonaSet:
    """Two random poles over some block weights of `runtime`, and the sketch of those weights as they are now."""
    random = np.random.default_rng(seed)
    chosen = [t for n, t in runtime._tensors.items() if n.startswith(("blk.1.", "blk.20.")) and t.n_rows > 1]
    shapes = tuple(TensorShape(t.name, t.n_rows, t.n_columns) for t in chosen)
    sketch = {}
    for tensor in chosen:
        weights = dequantize(tensor.data, tensor.ggml_type, np.arange(tensor.n_rows * tensor.n_columns))
        sketch[tensor.name] = sample_signs(weights.reshape(tensor.n_rows, tensor.n_columns))

    def plane(gate: float, share: float) -> Plane:
        positions = {}
        for shape in shapes:
            n_units = shape.n_units(32)
            picked = random.choice(n_units, max(1, int(share * n_units)), replace=False)
            positions[shape.name] = np.sort(picked).astype(np.uint32)
        return Plane(gate, positions)

    poles = (Pole("A", "AB", (plane(0, 0.3), plane(2, 0.05))), Pole("B", "AB", (plane(0, 0.3),)))
    identity = ModelIdentity(runtime._model.architecture, shapes, sketch)
    return PersonaSet(identity, poles, {"Aye": ("A",), "Bee": ("B",), "Both": ("A", "B")})


@pytest.fixture(scope="module")
def pack_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "test.maskpack"
    with PersonaRuntime.open(smollm2_path, n_ctx=256, n_threads=1) as runtime:
        write_pack(path, personas_for(runtime))
    return path


@pytest.fixture(scope="module")
def shared(smollm2_path: Path, pack_path: Path) -> Iterator[PersonaRuntime]:
    with PersonaRuntime.open(smollm2_path, pack_path, n_ctx=256, n_threads=1) as runtime:
        yield runtime


@pytest.fixture
def runtime(shared: PersonaRuntime) -> PersonaRuntime:
    """At base, with an empty cache."""
    shared.base()
    shared._backend.clear()
    return shared


@pytest.fixture(scope="module")
def cold_text(smollm2_path: Path) -> str:
    with PersonaRuntime.open(smollm2_path, n_ctx=256, n_threads=1) as fresh:
        return fresh.generate(STORY, GREEDY).text


# Switching


def test_base_again_is_base(runtime: PersonaRuntime, cold_text: str) -> None:
    before = runtime.weights_digest()
    digests, texts = {}, {}
    for name in ("Aye", "Bee", "Both"):
        runtime.switch(name)
        digests[name], texts[name] = runtime.weights_digest(), runtime.generate(STORY, GREEDY).text
    assert len({before, *digests.values()}) == 4
    assert cold_text not in texts.values()
    runtime.switch("Aye")
    assert runtime.weights_digest() == digests["Aye"]
    assert runtime.generate(STORY, GREEDY).text == texts["Aye"]
    runtime.base()
    assert runtime.weights_digest() == before
    assert runtime.generate(STORY, GREEDY).text == cold_text


def test_a_switch_reports_what_it_did(runtime: PersonaRuntime) -> None:
    report = runtime.switch("bee", 0.5)
    assert (report.persona, report.strength) == ("Bee", 0.5) == (runtime.persona, runtime.strength)
    assert report.n_bytes_written >= report.n_units_written > 0
    assert report.seconds > 0
    assert report.seconds_to_first_token is None
    completion = runtime.generate(STORY, replace(GREEDY, max_tokens=1))
    waited = report.seconds + report.kv_seconds + completion.seconds_to_first_token
    assert runtime.last_switch == replace(report, seconds_to_first_token=waited)
    again = runtime.switch("Bee", 0.5)
    assert (again.n_units_written, again.n_bytes_written) == (0, 0)
    back = runtime.base()
    assert (back.persona, back.strength) == (None, 0.0) == (runtime.persona, runtime.strength)
    assert back.n_units_written == report.n_units_written


def test_a_switch_that_changes_nothing_keeps_the_cache(runtime: PersonaRuntime) -> None:
    runtime.switch("Aye")
    runtime.generate(STORY, GREEDY)
    cached = runtime._backend.cached_tokens
    runtime.switch("AYE")
    assert runtime._backend.cached_tokens == cached != ()
    runtime.switch("Aye", 0.9)
    assert runtime._backend.cached_tokens == ()


def test_strength_zero_is_base(runtime: PersonaRuntime) -> None:
    before = runtime.weights_digest()
    runtime.switch("Both", 0)
    assert runtime.weights_digest() == before
    assert (runtime.persona, runtime.strength) == ("Both", 0.0)


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf"), "half", None])
def test_strengths_that_are_none(runtime: PersonaRuntime, strength: float) -> None:
    before = runtime.weights_digest()
    with pytest.raises(InputError, match=r"strength is .*; it must be a number between 0"):
        runtime.switch("Aye", strength)
    assert runtime.weights_digest() == before


def test_no_such_persona(runtime: PersonaRuntime) -> None:
    runtime.switch("Aye")
    before = runtime.weights_digest()
    with pytest.raises(PersonaNotFoundError, match="no persona 'Zed'; this pack has Aye, Bee, Both"):
        runtime.switch("Zed")
    assert runtime.weights_digest() == before
    assert runtime.persona == "Aye"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_failure_after_writing_leaves_base(
    runtime: PersonaRuntime, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = runtime.weights_digest()
    runtime.switch("Aye")
    runtime.generate(STORY, GREEDY)
    apply = Switcher.apply

    def failing(*arguments: object) -> None:
        apply(*arguments)  # type: ignore[arg-type]
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Switcher, "apply", failing)
        with pytest.raises(error):
            runtime.switch("Bee")
    assert runtime.weights_digest() == before
    assert (runtime.persona, runtime.strength) == (None, 0.0)
    assert runtime._backend.cached_tokens == ()


def test_a_quantization_that_cannot_be_edited(smollm2_path: Path) -> None:
    """No layout is known for IQ2_XXS; the persona that was active stays."""
    with PersonaRuntime.open(smollm2_path, n_ctx=256, n_threads=1) as runtime:
        personas = personas_for(runtime)
        name = "blk.1.ffn_up.weight"
        sketch = {n: sample for n, sample in personas.identity.sketch.items() if n != name}
        without = [
            replace(p, positions={n: at for n, at in p.positions.items() if n != name})
            for p in personas.poles[0].planes
        ]
        poles = (replace(personas.poles[0], planes=tuple(without)), personas.poles[1])
        changed = replace(personas, poles=poles, identity=replace(personas.identity, sketch=sketch))
        runtime._tensors[name] = replace(runtime._tensors[name], ggml_type=16)
        runtime.attach(MaskPack.from_bytes(encode_pack(changed)[0]))
        runtime.switch("Aye")
        before = runtime.weights_digest()
        with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_up\.weight: .*IQ2_XXS cannot be edited"):
            runtime.switch("Bee")
        assert runtime.weights_digest() == before
        assert runtime.persona == "Aye"


# Packs


def test_without_a_pack(smollm2_path: Path) -> None:
    with PersonaRuntime.open(smollm2_path, n_ctx=256, n_threads=1) as runtime:
        assert runtime.personas == ()
        with pytest.raises(InputError, match="no mask pack is attached"):
            runtime.switch("Aye")
        assert runtime.base().n_units_written == 0


def test_attaching_goes_back_to_base_and_replaces(runtime: PersonaRuntime, pack_path: Path) -> None:
    before = runtime.weights_digest()
    runtime.switch("Aye")
    runtime.attach(MaskPack.open(pack_path))
    assert runtime.weights_digest() == before
    assert runtime.persona is None
    assert runtime.personas == ("Aye", "Bee", "Both")
    runtime.switch("Bee")
    runtime.base()
    assert runtime.weights_digest() == before


def other_weights(personas: PersonaSet) -> PersonaSet:
    sketch = {n: replace(s, negative=np.roll(s.negative, 1)) for n, s in personas.identity.sketch.items()}
    return replace(personas, identity=replace(personas.identity, sketch=sketch))


def other_architecture(personas: PersonaSet) -> PersonaSet:
    return replace(personas, identity=replace(personas.identity, architecture="qwen2"))


def other_shape(personas: PersonaSet) -> PersonaSet:
    first, *rest = personas.identity.tensors
    larger = replace(first, n_rows=first.n_rows + 1)
    return replace(personas, identity=replace(personas.identity, tensors=(larger, *rest)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "made from other weights"),
        (other_architecture, "for the architecture qwen2, this model is llama"),
        (other_shape, "made from another model: .* weights there and"),
    ],
)
def test_packs_of_other_models(
    runtime: PersonaRuntime, tmp_path: Path, change: Callable[[PersonaSet], PersonaSet], message: str
) -> None:
    write_pack(tmp_path / "other.maskpack", change(personas_for(runtime)))
    before = runtime.weights_digest()
    with pytest.raises(ModelMismatchError, match=message) as caught:
        runtime.attach(tmp_path / "other.maskpack")
    assert "\n" not in str(caught.value)
    assert runtime.weights_digest() == before
    assert runtime.personas == ("Aye", "Bee", "Both")  # the earlier pack stays
    runtime.switch("Aye")


def test_a_bad_pack_or_model_leaves_nothing_open(smollm2_path: Path, pack_path: Path, tmp_path: Path) -> None:
    flipped = bytearray(pack_path.read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "bad.maskpack").write_bytes(flipped)
    with pytest.raises(PackError, match=r"bad\.maskpack"):
        PersonaRuntime.open(smollm2_path, tmp_path / "bad.maskpack", n_ctx=256)
    with pytest.raises(PackError, match=r"none\.maskpack"):
        PersonaRuntime.open(smollm2_path, tmp_path / "none.maskpack", n_ctx=256)
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf"):
        PersonaRuntime.open(tmp_path / "none.gguf", pack_path)


# Generating


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


def test_a_stream_that_is_left_early(runtime: PersonaRuntime, cold_text: str) -> None:
    stream = runtime.stream(STORY, GREEDY)
    first = list(islice(stream, 3))
    stream.close()
    assert cold_text.startswith("".join(first))
    assert runtime.generate(STORY, GREEDY).text == cold_text


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_ctrl_c_at_any_moment(runtime: PersonaRuntime, cold_text: str) -> None:
    def press(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def switch_and_stream_until_pressed(delay: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay)
        while True:
            runtime.switch("Aye")
            for _ in runtime.stream(STORY, GREEDY):
                runtime.base()

    before = runtime.weights_digest()
    previous = signal.signal(signal.SIGALRM, press)
    try:
        for delay in np.linspace(0.003, 0.08, 12):
            with pytest.raises(KeyboardInterrupt):
                switch_and_stream_until_pressed(delay)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    runtime.base()
    assert runtime.weights_digest() == before
    assert runtime.generate(STORY, GREEDY).text == cold_text


def test_two_streams_take_turns(runtime: PersonaRuntime, cold_text: str) -> None:
    one, other = runtime.stream(STORY, GREEDY), runtime.stream("The sea is", GREEDY)
    alternating = [(next(one), next(other)) for _ in range(4)]
    assert cold_text.startswith("".join(piece for piece, _ in alternating))


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


# From several threads


def test_a_switch_during_a_stream_takes_effect_at_the_next_token(runtime: PersonaRuntime) -> None:
    """What was said stays; what follows is what the new persona says after it."""
    stream = runtime.stream(STORY, GREEDY)
    start = "".join(islice(stream, 4))
    runtime.switch("Both")
    rest = "".join(stream)
    n_left = GREEDY.max_tokens - len(runtime.tokenize(start))
    assert rest == runtime.generate(STORY + start, replace(GREEDY, max_tokens=n_left)).text


def test_switching_from_another_thread_waits_for_the_token_and_not_for_the_text(runtime: PersonaRuntime) -> None:
    before = runtime.weights_digest()
    long = replace(GREEDY, max_tokens=60)
    n_pieces, seen_by_switcher = 0, []
    under_way, stop = threading.Event(), threading.Event()

    def switch_around() -> None:
        under_way.wait(30)
        for name in ("Aye", "Bee", "Both"):
            runtime.switch(name)
            seen_by_switcher.append(n_pieces)
        runtime.base()
        stop.set()

    thread = threading.Thread(target=switch_around)
    thread.start()
    for _ in runtime.stream(STORY, long):
        n_pieces += 1
        under_way.set()
    n_at_end = n_pieces
    thread.join(30)
    assert stop.is_set()
    assert seen_by_switcher[0] < n_at_end, "the first switch waited for the whole text"
    assert runtime.weights_digest() == before


def test_generating_in_two_threads_at_once(runtime: PersonaRuntime, cold_text: str) -> None:
    texts: list[str] = []
    prompts = ("The sea is", STORY)
    alone = [runtime.generate(prompt, replace(GREEDY, max_tokens=1)).text for prompt in prompts]

    def generate(prompt: str) -> None:
        texts.append(runtime.generate(prompt, replace(GREEDY, max_tokens=6)).text)

    threads = [threading.Thread(target=generate, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(text.startswith(tuple(alone)) for text in texts) == [True, True]
    assert runtime.generate(STORY, GREEDY).text == cold_text


def test_closing(smollm2_path: Path, pack_path: Path) -> None:
    runtime = PersonaRuntime.open(smollm2_path, pack_path, n_ctx=256, n_threads=1)
    stream = runtime.stream(STORY, GREEDY)
    next(stream)
    runtime.close()
    runtime.close()
    uses: list[Callable[[], object]] = [
        lambda: next(stream),
        lambda: runtime.switch("Aye"),
        runtime.base,
        lambda: runtime.attach(pack_path),
        lambda: runtime.generate("Hi"),
        lambda: runtime.chat(QUESTION),
        lambda: runtime.logits([5]),
        lambda: runtime.detokenize([5]),
        runtime.weights_digest,
    ]
    for use in uses:
        with pytest.raises(GenerationError, match="this session is closed; open the model again"):
            use()


# Other architectures


@pytest.mark.big
@pytest.mark.parametrize("which", ["qwen_path", "gemma_path"])
def test_larger_models_go_there_and_back(which: str, request: pytest.FixtureRequest) -> None:
    with PersonaRuntime.open(request.getfixturevalue(which), n_ctx=256, n_threads=1) as runtime:
        cold, before = runtime.chat(QUESTION, GREEDY).text, runtime.weights_digest()
        tokens = runtime.tokenize(STORY)
        logits = runtime.logits(tokens)
        assert "capital of France" in cold
        runtime.attach(MaskPack.from_bytes(encode_pack(personas_for(runtime))[0]))
        runtime.switch("Both")
        assert runtime.weights_digest() != before
        assert np.abs(runtime.logits(tokens) - logits).mean() > 0.1
        runtime.base()
        assert runtime.weights_digest() == before
        assert np.array_equal(runtime.logits(tokens), logits)
        assert runtime.chat(QUESTION, GREEDY).text == cold
