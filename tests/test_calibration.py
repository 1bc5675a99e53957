"""Statistics that are computed once: cached under everything they depend on, and resumed after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge import calibration
from persona_edge.calibration import CalibrationSettings, Calibrator, Progress, read_json, silent, write_json
from persona_edge.collect import collect_drift, collect_margins
from persona_edge.contrasts import CalibrationSet
from persona_edge.encoding import EncodedText, pad
from persona_edge.errors import CalibrationError, OutputError
from persona_edge.masks import Plane
from persona_edge.modeling import TorchModel
from persona_edge.persona_sets import neutral_prompts, neutral_texts
from persona_edge.statistics import Statistics
from tests.tiny_models import (
    calibration_set,
    contrast_pairs,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
)

FAST = CalibrationSettings(neutral_tokens=20, answer_tokens=5, max_batch_tokens=140)
FINGERPRINT = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def answered(model: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the model's answers already, as most runs find it."""
    folder = tmp_path_factory.mktemp("statistics")
    Calibrator(model, FINGERPRINT, settings=FAST, folder=folder).neutral_turns()
    return folder


@pytest.fixture
def checkpoint_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)


class Refusal:
    """Stands for the model's forward pass where there must be none."""

    def __call__(self, *_args: object, **_options: object) -> None:
        raise AssertionError("the model ran although everything is cached")


def assert_identical(a: Statistics, b: Statistics) -> None:
    assert (a.kind, a.counts, a.tensors, a.sums.keys()) == (b.kind, b.counts, b.tensors, b.sums.keys())
    for field, tensors in a.sums.items():
        for name, values in tensors.items():
            np.testing.assert_array_equal(values, b.sums[field][name], err_msg=f"{field} {name}")


def assert_same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def make(
    model: TorchModel, folder: Path, settings: CalibrationSettings = FAST, progress: Progress = silent
) -> Calibrator:
    return Calibrator(model, FINGERPRINT, settings=settings, folder=folder, progress=progress)


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*{suffix}"))


