"""Every way of giving a model a persona: it acts while it is on, keeps the limits, and leaves nothing behind."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_edge.calibration import CalibrationSettings, Calibrator
from persona_edge.contrasts import CalibrationSet, Contrast, parse_contrasts
from persona_edge.effect import lora_training
from persona_edge.effect.arm_registry import ARM_NAMES, RUNTIME_ARMS, ArmContext, make_arms
from persona_edge.effect.control_vector import controlled, find_control_vector
from persona_edge.effect.interfaces import Arm, user_message
from persona_edge.effect.lora_adapter import adapted
from persona_edge.effect.lora_training import DPO, SFT, LoraSettings, TrainedAdapter, train_adapter
from persona_edge.effect.mask_arms import mask_arm_from_pack
from persona_edge.effect.prompt_arms import Retriever, describe_pole, retrieval_arm, system_prompt_arm
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.encoding import EncodedText, encode_contrast
from persona_edge.errors import CalibrationError, InputError, MissingDependencyError
from persona_edge.evaluation import margins
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import PersonaSet, Plane, Pole
from persona_edge.modeling import TorchModel, load_torch_model
from persona_edge.persona_sets import load_persona_set, shipped_sets
from tests.tiny_models import (
    ARCHITECTURES,
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


def texts(engine: TorchEngine | RuntimeEngine) -> list[EncodedText]:
    answers = [engine.text_tokens(" I would rather wait"), engine.text_tokens(" Let us dance until the morning")]
    asked = engine.chat_tokens(user_message("What do you do?"))
    return [EncodedText((*asked, *answer), len(answer)) for answer in answers]


def scores(engine: TorchEngine | RuntimeEngine) -> np.ndarray:
    return np.concatenate(engine.log_probabilities(texts(engine)))


def snapshot(model: TorchModel) -> tuple[dict[str, bytes], list[tuple[str, type]], int]:
    """Every bit of the weights, the modules that there are, and how many hooks they have."""
    weights = {name: value.numpy().tobytes() for name, value in model.model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.model.named_modules()]
    return weights, modules, sum(len(module._forward_hooks) for module in model.model.modules())


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
            drift = context.side_effects.drift(arm.active(TorchEngine(context.model)))
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


class TestControlVector:
    def test_points_from_one_pole_to_the_other(self, context: ArmContext, axis_set: CalibrationSet) -> None:
        part = axis_set.split()[0]
        swapped = replace(part, contrasts=tuple(Contrast(c.prompt, c.negative, c.positive) for c in part.contrasts))
        vector, opposite = (find_control_vector(context.model, s, max_tokens=200) for s in (part, swapped))
        for block, direction in vector.directions.items():
            assert direction.shape == (context.model.model.config.hidden_size,)
            torch.testing.assert_close(opposite.directions[block], -direction, rtol=1e-3, atol=1e-5)
        moved = [margin_under(context.model, part, vector, c) for c in (-2.0, 0.0, 2.0)]
        assert moved == sorted(moved)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_works_on_every_architecture(self, architecture: str, tmp_path: Path, axis_set: CalibrationSet) -> None:
        model = load(save_folder(tmp_path / architecture, architecture))
        vector = find_control_vector(model, axis_set.split()[0])
        plain = scores(TorchEngine(model))
        with controlled(model, vector, 3.0):
            changed = scores(TorchEngine(model))
            assert TorchEngine(model).generate([user_message("Hi?")], max_tokens=3)
        assert np.abs(changed - plain).max() > 1e-3
        np.testing.assert_array_equal(scores(TorchEngine(model)), plain)


def margin_under(model: TorchModel, part: CalibrationSet, vector: Any, coefficient: float) -> float:
    with controlled(model, vector, coefficient):
        return mean_margin(model, part)


def mean_margin(model: TorchModel, part: CalibrationSet) -> float:
    return margins(model, [encode_contrast(model.tokenizer, c, i) for i, c in enumerate(part.contrasts)]).mean_margin


class TestLora:
    @staticmethod
    def train(
        context: ArmContext, part: CalibrationSet, settings: LoraSettings, folder: Path, toward: int = 1, **more: Any
    ) -> TrainedAdapter:
        return train_adapter(context.model, part, toward, settings, folder=folder, model_key={"m": "tiny"}, **more)

    @pytest.mark.parametrize("settings", [SFT, DPO], ids=["sft", "dpo"])
    @pytest.mark.parametrize("toward", [1, -1])
    def test_training_moves_the_margin_of_its_own_pairs_and_its_loss_falls(
        self, settings: LoraSettings, toward: int, context: ArmContext, axis_set: CalibrationSet, tmp_path: Path
    ) -> None:
        part = axis_set.split()[0]
        adapter = self.train(context, part, settings, tmp_path, toward)
        assert adapter.losses[-1] < adapter.losses[0]
        assert len(adapter.losses) == settings.n_epochs
        before = mean_margin(context.model, part)
        with adapted(context.model, adapter.tensors, rank=settings.rank, alpha=settings.alpha):
            after = mean_margin(context.model, part)
        assert toward * (after - before) > 0.01

    def test_an_adapter_at_scale_zero_is_the_base_model(
        self, context: ArmContext, axis_set: CalibrationSet, tmp_path: Path
    ) -> None:
        adapter = self.train(context, axis_set.limit(4), replace(SFT, n_epochs=1), tmp_path)
        engine = TorchEngine(context.model)
        plain = scores(engine)
        for scale, equal in ((0.0, True), (1.0, False)):
            with adapted(context.model, adapter.tensors, rank=SFT.rank, alpha=SFT.alpha, scale=scale):
                assert np.array_equal(scores(engine), plain) == equal

    def test_a_trained_adapter_is_kept_and_found_again(
        self, context: ArmContext, axis_set: CalibrationSet, tmp_path: Path
    ) -> None:
        quick, steps = replace(DPO, n_epochs=1), []
        first = self.train(context, axis_set.limit(6), quick, tmp_path)
        again = self.train(context, axis_set.limit(6), quick, tmp_path, progress=lambda *step: steps.append(step))
        assert steps == []
        assert (again.losses, again.seconds, again.n_bytes) == (first.losses, first.seconds, first.n_bytes)
        assert_same_tensors(again, first)
        self.train(context, axis_set.limit(6), quick, tmp_path, -1)
        self.train(context, axis_set.limit(6), replace(quick, seed=1), tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == 3

    @pytest.mark.parametrize("settings", [SFT, DPO], ids=["sft", "dpo"])
    def test_interrupted_training_goes_on_to_the_same_adapter(
        self,
        settings: LoraSettings,
        context: ArmContext,
        axis_set: CalibrationSet,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(lora_training, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
        quick, part = replace(settings, n_epochs=2, batch_tokens=150), axis_set.limit(8)
        expected = self.train(context, part, quick, tmp_path / "whole")
        assert expected.n_steps >= 6

        def interrupt(_label: str, step: int, _n_steps: int) -> None:
            if step == 4:
                raise KeyboardInterrupt

        before = snapshot(context.model)
        with pytest.raises(KeyboardInterrupt):
            self.train(context, part, quick, tmp_path / "cut", progress=interrupt)
        assert snapshot(context.model) == before
        steps: list[Sequence[object]] = []
        resumed = self.train(context, part, quick, tmp_path / "cut", progress=lambda *step: steps.append(step))
        assert steps[0][1] == 4
        assert_same_tensors(resumed, expected)
        assert resumed.losses == expected.losses
        assert not list((tmp_path / "cut").glob("*.partial"))


def assert_same_tensors(a: TrainedAdapter, b: TrainedAdapter) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name


@pytest.mark.model
def test_on_the_real_model_a_control_vector_moves_unseen_contrasts(smollm2_path: Path) -> None:
    model = load_torch_model(smollm2_path, name="smollm2", device="cpu")
    calibration, held_out = load_persona_set("mbti-ei").sets[0].split()
    vector = find_control_vector(model, calibration.limit(12))
    levels = [margin_under(model, held_out.limit(6), vector, coefficient) for coefficient in (-0.5, 0.0, 0.5)]
    assert levels == sorted(levels)
    assert levels[2] - levels[0] > 0.02
