"""Control vectors and LoRA adapters on tiny models: they learn their own pairs, act as asked, are kept and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.effect import lora_training
from persona_edge.effect.control_vector import controlled, find_control_vector
from persona_edge.effect.interfaces import user_message
from persona_edge.effect.lora_adapter import adapted
from persona_edge.effect.lora_training import DPO, SFT, LoraSettings, TrainedAdapter, train_adapter
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.encoding import encode_contrast
from persona_edge.evaluation import margins
from persona_edge.modeling import TorchModel
from persona_edge.persona_sets import load_persona_set
from tests.arm_checks import scores, snapshot
from tests.tiny_models import (
    ARCHITECTURES,
    calibration_set,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def axis_set() -> CalibrationSet:
    return calibration_set(24)


class TestControlVector:
    def test_points_from_one_pole_to_the_other(self, model: TorchModel, axis_set: CalibrationSet) -> None:
        part = axis_set.split()[0]
        swapped = replace(part, contrasts=tuple(Contrast(c.prompt, c.negative, c.positive) for c in part.contrasts))
        vector, opposite = (find_control_vector(model, s, max_tokens=200) for s in (part, swapped))
        for block, direction in vector.directions.items():
            assert direction.shape == (model.model.config.hidden_size,)
            torch.testing.assert_close(opposite.directions[block], -direction, rtol=1e-3, atol=1e-5)
        moved = [margin_under(model, part, vector, c) for c in (-2.0, 0.0, 2.0)]
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
        model: TorchModel, part: CalibrationSet, settings: LoraSettings, folder: Path, toward: int = 1, **more: Any
    ) -> TrainedAdapter:
        return train_adapter(model, part, toward, settings, folder=folder, model_key={"m": "tiny"}, **more)

    @pytest.mark.parametrize("settings", [SFT, DPO], ids=["sft", "dpo"])
    @pytest.mark.parametrize("toward", [1, -1])
    def test_training_moves_the_margin_of_its_own_pairs_and_its_loss_falls(
        self, settings: LoraSettings, toward: int, model: TorchModel, axis_set: CalibrationSet, tmp_path: Path
    ) -> None:
        part = axis_set.split()[0]
        adapter = self.train(model, part, settings, tmp_path, toward)
        assert adapter.losses[-1] < adapter.losses[0]
        assert len(adapter.losses) == settings.n_epochs
        before = mean_margin(model, part)
        with adapted(model, adapter.tensors, rank=settings.rank, alpha=settings.alpha):
            after = mean_margin(model, part)
        assert toward * (after - before) > 0.01

    def test_an_adapter_at_scale_zero_is_the_base_model(
        self, model: TorchModel, axis_set: CalibrationSet, tmp_path: Path
    ) -> None:
        adapter = self.train(model, axis_set.limit(4), replace(SFT, n_epochs=1), tmp_path)
        engine = TorchEngine(model)
        plain = scores(engine)
        for scale, equal in ((0.0, True), (1.0, False)):
            with adapted(model, adapter.tensors, rank=SFT.rank, alpha=SFT.alpha, scale=scale):
                assert np.array_equal(scores(engine), plain) == equal

    def test_a_trained_adapter_is_kept_and_found_again(
        self, model: TorchModel, axis_set: CalibrationSet, tmp_path: Path
    ) -> None:
        quick, steps = replace(DPO, n_epochs=1), []
        first = self.train(model, axis_set.limit(6), quick, tmp_path)
        again = self.train(model, axis_set.limit(6), quick, tmp_path, progress=lambda *step: steps.append(step))
        assert steps == []
        assert (again.losses, again.seconds, again.n_bytes) == (first.losses, first.seconds, first.n_bytes)
        assert_same_tensors(again, first)
        self.train(model, axis_set.limit(6), quick, tmp_path, -1)
        self.train(model, axis_set.limit(6), replace(quick, seed=1), tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == 3

    @pytest.mark.parametrize("settings", [SFT, DPO], ids=["sft", "dpo"])
    def test_interrupted_training_goes_on_to_the_same_adapter(
        self,
        settings: LoraSettings,
        model: TorchModel,
        axis_set: CalibrationSet,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(lora_training, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
        quick, part = replace(settings, n_epochs=2, batch_tokens=150), axis_set.limit(8)
        expected = self.train(model, part, quick, tmp_path / "whole")
        assert expected.n_steps >= 6

        def interrupt(_label: str, step: int, _n_steps: int) -> None:
            if step == 4:
                raise KeyboardInterrupt

        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            self.train(model, part, quick, tmp_path / "cut", progress=interrupt)
        assert snapshot(model) == before
        steps: list[Sequence[object]] = []
        resumed = self.train(model, part, quick, tmp_path / "cut", progress=lambda *step: steps.append(step))
        assert steps[0][1] == 4
        assert_same_tensors(resumed, expected)
        assert resumed.losses == expected.losses
        assert not list((tmp_path / "cut").glob("*.partial"))


def assert_same_tensors(a: TrainedAdapter, b: TrainedAdapter) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name


@pytest.mark.model
def test_on_the_real_model_a_control_vector_moves_unseen_contrasts(smollm2_torch: TorchModel) -> None:
    calibration, held_out = load_persona_set("mbti-ei").sets[0].split()
    vector = find_control_vector(smollm2_torch, calibration.limit(12))
    levels = [margin_under(smollm2_torch, held_out.limit(6), vector, coefficient) for coefficient in (-0.5, 0.0, 0.5)]
    assert levels == sorted(levels)
    assert levels[2] - levels[0] > 0.02
