"""Every way of giving a model a persona: it acts while it is on, keeps the limits, and leaves nothing behind."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from persona_edge.calibration import CalibrationSettings, Calibrator
from persona_edge.contrasts import CalibrationSet, Contrast, parse_contrasts
from persona_edge.effect.arm_registry import ARM_NAMES, RUNTIME_ARMS, ArmContext, make_arms
from persona_edge.effect.interfaces import Arm, user_message
from persona_edge.effect.mask_arms import mask_arm_from_pack
from persona_edge.effect.prompt_arms import Retriever, describe_pole, retrieval_arm, system_prompt_arm
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.errors import CalibrationError, InputError, MissingDependencyError
from persona_edge.growth import expected
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import PersonaSet, Plane, Pole
from persona_edge.persona_sets import load_persona_set, shipped_sets
from tests.arm_checks import scores, snapshot
from tests.tiny_models import (
    calibration_set,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
    save_gguf,
)

FAST = CalibrationSettings(neutral_tokens=24, answer_tokens=6, max_batch_tokens=2048)
MAX_CHAT_KL, MAX_PERPLEXITY_RATIO = 0.5, 2.0  # so small a model changes a lot with each row of weights
PROMPT_ARMS = ("system-prompt", "retrieval")
CHANGING = tuple(name for name in ARM_NAMES if name not in ("base", *PROMPT_ARMS))


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return save_gguf(folder / "tiny.gguf", save_folder(folder / "original"))


@pytest.fixture(scope="module")
def context(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ArmContext:
    model, folder = load(gguf_path), tmp_path_factory.mktemp("cache")
    calibrator = Calibrator(model, "f" * 64, settings=FAST, folder=folder / "statistics")
    return ArmContext(
        model,
        calibrator,
        max_chat_kl=MAX_CHAT_KL,
        max_perplexity_ratio=MAX_PERPLEXITY_RATIO,
        cache=folder / "adapters",
    )


@pytest.fixture(scope="module")
def axis_set() -> CalibrationSet:
    return calibration_set(24)


@pytest.fixture(scope="module")
def arms(context: ArmContext, axis_set: CalibrationSet) -> dict[tuple[str, int], Arm]:
    """Every arm toward either pole, made once."""
    return {(arm.name, toward): arm for toward in (1, -1) for arm in make_arms(ARM_NAMES, context, axis_set, toward)}


@pytest.fixture(scope="module")
def runtime(gguf_path: Path) -> Iterator[RuntimeEngine]:
    with RuntimeEngine.open(gguf_path, n_ctx=256, n_threads=1) as engine:
        yield engine


class TestEveryArm:
    def test_they_come_in_the_order_of_the_registry_with_their_poles(self, arms: dict[tuple[str, int], Arm]) -> None:
        assert [name for name, toward in arms if toward == 1] == list(ARM_NAMES)
        for (name, toward), arm in arms.items():
            assert (arm.name, arm.toward) == (name, 0 if name == "base" else toward)
            assert arm.pole == {("base"): None}.get(name, "E" if toward > 0 else "I")

    @pytest.mark.parametrize("name", CHANGING)
    def test_changes_what_the_model_says_and_puts_every_bit_back(
        self, name: str, arms: dict[tuple[str, int], Arm], context: ArmContext
    ) -> None:
        engine = TorchEngine(context.model)
        before, plain = snapshot(context.model), scores(engine)
        with arms[name, 1].active(engine):
            toward_positive = scores(engine)
        with arms[name, -1].active(engine):
            toward_negative = scores(engine)
        assert np.abs(toward_positive - plain).max() > 1e-4
        assert np.abs(toward_positive - toward_negative).max() > 1e-4
        assert snapshot(context.model) == before
        np.testing.assert_array_equal(scores(engine), plain)
        assert arms[name, 1].messages("Hi?") == user_message("Hi?")

    @pytest.mark.parametrize("name", CHANGING)
    def test_puts_every_bit_back_after_an_error_too(
        self, name: str, arms: dict[tuple[str, int], Arm], context: ArmContext
    ) -> None:
        before = snapshot(context.model)
        with pytest.raises(KeyError, match="half-way"), arms[name, 1].active(TorchEngine(context.model)):
            raise KeyError("half-way")
        assert snapshot(context.model) == before

    @pytest.mark.parametrize("name", CHANGING)
    def test_is_as_strong_as_the_limits_allow_and_says_what_it_costs(
        self, name: str, arms: dict[tuple[str, int], Arm], context: ArmContext
    ) -> None:
        for toward in (1, -1):
            arm = arms[name, toward]
            drift = expected(context.side_effects.drift(arm.active(TorchEngine(context.model))))
            assert 0 < drift.chat_kl <= MAX_CHAT_KL
            assert drift.perplexity_ratio <= MAX_PERPLEXITY_RATIO
            assert arm.facts["tuned_chat_kl"] == pytest.approx(drift.chat_kl, rel=1e-3)
            assert float(arm.facts["strength"]) > 0
            assert float(arm.facts["artefact_bytes"]) > 0
            assert float(arm.facts["seconds_to_make"]) >= 0

    def test_none_looks_at_the_held_out_contrasts(
        self, arms: dict[tuple[str, int], Arm], context: ArmContext, axis_set: CalibrationSet
    ) -> None:
        held_out = set(axis_set.split()[1].contrasts)
        assert held_out
        others = tuple(
            Contrast(c.prompt, "Something else.", "Another thing.") if c in held_out else c for c in axis_set.contrasts
        )
        again = make_arms(ARM_NAMES, context, replace(axis_set, contrasts=others), 1)
        engine = TorchEngine(context.model)
        for arm in again:
            first = arms[arm.name, 1]
            with first.active(engine):
                expected = scores(engine)
            with arm.active(engine):
                np.testing.assert_array_equal(scores(engine), expected)
            assert arm.messages("Where to?") == first.messages("Where to?")

    def test_both_poles_share_one_control_vector(self, arms: dict[tuple[str, int], Arm], context: ArmContext) -> None:
        positive, negative = (arms["control-vector", toward].facts["seconds_to_make"] for toward in (1, -1))
        assert positive == negative  # two measurements of a time are never the same
        sets = [vector for vector, seconds in context.vectors.values() if seconds == positive]
        assert len(sets) == 1

    def test_base_changes_nothing(self, arms: dict[tuple[str, int], Arm], context: ArmContext) -> None:
        engine = TorchEngine(context.model)
        plain = scores(engine)
        base = arms["base", 1]
        with base.active(engine):
            np.testing.assert_array_equal(scores(engine), plain)
        assert base.messages("Hi?") == user_message("Hi?")

    def test_an_unknown_name_a_wrong_direction_or_another_model_is_refused_at_once(
        self, context: ArmContext, axis_set: CalibrationSet
    ) -> None:
        with pytest.raises(InputError, match="no arm 'lora'; choose from base, system-prompt"):
            make_arms(["base", "lora"], context, axis_set, 1)
        with pytest.raises(InputError, match="toward is 0"):
            make_arms(["base"], context, axis_set, 0)
        with pytest.raises(InputError, match="another model"):
            ArmContext(replace(context.model), context.calibrator)

    @pytest.mark.parametrize(("arm", "package"), [("retrieval", "bm25s"), ("lora-dpo", "peft")])
    def test_without_its_package_the_error_says_what_to_install(
        self, arm: str, package: str, context: ArmContext, axis_set: CalibrationSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'persona-edge\[eval\]'"):
            make_arms([arm], context, axis_set, 1)

    def test_a_set_with_nothing_to_calibrate_on_is_refused(self, context: ArmContext, axis_set: CalibrationSet) -> None:
        held_out = axis_set.split()[1]
        with pytest.raises(CalibrationError, match="no contrasts to make an arm from"):
            list(make_arms(["retrieval"], context, held_out, 1))


class TestOnTheRuntime:
    @pytest.mark.parametrize("name", [name for name in CHANGING if name in RUNTIME_ARMS])
    def test_masks_do_there_what_they_do_on_pytorch(
        self, name: str, arms: dict[tuple[str, int], Arm], context: ArmContext, runtime: RuntimeEngine
    ) -> None:
        on_torch = TorchEngine(context.model)
        digest, plain = runtime.runtime.weights_digest(), scores(runtime)
        np.testing.assert_allclose(plain, scores(on_torch), atol=0.02)
        with arms[name, 1].active(runtime), arms[name, 1].active(on_torch):
            masked, expected = scores(runtime), scores(on_torch)
        np.testing.assert_allclose(masked, expected, atol=0.02)
        assert runtime.runtime.weights_digest() == digest
        np.testing.assert_array_equal(scores(runtime), plain)

    @pytest.mark.parametrize("name", [name for name in CHANGING if name not in RUNTIME_ARMS])
    def test_the_others_are_refused(self, name: str, arms: dict[tuple[str, int], Arm], runtime: RuntimeEngine) -> None:
        with pytest.raises(InputError, match="acts on the engine pytorch only"):
            arms[name, 1].active(runtime)

    def test_a_composition_of_a_pack_is_an_arm_on_both(self, context: ArmContext, runtime: RuntimeEngine) -> None:
        shapes = [layer.shape for layer in context.model.layers]
        poles = tuple(
            Pole(name, axis, (Plane(0.0, {shapes[i].name: np.arange(9, dtype=np.uint32)}, 32),))
            for i, (name, axis) in enumerate((("E", "EI"), ("S", "SN")))
        )
        personas = PersonaSet(context.model.identity(), poles, {"ES": ("E", "S"), "E": ("E",)})
        arm = mask_arm_from_pack(MaskPack.from_bytes(encode_pack(personas)[0]), "es", 1)
        on_torch = TorchEngine(context.model)
        with arm.active(runtime), arm.active(on_torch):
            np.testing.assert_allclose(scores(runtime), scores(on_torch), atol=0.02)
        n_units = sum(shape.n_units(32) for shape in shapes)
        assert (arm.pole, arm.facts["share_of_units"]) == ("ES", 18 / n_units)


class TestPromptArms:
    def test_the_description_is_the_system_message(self, context: ArmContext, axis_set: CalibrationSet) -> None:
        described = replace(axis_set, positive_description="You love company.")
        arm = system_prompt_arm(context, described, 1)
        assert arm.messages("Hi?") == [{"role": "system", "content": "You love company."}, *user_message("Hi?")]
        assert arm.facts["description"] == "You love company."
        assert float(arm.facts["chat_kl"]) > 0
        assert float(arm.facts["context_tokens"]) > len(described.positive_description) / 8

    def test_where_a_template_knows_no_system_role_it_stands_before_the_question(
        self, context: ArmContext, axis_set: CalibrationSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        template = context.model.tokenizer.chat_template
        refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
        monkeypatch.setattr(context.model.tokenizer, "chat_template", refusing)
        arm = system_prompt_arm(context, replace(axis_set, negative_description="You love quiet."), -1)
        assert arm.messages("Hi?") == user_message("You love quiet.\n\nHi?")

    def test_every_shipped_mbti_pole_is_described_in_two_or_three_sentences(self) -> None:
        sets = load_persona_set("mbti16").sets
        descriptions = [describe_pole(axis_set, toward) for axis_set in sets for toward in (1, -1)]
        assert len(set(descriptions)) == 8
        for description in descriptions:
            assert description.startswith("You ")
            assert 2 <= description.count(".") <= 3

    def test_descriptions_belong_to_poles_that_there_are(self) -> None:
        index = tomllib.loads(resources.files("persona_edge.personas").joinpath("personas.toml").read_text("utf-8"))
        named = {axis for axis, entry in index["axes"].items() if "descriptions" in entry}
        for shipped in shipped_sets():
            for axis, axis_set in zip(shipped.axes, load_persona_set(shipped.name).sets, strict=True):
                described = set(index["axes"][axis].get("descriptions", ()))
                assert described <= {axis_set.positive_pole, axis_set.negative_pole}
                named.discard(axis)
        assert named == set()

    def test_a_file_may_describe_its_poles_in_its_first_line(self) -> None:
        header = {"axis": "tone", "positive": "warm", "negative": "blunt", "positive_description": "You are kind."}
        lines = [header, {"prompt": "Hi", "positive": "Hello, dear!", "negative": "What?"}]
        found = parse_contrasts("\n".join(map(json.dumps, lines)).encode(), name="tone", source="tone.jsonl")
        assert (found.positive_description, found.negative_description) == ("You are kind.", "")
        bad = json.dumps({**header, "negative_description": 3}).encode()
        with pytest.raises(CalibrationError, match=r"line 1: 'negative_description' is of type int"):
            parse_contrasts(bad, name="tone", source="tone.jsonl")

    def test_without_a_description_the_pole_is_shown_by_its_calibration_answers(self, axis_set: CalibrationSet) -> None:
        for toward in (1, -1):
            own = [c.positive if toward > 0 else c.negative for c in axis_set.split()[0].contrasts]
            first, *examples = describe_pole(axis_set, toward).splitlines()
            assert first == "Answer every message in the manner of these answers:"
            assert len(examples) == 3
            assert all(example.removeprefix("- ") in own for example in examples)

    def test_retrieval_finds_the_obvious_neighbour(self) -> None:
        retriever = Retriever(["How do I bake bread?", "Where is my passport?", "Who won the football match?"])
        assert retriever.nearest("I lost my PASSPORT again!", 1) == [1]
        assert retriever.nearest("When does the football start?", 2)[0] == 2
        assert retriever.nearest("xyzzy", 2) == [0, 1]
        assert sorted(retriever.nearest("bread", 10)) == [0, 1, 2]

    def test_retrieved_answers_are_earlier_turns_with_the_nearest_last(self, context: ArmContext) -> None:
        topics = ("bread", "passports", "football", "gardens", "trains", "music", "winter", "maps", "tea", "rain")
        contrasts = tuple(Contrast(f"Tell me about {t}", f"{t} yes", f"{t} no") for t in topics)
        axis_set = CalibrationSet("t", "t", "yes", "no", contrasts)
        topic = axis_set.split()[0].contrasts[-1].prompt.rsplit(" ", 1)[1]
        for toward, answer in ((1, "yes"), (-1, "no")):
            messages = retrieval_arm(context, axis_set, toward).messages(f"What of {topic}?")
            assert [m["role"] for m in messages] == ["user", "assistant"] * 4 + ["user"]
            assert [m["content"] for m in messages[-3:]] == [
                f"Tell me about {topic}",
                f"{topic} {answer}",
                f"What of {topic}?",
            ]
            assert all(m["content"].endswith(answer) for m in messages[1::2])
