"""Planes by every published method, against the formulas written out on statistics made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.calibration import DamageStatistics
from persona_edge.errors import CalibrationError, InputError
from persona_edge.masks import Granularity, Plane
from persona_edge.modeling import TorchModel
from persona_edge.pole_masks import Gates, Method, Side, fisher_planes, paper_planes, tensor_damages
from persona_edge.selection import n_overlapping, sum_over
from persona_edge.statistics import Statistics
from tests.tiny_models import load, save_folder

Floats = NDArray[np.float32]
NAMES = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
SIDES: tuple[Side, Side] = ("positive", "negative")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny")))


def shapes(model: TorchModel) -> dict[str, tuple[int, int]]:
    return {name: (model.layer(name).shape.n_rows, model.layer(name).shape.n_columns) for name in NAMES}


def damage_statistics(model: TorchModel, seed: int, *, gates: bool = True) -> Statistics:
    rng = np.random.default_rng(seed)
    fields = ("input_square", "output_gradient_square", "gate_gradient_square")
    sums: dict[str, dict[str, Floats]] = {field: {} for field in fields}
    for name, (n_rows, n_columns) in shapes(model).items():
        sums["input_square"][name] = rng.random(n_columns).astype(np.float32) * 40
        sums["output_gradient_square"][name] = rng.random(n_rows).astype(np.float32)
        sums["gate_gradient_square"][name] = rng.random((n_rows, n_columns // 32)).astype(np.float32)
    if not gates:
        del sums["gate_gradient_square"]
    return Statistics("damage", {"tokens": 10 * seed, "batches": 1}, sums)


def margin_statistics(model: TorchModel, seed: int = 0, *, granularity: int = 32) -> Statistics:
    rng = np.random.default_rng(seed)
    sums: dict[str, dict[str, Floats]] = {"gate_gradient": {}}
    n = {"positive": 50, "negative": 70}
    for name, (n_rows, n_columns) in shapes(model).items():
        sums["gate_gradient"][name] = rng.standard_normal((n_rows, n_columns // granularity)).astype(np.float32)
        for side in SIDES:
            x = rng.standard_normal((n[side], n_columns)) * rng.random(n_columns) * 3 + rng.standard_normal(n_columns)
            for field, values in (("abs", np.abs(x)), ("sum", x), ("square", x**2)):
                sums.setdefault(f"{side}_{field}", {})[name] = values.sum(0).astype(np.float32)
    counts = {"contrasts": 20, "batches": 1, "positive_tokens": n["positive"], "negative_tokens": n["negative"]}
    return Statistics("margin", counts, sums)


def positions(planes: tuple[Plane, ...]) -> Mapping[str, NDArray[np.uint32]]:
    (plane,) = planes
    return plane.positions


@pytest.mark.parametrize("granularity", [32, 1])
def test_damage_is_kfac_plus_the_gates_own_fisher_for_each_text(model: TorchModel, granularity: Granularity) -> None:
    web, chat = damage_statistics(model, 1), damage_statistics(model, 2)
    found = tensor_damages(model, NAMES, DamageStatistics(web, chat), granularity=granularity)
    for statistics, damage in ((web, found.web), (chat, found.chat)):
        n = statistics.counts["tokens"]
        for name in NAMES:
            x, delta = (statistics.sums[field][name] / n for field in ("input_square", "output_gradient_square"))
            each = 0.5 * delta[:, None] * model.layer(name).weights() ** 2 * x
            expected = each.reshape(len(each), -1, granularity).sum(-1)
            if granularity == 32:
                expected = expected + 0.5 * statistics.sums["gate_gradient_square"][name] / n
            np.testing.assert_allclose(damage[name], expected, rtol=1e-5)
    weighted = found.weighted(1, 0.15)
    for name in NAMES:
        np.testing.assert_allclose(weighted[name], found.web[name] + 0.15 * found.chat[name], rtol=1e-5)


def test_without_the_gates_own_fisher_damage_is_kfac_alone(model: TorchModel) -> None:
    both = DamageStatistics(damage_statistics(model, 1), damage_statistics(model, 2))
    bare = DamageStatistics(damage_statistics(model, 1, gates=False), damage_statistics(model, 2, gates=False))
    mixed = DamageStatistics(both.web, bare.chat)
    whole, alone, one = (tensor_damages(model, NAMES, statistics).web for statistics in (both, bare, mixed))
    assert all((alone[name] < whole[name]).all() for name in NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(one[name], alone[name])  # half a Fisher would favour one of the texts


def test_damage_without_tokens_is_an_error(model: TorchModel) -> None:
    empty = DamageStatistics(damage_statistics(model, 0), damage_statistics(model, 1))
    with pytest.raises(CalibrationError, match="no tokens"):
        tensor_damages(model, NAMES, empty)


def test_units_that_are_gated_already_stay_out(model: TorchModel) -> None:
    benefits, damage = fisher_inputs(model)
    first = fisher_planes(benefits, damage, "positive", Gates(), 32).take_density(0.1)
    second = fisher_planes(benefits, damage, "positive", Gates(), 32, gated=first).take_density(0.1)
    assert n_overlapping(first[0].positions, second[0].positions) == 0


def fisher_inputs(model: TorchModel) -> tuple[Mapping[str, Floats], Mapping[str, Floats]]:
    """Benefits toward the positive pole and damage, per tensor."""
    statistics = DamageStatistics(damage_statistics(model, 1), damage_statistics(model, 2))
    gradients = margin_statistics(model).mean("gate_gradient", "contrasts")
    benefits = {name: -gradients[name] for name in gradients}
    return benefits, tensor_damages(model, NAMES, statistics).weighted(1, 1)


def test_fisher_takes_the_groups_whose_closing_raises_the_margin_within_the_budget(model: TorchModel) -> None:
    benefits, damage = fisher_inputs(model)
    for side, sign in (("positive", 1), ("negative", -1)):
        chosen = positions(fisher_planes(benefits, damage, cast(Side, side), Gates(), 32).take(1.0))
        assert 0.9 < sum_over(damage, chosen) <= 1.0
        for name, at in chosen.items():
            assert (sign * benefits[name].ravel()[at] > 0).all()


def test_fisher_prefers_more_benefit_per_damage(model: TorchModel) -> None:
    benefits, damage = fisher_inputs(model)
    chosen = positions(fisher_planes(benefits, damage, "positive", Gates(), 32).take(1.0))
    taken, left = [], []
    for name in NAMES:
        ratio = (benefits[name] / (damage[name] + 1e-10)).ravel()
        inside = np.isin(np.arange(ratio.size), chosen[name])
        taken.append(ratio[inside])
        left.append(ratio[~inside])
    assert np.concatenate(taken).min() >= np.concatenate(left).max() * 0.999


def test_the_poles_of_fisher_and_sparse_are_disjoint(model: TorchModel) -> None:
    benefits, damage = fisher_inputs(model)
    ranked = [positions(fisher_planes(benefits, damage, side, Gates(), 32).take_density(0.4)) for side in SIDES]
    assert n_overlapping(*ranked) == 0
    sparse = [make(model, "contrastive-sparse", side, 0.3) for side in SIDES]
    assert n_overlapping(*sparse) == 0
    assert sum(map(len, sparse[0].values())) == round(0.3 * 64 * 64) + round(0.3 * 64 * 96)


def test_amplified_groups_help_the_pole_too(model: TorchModel) -> None:
    benefits, damage = fisher_inputs(model)
    suppress, amplify = fisher_planes(benefits, damage, "positive", Gates(0.25, 2.0), 32).take(1.0)
    assert (suppress.gate, amplify.gate) == (0.25, 2.0)
    for plane, sign in ((suppress, 1), (amplify, -1)):
        for name, at in plane.positions.items():
            assert (sign * benefits[name].ravel()[at] > 0).all()


def make(model: TorchModel, method: Method, side: Side, amount: float) -> Mapping[str, NDArray[np.uint32]]:
    maker = paper_planes(model, NAMES, margin_statistics(model), method=method, side=side, gate=0.2)
    (plane,) = maker(amount)
    assert (plane.gate, plane.granularity) == (0.2, 1)
    return plane.positions


def channels(statistics: Statistics, name: str, side: Side) -> tuple[Floats, Floats, Floats]:
    """mean |x|, mean x, variance of x per input channel."""
    n = statistics.counts[f"{side}_tokens"]
    a, s, q = (statistics.sums[f"{side}_{field}"][name].astype(np.float64) / n for field in ("abs", "sum", "square"))
    return a.astype(np.float32), s.astype(np.float32), (q - s**2).astype(np.float32)


def lowest_of_each_row(scores: NDArray[np.floating[Any]], share: float) -> set[int]:
    n = scores.shape[1] - round((1 - share) * scores.shape[1])
    order = np.argsort(scores, axis=1, kind="stable")[:, :n]
    return {int(row * scores.shape[1] + column) for row, columns in enumerate(order) for column in columns}


@pytest.mark.parametrize("side", SIDES)
def test_wanda_suppresses_the_lowest_products_of_weight_and_activation(model: TorchModel, side: Side) -> None:
    chosen, statistics = make(model, "wanda", side, 0.25), margin_statistics(model)
    for name in NAMES:
        scores = np.abs(model.layer(name).weights()) * channels(statistics, name, side)[0]
        assert set(chosen[name].tolist()) == lowest_of_each_row(scores, 0.25)


@pytest.mark.parametrize("side", SIDES)
def test_contrastive_wanda_keeps_channels_that_are_higher_for_its_pole(model: TorchModel, side: Side) -> None:
    chosen, statistics = make(model, "contrastive-wanda", side, 0.25), margin_statistics(model)
    other: Side = "negative" if side == "positive" else "positive"
    for name in NAMES:
        (_, mine, var_mine), (_, theirs, var_theirs) = (channels(statistics, name, s) for s in (side, other))
        contrast = np.maximum((mine - theirs) / (np.sqrt(var_mine + var_theirs) + 1e-6), 0)
        scores = np.abs(model.layer(name).weights()) * contrast
        kept = scores.ravel().copy()
        kept[chosen[name]] = np.inf
        lowest_kept = kept.reshape(scores.shape).min(1)
        highest_suppressed = np.where(np.isinf(kept.reshape(scores.shape)), scores, -1).max(1)
        assert (highest_suppressed <= lowest_kept * (1 + 1e-5)).all()
        assert len(chosen[name]) == scores.shape[0] * (scores.shape[1] - round(0.75 * scores.shape[1]))


@pytest.mark.parametrize(("side", "sign"), [("positive", 1), ("negative", -1)])
def test_contrastive_sparse_suppresses_what_most_belongs_to_the_other_pole(
    model: TorchModel, side: Side, sign: int
) -> None:
    chosen, statistics = make(model, "contrastive-sparse", side, 0.2), margin_statistics(model)
    for name in NAMES:
        weights = np.abs(model.layer(name).weights()).astype(np.float64)
        shares = [weights * channels(statistics, name, s)[0] for s in SIDES]
        mine, other = (each / each.sum(1, keepdims=True) for each in shares)
        claim = (sign * (other - mine)).ravel()  # how much more the weight is the other pole's
        suppressed = np.isin(np.arange(claim.size), chosen[name])
        assert claim[suppressed].min() >= claim[~suppressed].max() - 1e-7
        assert (claim[suppressed] > 0).all()


@pytest.mark.parametrize("amount", [0.0, 1.0, 1.5, -0.1])
def test_a_share_outside_zero_and_one_is_refused(model: TorchModel, amount: float) -> None:
    with pytest.raises(InputError, match="--density must lie between 0 and 1 for wanda"):
        make(model, "wanda", "positive", amount)


def test_a_method_that_is_not_the_papers_is_refused(model: TorchModel) -> None:
    with pytest.raises(InputError, match="contrastive-fisher"):
        make(model, "contrastive-fisher", "positive", 0.3)


def test_channel_variances_never_fall_below_zero(model: TorchModel, tmp_path: Path) -> None:
    # Equal large inputs: the difference of their sums is rounding alone, and its root would be NaN.
    statistics = margin_statistics(model)
    flat = {
        field: {name: np.full_like(values, {"abs": 5e4, "sum": 5e4, "square": 4.9999e7}[field.split("_")[1]])}
        for field, tensors in statistics.sums.items()
        if field != "gate_gradient"
        for name, values in tensors.items()
        if name == NAMES[0]
    }
    counts = {**statistics.counts, "positive_tokens": 50, "negative_tokens": 50}
    maker = paper_planes(
        model, NAMES[:1], Statistics("margin", counts, flat), method="contrastive-wanda", side="positive", gate=0.0
    )
    assert maker(0.5)[0].n_positions == 64 * 32
