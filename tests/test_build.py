"""From contrasts to a pack, end to end, on a tiny model with a user's own file of contrasts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.build import BuildSettings, build_personas
from persona_edge.calibration import CalibrationSettings, Calibrator
from persona_edge.composition import Effects
from persona_edge.contrasts import CalibrationSet
from persona_edge.encoding import encode_contrast
from persona_edge.errors import CalibrationError, InputError, SelectionError
from persona_edge.evaluation import score_answers
from persona_edge.exporters.to_gguf import export_gguf
from persona_edge.masked_model import masked
from persona_edge.maskpack import MaskPack
from persona_edge.masks import Granularity, PersonaSet, Plane
from persona_edge.modeling import TorchModel
from persona_edge.packed_pairs import ContrastPair
from persona_edge.persona_sets import PersonaSpec, load_persona_set
from persona_edge.pole_masks import METHODS, Method
from persona_edge.repetition import RepetitionProbe
from persona_edge.selection import n_overlapping
from persona_edge.separation import Other
from tests.tiny_models import (
    calibration_set,
    contrasts,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
    save_gguf,
)

FAST = CalibrationSettings(neutral_tokens=24, answer_tokens=6, max_batch_tokens=2048)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return save_gguf(folder / "tiny.gguf", save_folder(folder / "original"))


@pytest.fixture(scope="module")
def model(gguf_path: Path) -> TorchModel:
    return load(gguf_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole module, as a user has: no test may get another's numbers out of it."""
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PersonaSpec:
    path = tmp_path_factory.mktemp("contrasts") / "sociable.jsonl"
    lines = [{"axis": "SO", "positive": "sociable", "negative": "solitary"}]
    lines += [{"prompt": c.prompt, "positive": c.positive, "negative": c.negative} for c in contrasts(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_persona_set(path)


class Calibrators(Protocol):
    """Makes calibrators of the one model."""

    def __call__(self, granularity: Granularity = 32, *, gate_fisher: bool = True, cache: Path = ...) -> Calibrator: ...


@pytest.fixture(scope="module")
def calibrator(model: TorchModel, cache: Path) -> Calibrators:
    shared = cache

    def make(granularity: Granularity = 32, *, gate_fisher: bool = True, cache: Path = shared) -> Calibrator:
        settings = replace(FAST, granularity=granularity, gate_fisher=gate_fisher)
        return Calibrator(model, "f" * 64, settings=settings, folder=cache)

    return make


def suppressed(planes: Sequence[Plane]) -> dict[str, np.ndarray]:
    return {name: at for plane in planes if plane.gate < 1 for name, at in plane.positions.items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_a_pack_that_reads_back_as_built(
    method: Method, calibrator: Calibrators, spec: PersonaSpec, gguf_path: Path
) -> None:
    fisher = method == "contrastive-fisher"
    granularity: Granularity = 32 if fisher else 1
    settings = BuildSettings(method=method, granularity=granularity, density=0.1)

    built = build_personas(calibrator(granularity), spec, settings)

    assert built.personas == {"sociable": ("sociable",), "solitary": ("solitary",)}
    assert [pole.name for pole in built.poles] == ["sociable", "solitary"]
    for name in built.personas:
        pole = built.report["poles"][name]
        assert pole["share_of_units"] == pytest.approx(0.1, abs=0.02)
        assert pole["budget_nats"] is None
        assert pole["drift"]["chat_kl"] > 0
        assert pole["held_out"] != pole["held_out_base"]
    assert json.loads(json.dumps(built.report)) == built.report
    export_gguf(gguf_path, built, set_name=method)
    assert_same_personas(MaskPack.open(gguf_path.with_name(f"tiny.{method}.maskpack")).load(), built)


def assert_same_personas(read: PersonaSet, built: PersonaSet) -> None:
    assert read.identity.architecture == built.identity.architecture
    assert read.identity.tensors == built.identity.tensors
    assert dict(read.personas) == dict(built.personas)
    assert read.report == built.report
    for a, b in zip(read.poles, built.poles, strict=True):
        assert (a.name, a.axis, [(p.gate, p.granularity) for p in a.planes]) == (
            b.name,
            b.axis,
            [(p.gate, p.granularity) for p in b.planes],
        )
        for plane_a, plane_b in zip(a.planes, b.planes, strict=True):
            assert set(plane_a.positions) == set(plane_b.positions)
            for name, at in plane_a.positions.items():
                np.testing.assert_array_equal(at, plane_b.positions[name])


@pytest.mark.parametrize("method", ["contrastive-fisher", "contrastive-sparse"])
def test_the_two_poles_of_an_axis_suppress_nothing_in_common(
    method: Method, calibrator: Calibrators, spec: PersonaSpec
) -> None:
    granularity: Granularity = 32 if method == "contrastive-fisher" else 1
    settings = BuildSettings(method=method, granularity=granularity, density=0.3)
    positive, negative = build_personas(calibrator(granularity), spec, settings).poles
    assert positive.planes[0].n_positions > 100
    assert n_overlapping(suppressed(positive.planes), suppressed(negative.planes)) == 0


def test_amplified_groups_are_those_that_the_other_pole_suppresses(calibrator: Calibrators, spec: PersonaSpec) -> None:
    settings = BuildSettings(budget=0.05, amplify_gate=2.0)  # gate 2 is as far from 1 as gate 0, so ranks alike
    positive, negative = build_personas(calibrator(), spec, settings).poles
    assert [plane.gate for plane in positive.planes] == [0.0, 2.0]
    assert suppressed(positive.planes).keys() == negative.planes[1].positions.keys()
    for name, at in suppressed(positive.planes).items():
        np.testing.assert_array_equal(at, negative.planes[1].positions[name])


def test_the_search_finds_a_budget_within_the_limits(calibrator: Calibrators, spec: PersonaSpec) -> None:
    # The first budget tried holds not one group of so small a model: the search has to go up as well as down.
    settings = BuildSettings(max_perplexity_ratio=1.5, max_chat_kl=0.1, search_trials=8, n_steps=1)
    built = build_personas(calibrator(), spec, settings)
    assert built.report["poles"]["sociable"]["n_trials"] >= 2
    for pole in built.report["poles"].values():
        assert pole["budget_nats"] > 0
        assert 0 < pole["drift"]["chat_kl"] <= 0.1
        assert pole["drift"]["perplexity_ratio"] <= 1.5
        assert pole["n_trials"] <= 8
    with pytest.raises(SelectionError, match="raise the budget"):
        build_personas(calibrator(), spec, replace(settings, search_trials=1))


def test_a_larger_budget_takes_more_groups_and_drifts_further(calibrator: Calibrators, spec: PersonaSpec) -> None:
    small, large = (
        build_personas(calibrator(), spec, BuildSettings(budget=b)).report["poles"]["sociable"] for b in (0.01, 0.1)
    )
    assert small["share_of_units"] < large["share_of_units"]
    assert small["drift"]["chat_kl"] < large["drift"]["chat_kl"]


def test_a_mask_moves_held_out_answers_toward_its_pole(calibrator: Calibrators, spec: PersonaSpec) -> None:
    # Even random weights prefer one style: what the mask learnt on some prompts carries over to others.
    poles = build_personas(calibrator(), spec, BuildSettings(budget=0.1)).report["poles"]
    base = poles["sociable"]["held_out_base"]["mean_margin"]
    assert poles["sociable"]["held_out"]["mean_margin"] > base > poles["solitary"]["held_out"]["mean_margin"]


def test_composed_personas_report_the_drift_of_all_their_poles(calibrator: Calibrators) -> None:
    first, second = calibration_set(24), calibration_set(24, axis="TF", first=24)
    spec = PersonaSpec("two", (first, second), {"ET": ("E", "T"), "IF": ("I", "F"), "E": ("E",)})
    built = build_personas(calibrator(), spec, BuildSettings(budget=0.05))
    assert set(built.report["compositions"]) == {"ET", "IF"}
    single = built.report["poles"]["E"]["drift"]["chat_kl"]
    assert built.report["compositions"]["ET"]["chat_kl"] != pytest.approx(single, rel=1e-3)


def test_a_composition_keeps_within_its_limits_by_the_strengths_of_its_poles(calibrator: Calibrators) -> None:
    sets = (calibration_set(24), calibration_set(24, axis="TF", first=24))
    spec = PersonaSpec("two", sets, {"ET": ("E", "T"), "E": ("E",), "T": ("T",)})
    maker = calibrator()
    settings = BuildSettings(max_perplexity_ratio=None, max_chat_kl=0.05, n_steps=1)
    whole = build_personas(maker, spec, replace(settings, composition_limit=None))
    drift = whole.report["compositions"]["ET"]["chat_kl"]
    roomy = build_personas(maker, spec, replace(settings, composition_limit=1.01 * drift / 0.05))
    tight = build_personas(maker, spec, replace(settings, composition_limit=0.6 * drift / 0.05))
    assert whole.strengths == roomy.strengths == {}
    assert tight.report["compositions"]["ET"]["chat_kl"] <= 0.6 * drift
    assert tight.strengths.keys() == {"ET"}
    assert_same_personas(replace(tight, strengths={}, report=whole.report), whole)  # the poles are the same
    gates = [plane.gate for pole in tight.resolve("ET") for plane in pole.planes]
    assert gates == [pytest.approx(1 - strength) for strength in tight.strengths["ET"]]


def test_what_poles_do_to_one_another_is_measured_on_their_own_axes(
    calibrator: Calibrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (calibration_set(24), calibration_set(24, axis="TF", first=24))
    seen: list[Effects] = []

    def whole(measure: object, costs: NDArray[np.float64], effects: Effects) -> object:
        seen.append(effects)
        return np.ones(costs.shape[1])

    monkeypatch.setattr("persona_edge.build.strengths_within", whole)
    maker = calibrator()
    settings = BuildSettings(max_perplexity_ratio=None, max_chat_kl=0.05, n_steps=1)
    built = build_personas(maker, PersonaSpec("two", sets, {"EF": ("E", "F"), "E": ("E",), "F": ("F",)}), settings)
    (effects,) = seen
    planes = [pole.planes for pole in built.resolve("EF")]
    for i, (axis, sign) in enumerate(zip(sets, (1, -1), strict=True)):
        base, alone, both = (
            sign * margins_under(maker.model, axis.split()[0], on) for on in ((), planes[i], planes[0] + planes[1])
        )
        assert effects.before[i] == pytest.approx(base.mean() / base.std(), abs=1e-4)
        assert effects.alone[i] == pytest.approx((alone - base).mean() / base.std(), abs=1e-4)
        assert effects.beside[i, 1 - i] == pytest.approx((both - alone).mean() / base.std(), abs=1e-4)
        assert min(abs(effects.alone[i]), abs(effects.beside[i, 1 - i])) > 1e-3


def margins_under(model: TorchModel, contrasts_: CalibrationSet, planes: Sequence[Plane]) -> NDArray[np.float64]:
    """The margin of each contrast toward the positive pole."""
    pairs = [encode_contrast(model.tokenizer, contrast, i) for i, contrast in enumerate(contrasts_.contrasts)]
    with masked(model, planes):
        positive, negative = score_answers(model, pairs).levels
    return np.array(positive - negative, np.float64)


def test_poles_that_are_composed_leave_each_others_axes_alone(calibrator: Calibrators) -> None:
    one = calibration_set(24)
    many = [replace(c, prompt=f"{c.prompt} {'again ' * j}") for c in contrasts(12) for j in range(4)]
    half_turned = [
        replace(c, positive=c.negative, negative=c.positive) if i // 4 % 2 else c for i, c in enumerate(many)
    ]
    two = CalibrationSet("tiny-XY", "XY", "X", "Y", tuple(half_turned))
    poles = {name: (name,) for name in ("E", "I", "X", "Y")}
    alone, composed = (PersonaSpec("two", (one, two), {**poles, **more}) for more in ({}, {"EX": ("E", "X")}))
    maker = calibrator()
    x = maker.gate_benefits(two.split()[0])

    def moved(spec: PersonaSpec, settings: BuildSettings) -> float:
        built = build_personas(maker, spec, settings)
        return Other(x, x).moved_by(next(pole.planes for pole in built.poles if pole.name == "E"))

    budgets = [BuildSettings(budget=budget) for budget in (0.1, 0.15, 0.2, 0.3, 0.4)]
    before = [moved(alone, settings) for settings in budgets]
    after = [moved(composed, settings) for settings in budgets]
    assert moved(composed, replace(budgets[0], separate_axes=False)) == before[0]
    # A mask of few units cannot be balanced finely: single budgets are off by more or by less.
    assert np.abs(after).sum() < 0.6 * np.abs(before).sum()


def test_masked_models_are_asked_what_no_held_out_contrast_asks(
    calibrator: Calibrators, spec: PersonaSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[set[str], int]] = []

    class Probe(RepetitionProbe):
        def __init__(self, calibrator: Calibrator, prompts: Sequence[str]) -> None:
            super().__init__(calibrator, prompts)
            self.texts = set(prompts)

        def pairs(self, planes: Sequence[Plane], label: str = "") -> list[ContrastPair]:
            asked.append((self.texts, sum(plane.n_positions for plane in planes)))
            return super().pairs(planes, label)

    monkeypatch.setattr("persona_edge.build.RepetitionProbe", Probe)
    settings = BuildSettings(max_perplexity_ratio=1.2, max_chat_kl=None, n_steps=3, search_trials=3)
    build_personas(calibrator(), spec, replace(settings, avoid_repetition=False))
    assert not asked
    build_personas(calibrator(), spec, settings)
    calibration, held_out = ({c.prompt for c in part.contrasts} for part in spec.sets[0].split())
    sizes = [size for _, size in asked]
    assert 0 < sizes[0] < sizes[1]  # before the second step and before the third
    assert sizes[2] == 0  # what the unmasked model does by itself
    assert sizes[3] > sizes[1]  # the finished mask
    assert sizes.count(0) == 2  # so for both poles
    for texts, _ in asked:
        assert calibration <= texts
        assert not held_out & texts
        assert len(texts) > len(calibration)


def test_the_model_is_left_as_it_was(calibrator: Calibrators, model: TorchModel, spec: PersonaSpec) -> None:
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    build_personas(calibrator(), spec, BuildSettings(budget=0.03, amplify_gate=1.5))
    assert all(bool((tensor == before[name]).all()) for name, tensor in model.model.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [BuildSettings(budget=0.04), BuildSettings(max_perplexity_ratio=1.2, max_chat_kl=None, n_steps=2, search_trials=3)],
    ids=["a budget", "limits"],
)
def test_a_second_build_measures_nothing(
    settings: BuildSettings,
    calibrator: Calibrators,
    model: TorchModel,
    spec: PersonaSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = build_personas(calibrator(), spec, settings)

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("the model ran although everything is cached")

    monkeypatch.setattr(model.model, "forward", refuse)
    assert_same_personas(build_personas(calibrator(), spec, settings), first)


def test_cached_measurements_are_not_taken_for_those_of_another_mask(
    calibrator: Calibrators, spec: PersonaSpec, tmp_path: Path
) -> None:
    settings = BuildSettings(density=0.1)
    build_personas(calibrator(), spec, settings)
    shared = build_personas(calibrator(gate_fisher=False), spec, settings)
    alone = build_personas(calibrator(gate_fisher=False, cache=tmp_path), spec, settings)
    assert shared.report == alone.report


def test_excluded_tensors_keep_every_group(calibrator: Calibrators, spec: PersonaSpec) -> None:
    settings = BuildSettings(density=0.1, include=("ffn_*",), layers="1")
    built = build_personas(calibrator(), spec, settings)
    touched = {name for pole in built.poles for plane in pole.planes for name in plane.positions}
    assert touched == {f"blk.1.ffn_{part}.weight" for part in ("down", "gate", "up")}
    assert built.report["poles"]["sociable"]["share_of_units"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "granularity", "message"),
    [
        (BuildSettings(budget=0.1, density=0.1), 32, "--budget or --density, not both"),
        (BuildSettings(method="wanda", granularity=1), 1, "--density"),
        (BuildSettings(density=0.1, granularity=1), 32, "granularity 1"),
        (BuildSettings(composition_limit=0.0), 32, "a composition may not drift 0.0 times as far as a pole; give 2.5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: BuildSettings, granularity: Granularity, message: str, calibrator: Calibrators, spec: PersonaSpec
) -> None:
    with pytest.raises(InputError, match=message):
        build_personas(calibrator(granularity), spec, settings)


def test_a_set_too_small_to_hold_anything_out_is_refused_before_any_work(
    calibrator: Calibrators, spec: PersonaSpec, tmp_path: Path
) -> None:
    tiny = replace(spec.sets[0], contrasts=spec.sets[0].contrasts[:1])
    with pytest.raises(CalibrationError, match="add contrasts"):
        build_personas(calibrator(cache=tmp_path), replace(spec, sets=(tiny,)), BuildSettings(budget=0.1))
    assert not list(tmp_path.rglob("*.safetensors"))
