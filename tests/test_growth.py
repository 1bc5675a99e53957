"""A mask grows in steps: nested, measured again each time, within its share of the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona_edge.budget_search import Drift
from persona_edge.calibration import CalibrationSettings, Calibrator
from persona_edge.collect import Focus, collect_margins
from persona_edge.encoding import EncodedText, encode_contrast
from persona_edge.errors import SelectionError
from persona_edge.growth import AWAY, Growth, Limits, expected
from persona_edge.masks import Plane, merge_planes, planes_digest
from persona_edge.modeling import TorchModel
from persona_edge.packed_pairs import ContrastPair
from persona_edge.per_tensor import PerTensor
from persona_edge.pole_masks import Gates, Side, fisher_planes, tensor_damages
from persona_edge.selection import RankedPlanes, sum_over
from persona_edge.separation import Other
from tests.tiny_models import calibration_set, contrasts, load, one_thread, save_folder  # noqa: F401 - a fixture

FAST = CalibrationSettings(neutral_tokens=24, answer_tokens=6, max_batch_tokens=2048)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def calibrator(model: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> Calibrator:
    return Calibrator(model, "tiny", settings=FAST, folder=tmp_path_factory.mktemp("statistics"))


def plane(gate: float, **positions: list[int]) -> Plane:
    return Plane(gate, {name: np.array(at, np.uint32) for name, at in positions.items()})


def growth(
    calibrator: Calibrator, drift: Drift | None = None, n_steps: int = 3, amplify: float | None = None
) -> tuple[Growth, list[int]]:
    """A growth whose drift is a made-up function of how many groups are gated, and the sizes it was asked about."""
    names = [layer.name for layer in calibrator.layers]
    asked: list[int] = []

    def measure(planes: Sequence[Plane]) -> Drift:
        asked.append(sum(p.n_positions for p in planes))
        return drift or Drift(math.exp(asked[-1] * 1e-4), asked[-1] * 1e-4, asked[-1] * 1e-4)

    grower = Growth(
        calibrator,
        tensor_damages(calibrator.model, names, calibrator.damage()),
        measure,
        limits=Limits(1.03, None),
        gates=Gates(amplify=amplify),
        granularity=32,
        n_steps=n_steps,
        n_trials=8,
        n_contrasts=8,
        progress=lambda *_: None,
    )
    return grower, asked


def test_every_step_adds_groups_up_to_its_share_of_the_limits(calibrator: Calibrator) -> None:
    items = calibration_set(24)
    benefits = calibrator.gate_benefits(items)
    grown = [growth(calibrator, n_steps=n)[0].grow(items, benefits, "positive", "E") for n in (1, 3)]
    one, three = (sum(p.n_positions for p in g.planes) for g in grown)
    most = math.log(1.03) / 1e-4
    assert 0.5 * most < one <= most
    assert 0.5 * most < three <= most
    assert [len(g.steps) for g in grown] == [1, 3]
    assert planes_digest(grown[0].planes) != planes_digest(grown[1].planes)
    assert grown[1].budget == pytest.approx(sum(step.budget for step in grown[1].steps))
    assert grown[1].n_trials >= 3


def test_later_steps_measure_the_model_as_masked_so_far(
    calibrator: Calibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = calibration_set(24)
    benefits = calibrator.gate_benefits(items)
    before = {name: tensor.clone() for name, tensor in calibrator.model.model.state_dict().items()}
    seen: list[tuple[int, int]] = []
    margins = Calibrator.gate_benefits

    def watch(self: Calibrator, contrasts: object, **options: object) -> object:
        state = self.model.model.state_dict()
        changed = sum(int((tensor != before[name]).sum()) for name, tensor in state.items())
        seen.append((changed, len(contrasts)))  # type: ignore[arg-type]
        return margins(self, contrasts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Calibrator, "gate_benefits", watch)
    growth(calibrator)[0].grow(items, benefits, "negative", "I")
    assert len(seen) == 2
    assert 0 < seen[0][0] < seen[1][0]
    assert [n for _, n in seen] == [8, 8]
    state = calibrator.model.model.state_dict()
    assert all(bool((tensor == before[name]).all()) for name, tensor in state.items())


def test_later_steps_carry_what_earlier_ones_measured(calibrator: Calibrator, monkeypatch: pytest.MonkeyPatch) -> None:
    items = calibration_set(24)
    measured: list[dict[str, np.ndarray]] = [dict(calibrator.gate_benefits(items))]
    ranked: list[dict[str, np.ndarray]] = []
    measure, rank = Calibrator.gate_benefits, fisher_planes

    def watch_measuring(self: Calibrator, *arguments: Any, **options: Any) -> PerTensor:
        found = measure(self, *arguments, **options)
        measured.append(dict(found))
        return found

    def watch_ranking(benefits: Mapping[str, np.ndarray], *arguments: Any, **options: Any) -> Any:
        ranked.append(dict(benefits))
        return rank(benefits, *arguments, **options)

    monkeypatch.setattr(Calibrator, "gate_benefits", watch_measuring)
    monkeypatch.setattr("persona_edge.growth.fisher_planes", watch_ranking)
    growth(calibrator)[0].grow(items, measured[0], "positive", "E")
    assert (len(measured), len(ranked)) == (3, 5)  # a later step ranks once to know the price, once with it
    ranked = [ranked[0], ranked[1], ranked[3]]

    def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([values.ravel() for values in arrays.values()]).astype(np.float64)

    expected = flat(measured[0])
    np.testing.assert_array_equal(flat(ranked[0]), expected)
    for step in (1, 2):
        now = flat(measured[step])
        expected = now + 0.7 * np.linalg.norm(now) / np.linalg.norm(expected) * expected
        np.testing.assert_allclose(flat(ranked[step]), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_later_steps_pay_for_what_they_add_to_the_drift(
    side: Side, calibrator: Calibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = calibration_set(24)
    ranked: list[tuple[dict[str, np.ndarray], RankedPlanes]] = []
    gradients: list[dict[str, np.ndarray]] = []
    drift, rank = Calibrator.drift_gradient, fisher_planes

    def watch_drift(self: Calibrator, *arguments: Any, **options: Any) -> PerTensor:
        found = drift(self, *arguments, **options)
        gradients.append(dict(found))
        return found

    def watch_ranking(benefits: Mapping[str, np.ndarray], *arguments: Any, **options: Any) -> RankedPlanes:
        found = rank(benefits, *arguments, **options)
        ranked.append((dict(benefits), found))
        return found

    monkeypatch.setattr("persona_edge.growth.DRIFT_PRICE", 1.0)  # so small a model's few groups need a high one
    monkeypatch.setattr(Calibrator, "drift_gradient", watch_drift)
    monkeypatch.setattr("persona_edge.growth.fisher_planes", watch_ranking)
    grower, _ = growth(calibrator)
    grown = grower.grow(items, calibrator.gate_benefits(items), side, "E or I")
    assert len(gradients) == 2
    for step, gradient in enumerate(gradients, start=1):
        (before, plainly), (after, charged) = ranked[2 * step - 1 : 2 * step + 1]
        budget = grown.steps[step - 1].budget
        gain = sum(sum_over(before, plane.positions) for plane in plainly.take(budget))
        for name, own in before.items():
            charge = gain / budget * gradient[name]
            # Nothing is paid for undoing drift, and nobody pays more than the whole of a benefit.
            expected = np.sign(own) * np.clip(np.abs(own) + np.minimum(np.sign(own) * charge, 0), 0, None)
            np.testing.assert_allclose(after[name], expected, rtol=1e-3, atol=1e-5 * np.abs(own).max())
            assert (np.abs(after[name]) <= np.abs(own)).all()
        added = [-sum(sum_over(gradient, plane.positions) for plane in r.take(budget)) for r in (plainly, charged)]
        assert added[1] < added[0]


def test_later_steps_still_amplify(calibrator: Calibrator) -> None:
    items = calibration_set(24)
    grower, _ = growth(calibrator, amplify=2.0)
    benefits = calibrator.gate_benefits(items)
    counts = []
    for n_steps in (1, 3):
        grower.n_steps = n_steps
        grown = grower.grow(items, benefits, "positive", "E")
        counts.append({plane.gate: plane.n_positions for plane in grown.planes})
    first, all_steps = counts
    assert all_steps[2.0] > 0.6 * first[2.0] > 0
    assert all_steps[0.0] > 0


def test_a_model_that_breaks_at_once_is_an_error(calibrator: Calibrator) -> None:
    items = calibration_set(24)
    grower, _ = growth(calibrator, Drift(5.0, 9.0, 2.0))
    with pytest.raises(SelectionError):
        grower.grow(items, calibrator.gate_benefits(items), "positive", "E")


def test_shares_of_limits_and_what_chat_weighs() -> None:
    limits = Limits(1.02, 0.2)
    assert limits.share(0.5).max_perplexity_ratio == pytest.approx(math.sqrt(1.02))
    assert limits.share(0.5).max_chat_kl == pytest.approx(0.1)
    assert limits.chat_weight == pytest.approx(math.log(1.02) / 0.2)
    assert Limits(None, 0.2).chat_weight == Limits(1.02, None).chat_weight


def test_a_lucky_perplexity_does_not_hide_drift_and_an_unlucky_one_is_not_taken_at_its_word() -> None:
    assert expected(Drift(0.98, 0.1, 0.02)).perplexity_ratio == pytest.approx(math.exp(0.02))
    unlucky = expected(Drift(math.exp(0.05), 0.1, 0.02))
    assert math.log(unlucky.perplexity_ratio) == pytest.approx(0.02 + 0.4 * 0.03)
    assert expected(Drift(1.5, 0.1)).perplexity_ratio == 1.5
    for broken in (Drift(math.inf, 1.0, 3.0), Drift(2.0, 1.0, 1e4), Drift(math.nan, 1.0, math.nan)):
        assert expected(broken).perplexity_ratio == math.inf


def test_planes_merge_by_gate() -> None:
    merged = merge_planes([plane(0, a=[1, 5])], [plane(0, a=[3], b=[2]), plane(2, a=[7])])
    assert [(p.gate, {n: list(at) for n, at in p.positions.items()}) for p in merged] == [
        (0, {"a": [1, 3, 5], "b": [2]}),
        (2, {"a": [7]}),
    ]


def test_focus_counts_what_is_not_won_yet() -> None:
    margins = torch.tensor([-2.0, 0.5, 4.0])
    weights = Focus(1).weights(margins)
    assert weights[1] == pytest.approx(0.5)
    assert weights[0] > 0.98
    assert weights[2] < 0.01
    assert torch.allclose(Focus(-1).weights(-margins), weights)


def test_a_focused_gradient_is_that_of_weighted_margins(model: TorchModel, one_thread: Path) -> None:  # noqa: F811
    pairs = [encode_contrast(model.tokenizer, c, i) for i, c in enumerate(contrasts(3))]
    focus = Focus(1, enough=0.1, sharpness=3.0)
    found = collect_margins(model, model.layers, pairs, focus=focus)
    expected: dict[str, np.ndarray] = {}
    for pair in pairs:
        single = collect_margins(model, model.layers, [pair]).sums["gate_gradient"]
        weighted = collect_margins(model, model.layers, [pair], focus=focus).sums["gate_gradient"]
        for name in single:
            expected[name] = expected.get(name, 0) + weighted[name]
        largest = max(single, key=lambda name: float(np.abs(single[name]).max()))
        ratio = np.abs(weighted[largest]).max() / np.abs(single[largest]).max()
        assert 0 < ratio < 1
    for name, values in expected.items():
        np.testing.assert_allclose(found.sums["gate_gradient"][name], values, rtol=1e-3, atol=1e-6)
    assert set(found.sums) == {"gate_gradient"}


def test_a_mask_does_not_depend_on_those_grown_before(calibrator: Calibrator) -> None:
    items = calibration_set(24)
    benefits = calibrator.gate_benefits(items)
    alone = growth(calibrator)[0].grow(items, benefits, "positive", "E")
    grower = growth(calibrator)[0]
    grower.grow(items, benefits, "negative", "I")
    after = grower.grow(items, benefits, "positive", "E")
    assert planes_digest(after.planes) == planes_digest(alone.planes)
    assert after.steps == alone.steps


def _noisy(values: NDArray[np.float32]) -> NDArray[np.float32]:
    noise = np.random.default_rng(values.size).standard_normal(values.shape)
    return values + np.float32(values.std()) * noise.astype(np.float32)


class _Probe:
    """Stands for a RepetitionProbe: mostly, what serves the pole makes replies go round.

    Masks that are asked about for the first time have `counts` loops, in this order; no mask has 5.
    """

    def __init__(self, benefits: Mapping[str, NDArray[np.float32]], counts: Sequence[int]) -> None:
        self.counts = list(counts)
        self.found: dict[str, list[ContrastPair]] = {planes_digest(()): self._loops(0, 5)}
        self.asked: list[int] = []
        self.learned_from: list[tuple[int, int]] = []
        self.away: list[float] = []
        self.benefits = benefits

    def _loops(self, mask: int, n: int) -> list[ContrastPair]:
        text = EncodedText((1, mask), 1)
        return [(text, text)] * n

    def pairs(self, planes: Sequence[Plane], label: str = "") -> list[ContrastPair]:
        mask = planes_digest(planes)
        if mask not in self.found:
            self.asked.append(_size(planes))
            self.found[mask] = self._loops(len(self.asked), self.counts.pop(0))
        return self.found[mask]

    def others(
        self, pairs: Sequence[ContrastPair], planes: Sequence[Plane], *, away: float, label: str
    ) -> Sequence[Other]:
        if not pairs:
            return ()
        self.learned_from.append((len(pairs), _size(planes)))
        self.away.append(away)
        x = {name: _noisy(-values) for name, values in self.benefits.items()}
        return [Other(x, x, -len(pairs) / 10, one_way=True)]


def _size(planes: Sequence[Plane]) -> int:
    return sum(plane.n_positions for plane in planes)


def test_later_steps_are_kept_from_repetition_beside_the_other_axes(
    calibrator: Calibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = calibration_set(24)
    benefits = calibrator.gate_benefits(items)
    mixed = {name: _noisy(_noisy(values)) for name, values in benefits.items()}
    axis = Other(mixed, mixed)
    given: list[Sequence[Other]] = []
    rank = fisher_planes

    def watch(*arguments: Any, **options: Any) -> RankedPlanes:
        given.append(options["others"])
        return rank(*arguments, **options)

    monkeypatch.setattr("persona_edge.growth.fisher_planes", watch)
    probe = _Probe(benefits, [1, 2, 7])
    grown = growth(calibrator)[0].grow(items, benefits, "positive", "E", others=[axis], repetition=probe)  # type: ignore[arg-type]
    assert [len(others) for others in given] == [1, 2, 2, 2, 2]  # a later step ranks twice
    assert all(others[0] is axis for others in given)
    assert 0 < probe.asked[0] < probe.asked[1] < _size(grown.planes)
    assert probe.learned_from == [(1, probe.asked[0]), (3, probe.asked[1])]  # earlier steps' loops count too
    assert probe.asked[2:] == [_size(grown.planes)]  # it has hardly more than no mask
    without = growth(calibrator)[0].grow(items, benefits, "positive", "E", others=[axis])
    assert planes_digest(without.planes) != planes_digest(grown.planes)


@pytest.mark.parametrize(("counts", "best"), [((9, 4), 3), ((9, 8, 10), 3), ((9, 10, 8), 4), ((9, 9, 9), 2)], ids=str)
def test_a_last_step_that_leads_into_loops_is_taken_again(
    counts: tuple[int, ...], best: int, calibrator: Calibrator
) -> None:
    items = calibration_set(24)
    benefits = calibrator.gate_benefits(items)
    probe = _Probe(benefits, [1, 2, *counts])
    grown = growth(calibrator)[0].grow(items, benefits, "positive", "E", repetition=probe)  # type: ignore[arg-type]
    assert not probe.counts
    assert list(probe.found).index(planes_digest(grown.planes)) == best + 1  # after no mask and two steps
    assert len(grown.steps) == 3
    assert probe.away == [0, 0, *AWAY[: len(counts) - 1]]
    before = probe.asked[1]
    known = 3
    for i, n in enumerate(counts[:-1]):  # each time the loops of the mask just found are known too
        known += n
        assert probe.learned_from[2 + i] == (known, before)
