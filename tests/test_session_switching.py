"""Switching on the real 135M model: what it writes and reports, what it refuses, and which packs fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import (
    InputError,
    ModelMismatchError,
    ModelNotFoundError,
    PackError,
    PersonaNotFoundError,
    UnsupportedModelError,
)
from persona_edge.maskpack import MaskPack, encode_pack, write_pack
from persona_edge.masks import PersonaSet
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.switcher import Switcher
from tests.real_chat import GREEDY, QUESTION, STORY, random_personas

pytestmark = pytest.mark.model


# There and back


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


def test_a_persona_takes_its_poles_at_the_strengths_of_the_pack(
    runtime: PersonaRuntime, smollm2_personas: PersonaSet, smollm2_pack: Path
) -> None:
    """Like a pack whose poles have these gates themselves, at the user's strength too."""
    before = runtime.weights_digest()
    first, *rest = smollm2_personas.poles
    weaker = replace(smollm2_personas, poles=(first.at(0.5), *rest))
    digests = []
    try:
        for personas in (replace(smollm2_personas, strengths={"Both": (0.5, 1.0)}), weaker):
            runtime.attach(MaskPack.from_bytes(encode_pack(personas)[0]))
            for strength in (1.0, 0.7):
                runtime.switch("both", strength)
                digests.append(runtime.weights_digest())
    finally:
        runtime.attach(smollm2_pack)
    assert digests[:2] == digests[2:]
    assert len({before, *digests}) == 3
    runtime.switch("Both")
    assert runtime.weights_digest() not in digests


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


def test_a_quantization_that_cannot_be_edited(smollm2_path: Path, smollm2_personas: PersonaSet) -> None:
    """No layout is known for IQ2_XXS; the persona that was active stays."""
    personas = smollm2_personas
    with PersonaRuntime.open(smollm2_path, n_ctx=256, n_threads=1) as runtime:
        name = "blk.1.ffn_up.weight"
        sketch = {n: sample for n, sample in personas.identity.sketch.items() if n != name}
        without = [
            replace(p, positions={n: at for n, at in p.positions.items() if n != name})
            for p in personas.poles[0].planes
        ]
        poles = (replace(personas.poles[0], planes=tuple(without)), *personas.poles[1:])
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


def test_attaching_goes_back_to_base_and_replaces(runtime: PersonaRuntime, smollm2_pack: Path) -> None:
    before = runtime.weights_digest()
    runtime.switch("Aye")
    runtime.attach(MaskPack.open(smollm2_pack))
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
    runtime: PersonaRuntime,
    smollm2_personas: PersonaSet,
    tmp_path: Path,
    change: Callable[[PersonaSet], PersonaSet],
    message: str,
) -> None:
    write_pack(tmp_path / "other.maskpack", change(smollm2_personas))
    before = runtime.weights_digest()
    with pytest.raises(ModelMismatchError, match=message) as caught:
        runtime.attach(tmp_path / "other.maskpack")
    assert "\n" not in str(caught.value)
    assert runtime.weights_digest() == before
    assert runtime.personas == ("Aye", "Bee", "Both")  # the earlier pack stays
    runtime.switch("Aye")


def test_a_bad_pack_or_model_leaves_nothing_open(smollm2_path: Path, smollm2_pack: Path, tmp_path: Path) -> None:
    flipped = bytearray(smollm2_pack.read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "bad.maskpack").write_bytes(flipped)
    with pytest.raises(PackError, match=r"bad\.maskpack"):
        PersonaRuntime.open(smollm2_path, tmp_path / "bad.maskpack", n_ctx=256)
    with pytest.raises(PackError, match=r"none\.maskpack"):
        PersonaRuntime.open(smollm2_path, tmp_path / "none.maskpack", n_ctx=256)
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf"):
        PersonaRuntime.open(tmp_path / "none.gguf", smollm2_pack)


# Other architectures


@pytest.mark.big
@pytest.mark.parametrize("which", ["qwen_path", "gemma_path"])
def test_larger_models_go_there_and_back(which: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    with PersonaRuntime.open(path, n_ctx=256, n_threads=1) as runtime:
        cold, before = runtime.chat(QUESTION, GREEDY).text, runtime.weights_digest()
        tokens = runtime.tokenize(STORY)
        logits = runtime.logits(tokens)
        assert "capital of France" in cold
        runtime.attach(MaskPack.from_bytes(encode_pack(random_personas(path))[0]))
        runtime.switch("Both")
        assert runtime.weights_digest() != before
        assert np.abs(runtime.logits(tokens) - logits).mean() > 0.1
        runtime.base()
        assert runtime.weights_digest() == before
        assert np.array_equal(runtime.logits(tokens), logits)
        assert runtime.chat(QUESTION, GREEDY).text == cold