def test_margins_are_those_of_all_contrasts_at_once(model: TorchModel, tmp_path: Path) -> None:
    found = make(model, tmp_path).margins(calibration_set(12))
    together = collect_margins(model, model.layers, contrast_pairs(model, 12))
    assert found.counts["batches"] > 3
    assert {**found.counts, "batches": 1} == together.counts
    for name, values in together.sums["gate_gradient"].items():
        np.testing.assert_allclose(found.sums["gate_gradient"][name], values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", ["margins", "damage", "turns"])
def test_the_second_time_nothing_runs(
    what: str, model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> object:
        calibrator = make(model, tmp_path)
        if what == "margins":
            return [calibrator.margins(calibration_set(4))]
        return [calibrator.damage().web, calibrator.damage().chat] if what == "damage" else calibrator.neutral_turns()

    first = run()
    monkeypatch.setattr(model.model, "forward", Refusal())
    second = run()
    if what == "turns":
        assert first == second
    else:
        assert isinstance(first, list)
        assert isinstance(second, list)
        for a, b in zip(first, second, strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, folder: Calibrator(m, "f" * 64, settings=FAST, folder=folder),
        lambda m, folder: Calibrator(m, FINGERPRINT, settings=FAST, folder=folder, layers=m.layers[1:]),
        lambda m, folder: make(m, folder, replace(FAST, granularity=1)),
        lambda m, folder: make(m, folder, replace(FAST, seed=1)),
    ],
    ids=["weights", "layers", "granularity", "seed"],
)
def test_other_settings_find_nothing_in_the_cache(
    change: Callable[[TorchModel, Path], Calibrator], model: TorchModel, tmp_path: Path
) -> None:
    make(model, tmp_path).margins(calibration_set(4))
    change(model, tmp_path).margins(calibration_set(4))
    assert len(files(tmp_path, ".safetensors")) == 2


def test_other_contrasts_find_nothing_in_the_cache(model: TorchModel, tmp_path: Path) -> None:
    calibrator = make(model, tmp_path)
    calibrator.margins(calibration_set(4))
    calibrator.margins(calibration_set(4, first=1))
    assert len(files(tmp_path, ".safetensors")) == 2
    calibrator.margins(replace(calibration_set(4), name="renamed"))
    assert len(files(tmp_path, ".safetensors")) == 2


class StoppedError(KeyboardInterrupt):
    """Ctrl-C, told apart from a real one."""


def interrupting(after: int) -> Progress:
    """Raises at the start of batch number `after` of the contrasts or the web text."""
    seen = 0

    def progress(label: str, done: int, total: int) -> None:
        nonlocal seen
        if label.startswith(("contrasts", "neutral web")) and done < total:
            seen += 1
            if seen > after:
                raise StoppedError

    return progress


def counting(calls: list[str]) -> Progress:
    def progress(label: str, done: int, total: int) -> None:
        if label.startswith(("contrasts", "neutral web")) and done < total:
            calls.append(label)

    return progress


@pytest.mark.parametrize("what", ["margins", "damage"])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.usefixtures("checkpoint_after_every_batch")
def test_an_interrupted_run_goes_on_where_it_was(
    what: str, after: int, model: TorchModel, answered: Path, tmp_path: Path
) -> None:
    copy_turns(answered, tmp_path)

    def run(calibrator: Calibrator) -> Statistics:
        return calibrator.margins(calibration_set(12)) if what == "margins" else calibrator.damage().web

    with pytest.raises(StoppedError):
        run(make(model, tmp_path, progress=interrupting(after)))
    assert len(files(tmp_path, ".partial")) == (after > 0)
    assert not files(tmp_path, ".safetensors")

    calls: list[str] = []
    resumed = run(make(model, tmp_path, progress=counting(calls)))
    copy_turns(answered, tmp_path / "anew")
    uninterrupted = run(make(model, tmp_path / "anew"))
    assert len(calls) == uninterrupted.counts["batches"] - after
    assert_identical(resumed, uninterrupted)
    assert not files(tmp_path, ".partial")


def copy_turns(source: Path, target: Path) -> None:
    for path in files(source, ".json"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


@pytest.mark.usefixtures("checkpoint_after_every_batch")
def test_a_damaged_checkpoint_is_started_over(model: TorchModel, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        make(model, tmp_path, progress=interrupting(2)).margins(calibration_set(8))
    (partial,) = files(tmp_path, ".partial")
    partial.write_bytes(partial.read_bytes()[:-7])
    resumed = make(model, tmp_path).margins(calibration_set(8))
    assert_identical(resumed, make(model, tmp_path / "anew").margins(calibration_set(8)))


def test_no_checkpoint_is_written_before_its_time(model: TorchModel, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        make(model, tmp_path, progress=interrupting(3)).margins(calibration_set(12))
    assert not files(tmp_path, ".partial")


def test_gate_benefits_are_the_margins_gradients_from_the_disk(model: TorchModel, tmp_path: Path) -> None:
    items = calibration_set(6)
    found = make(model, tmp_path).gate_benefits(items)
    statistics = make(model, tmp_path).margins(items)
    assert tuple(found) == statistics.tensors
    for name, gradient in statistics.mean("gate_gradient", "contrasts").items():
        np.testing.assert_array_equal(found[name], -gradient)


def test_drift_gradients_are_of_both_texts_weighted_and_from_the_disk(model: TorchModel, answered: Path) -> None:
    planes = (Plane(0, {model.layers[0].name: np.arange(0, 40, 3, dtype=np.uint32)}),)
    calls: list[tuple[str, int, int]] = []
    calibrator = make(model, answered, progress=lambda *call: calls.append(call))
    weighted, web = (
        calibrator.drift_gradient(planes, mask="m", chat_weight=weight, label="E, step 2") for weight in (0.3, 0.0)
    )
    assert {label for label, _, _ in calls} == {"web text E, step 2", "chat turns E, step 2"}
    data = calibrator.neutral_data()
    for texts, other in ((data.web, web), (data.chat, None)):
        sums = merged_drift(model, texts, planes)
        for name, values in sums.items():
            found = web[name] if other is not None else (weighted[name] - web[name]) / np.float32(0.3)
            np.testing.assert_allclose(found, values, rtol=1e-3, atol=1e-3 * np.abs(values).max())
    n_calls = len(calls)
    assert_same(calibrator.drift_gradient(planes, mask="m", chat_weight=0.3), weighted)
    assert len(calls) == n_calls  # read, not measured
    calibrator.drift_gradient((), mask="another", chat_weight=0.3)
    assert len(calls) > n_calls


def merged_drift(
    model: TorchModel, texts: Sequence[EncodedText], planes: Sequence[Plane]
) -> dict[str, NDArray[np.float32]]:
    """Mean per token of the drift's gradient, text by text."""
    parts = [collect_drift(model, model.layers, pad([text], "cpu"), planes) for text in texts]
    n = sum(part.counts["tokens"] for part in parts)
    return {
        layer.name: np.sum([part.sums["drift_gradient"][layer.name] for part in parts], axis=0) / n
        for layer in model.layers
    }


def test_margins_by_halves_are_the_margins_and_are_kept_by_halves(model: TorchModel, tmp_path: Path) -> None:
    items = calibration_set(12)
    found = make(model, tmp_path).margins_by_halves(items)
    whole = make(model, tmp_path / "anew").margins(items)
    assert {**found.counts, "batches": 0} == {**whole.counts, "batches": 0}
    for field, tensors in whole.sums.items():
        for name, values in tensors.items():
            np.testing.assert_allclose(found.sums[field][name], values, rtol=1e-4, atol=1e-4 * np.abs(values).max())
    calls: list[str] = []
    maker = make(model, tmp_path, progress=lambda label, done, total: calls.append(label))
    assert len(maker.benefits_of_halves(items)) == 2
    benefits = maker.benefits_by_halves(items)
    gradient = whole.mean("gate_gradient", "contrasts")
    for name, values in benefits.items():
        np.testing.assert_allclose(values, -gradient[name], rtol=1e-4, atol=1e-4 * np.abs(gradient[name]).max())
    assert not calls  # read, not measured


def test_one_contrast_has_no_halves(model: TorchModel, tmp_path: Path) -> None:
    one = calibration_set(1)
    assert make(model, tmp_path).margins_by_halves(one).counts["contrasts"] == 1
    assert_same(make(model, tmp_path).benefits_by_halves(one), make(model, tmp_path).gate_benefits(one))


def test_progress_ends_at_its_total(model: TorchModel, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    make(model, tmp_path, progress=lambda *call: seen.append(call)).margins(calibration_set(12))
    assert {label for label, _, _ in seen} == {"contrasts EI"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[0] == ("contrasts EI", 0, 12)
    assert seen[-1] == ("contrasts EI", 12, 12)


def test_neutral_data_is_divided_between_damage_and_measuring(model: TorchModel, answered: Path) -> None:
    data = make(model, answered).neutral_data()
    assert len(data.web) + len(data.held_out_web) == len(neutral_texts())
    assert len(data.held_out_web) == -(-len(neutral_texts()) // 3)
    assert not set(data.web) & set(data.held_out_web)
    assert not set(data.chat) & set(data.held_out_chat)
    assert all(text.n_scored <= 20 for text in (*data.web, *data.held_out_web))


def test_the_models_own_answers_are_the_chat_turns(model: TorchModel, answered: Path, tmp_path: Path) -> None:
    turns = make(model, answered).neutral_turns()
    assert tuple(prompt for prompt, _ in turns) == neutral_prompts()
    assert turns == make(model, tmp_path).neutral_turns()
    assert turns != make(model, tmp_path, replace(FAST, seed=7)).neutral_turns()


def test_nothing_to_calibrate_on_is_an_error(model: TorchModel, tmp_path: Path) -> None:
    empty = CalibrationSet("none", "EI", "E", "I", ())
    with pytest.raises(CalibrationError, match="nothing to calibrate on"):
        make(model, tmp_path).margins(empty)


def test_a_cache_that_cannot_be_written_is_found_out_before_the_work(model: TorchModel, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OutputError, match="PERSONA_EDGE_CACHE"):
        make(model, blocked)


def test_cached_values_need_their_key(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": (1, 2)}, [0.5])
    assert read_json(path, {"a": [1, 2]}) == [0.5]
    assert read_json(path, {"a": [1, 3]}) is None
    assert read_json(tmp_path / "none.json", {}) is None
    for text in ("", "[]", '{"key": {"a": [1, 2]}', json.dumps({"key": {}, "value": 1})):
        path.write_text(text)
        assert read_json(path, {"a": [1, 2]}) is None


def test_a_value_is_computed_once_per_key(model: TorchModel, tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> object:
        calls.append(1)
        return {"n": len(calls)}

    for calibrator in (make(model, tmp_path), make(model, tmp_path)):
        assert calibrator.cached_json("drift", {"mask": "a"}, compute) == {"n": 1}
    assert make(model, tmp_path).cached_json("drift", {"mask": "b"}, compute) == {"n": 2}
    assert make(model, tmp_path).cached_json("margins", {"mask": "a"}, compute) == {"n": 3}
