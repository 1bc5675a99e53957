"""Scores against hand-computed cases and against the formulas written as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge import scores
from persona_edge.errors import InputError

Floats = NDArray[np.float32]


def array(*rows: object) -> Floats:
    return np.array(rows, np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def naive(n_rows: int, n_units: int, unit: Callable[[int, int], float]) -> Floats:
    return array(*[[unit(i, u) for u in range(n_units)] for i in range(n_rows)])


def test_wanda_by_hand() -> None:
    assert np.array_equal(scores.wanda_scores(array([1, -2], [0, 3]), array(10, 0.5)), array([10, 1], [0, 1.5]))


def test_wanda_equals_its_formula(rng: np.random.Generator) -> None:
    weights, norms = normal(rng, 5, 7), np.abs(normal(rng, 7))
    expected = naive(5, 7, lambda i, j: abs(weights[i, j]) * norms[j])
    np.testing.assert_allclose(scores.wanda_scores(weights, norms), expected, rtol=1e-6)


def test_contrastive_wanda_by_hand_adds_epsilon_outside_the_root() -> None:
    weights = array([2, -2, 2])
    mean_pos, mean_neg = array(3, 0, 1), array(1, 2, 1)
    var_pos, var_neg = array(5, 5, 0), array(4, 4, 0)  # root 3, 3, 0
    found = scores.contrastive_wanda_scores(weights, mean_pos, mean_neg, var_pos, var_neg, epsilon=1.0, phi="identity")
    np.testing.assert_allclose(found, array([1, -1, 0]))  # 2 * 2/(3+1), 2 * -2/(3+1), 2 * 0/(0+1)


@pytest.mark.parametrize("phi", ["abs", "relu", "identity"])
def test_contrastive_wanda_equals_its_formula(rng: np.random.Generator, phi: scores.Phi) -> None:
    weights, mean_pos, mean_neg = normal(rng, 4, 6), normal(rng, 6), normal(rng, 6)
    var_pos, var_neg = np.square(normal(rng, 6)), np.square(normal(rng, 6))
    shapes: dict[str, Callable[[float], float]] = {
        "abs": abs,
        "relu": lambda x: max(x, 0.0),
        "identity": lambda x: x,
    }
    shape = shapes[phi]

    def unit(i: int, j: int) -> float:
        ratio = (float(mean_pos[j]) - float(mean_neg[j])) / (math.sqrt(float(var_pos[j]) + float(var_neg[j])) + 0.01)
        return abs(float(weights[i, j])) * shape(ratio)

    found = scores.contrastive_wanda_scores(weights, mean_pos, mean_neg, var_pos, var_neg, epsilon=0.01, phi=phi)
    np.testing.assert_allclose(found, naive(4, 6, unit), rtol=1e-5)
    swapped = scores.contrastive_wanda_scores(weights, mean_neg, mean_pos, var_neg, var_pos, epsilon=0.01, phi=phi)
    if phi == "relu":
        assert not np.any((found > 0) & (swapped > 0))
    else:
        np.testing.assert_array_equal(swapped, found if phi == "abs" else -found)


def test_contrastive_wanda_keeps_small_differences_of_large_means() -> None:
    one, mean = array([1]), array(1000)
    found = scores.contrastive_wanda_scores(one, mean, np.nextafter(mean, array(0)), array(0), array(0), epsilon=1e-4)
    assert found[0, 0] == pytest.approx(2**-14 / 1e-4, rel=1e-5)


def test_variances_rounded_below_zero_count_as_zero() -> None:
    found = scores.contrastive_wanda_scores(array([1]), array(2), array(1), array(-1e-3), array(0), epsilon=0.5)
    assert found[0, 0] == 2


def test_contrastive_sparse_by_hand() -> None:
    result = scores.contrastive_sparse_scores(array([1, 3, 4], [0, 0, 0]), array([4, 3, 1], [1, 1, 2]))
    np.testing.assert_allclose(result.positive, array([0.125, 0.375, 0.5], [0, 0, 0]))
    np.testing.assert_allclose(result.negative, array([0.5, 0.375, 0.125], [0.25, 0.25, 0.5]))
    np.testing.assert_allclose(result.difference, array([0.375, 0, 0.375], [0.25, 0.25, 0.5]))
    assert np.array_equal(result.side, [[-1, 0, 1], [-1, -1, -1]])
    assert np.array_equal(result.kept_by(1), [[False, False, True], [False, False, False]])
    np.testing.assert_allclose(result.suppression_scores(1), array([0.375, 0, 0], [0.25, 0.25, 0.5]))


def test_contrastive_sparse_equals_its_formula_and_is_disjoint(rng: np.random.Generator) -> None:
    first, second = np.abs(normal(rng, 6, 9)), np.abs(normal(rng, 6, 9))
    result = scores.contrastive_sparse_scores(first, second)

    def unit(i: int, j: int) -> float:
        return abs(float(first[i, j]) / math.fsum(first[i]) - float(second[i, j]) / math.fsum(second[i]))

    np.testing.assert_allclose(result.difference, naive(6, 9, unit), rtol=1e-4, atol=1e-7)
    assert not np.any(result.kept_by(1) & result.kept_by(-1))
    assert not np.any((result.suppression_scores(1) > 0) & (result.suppression_scores(-1) > 0))
    np.testing.assert_array_equal(result.suppression_scores(1) + result.suppression_scores(-1), result.difference)


@pytest.mark.parametrize("group_size", [1, 4])
def test_gate_gradient_is_the_derivative_by_the_gate(rng: np.random.Generator, group_size: int) -> None:
    weights, inputs, delta = normal(rng, 3, 8), normal(rng, 8), normal(rng, 3)
    found = scores.gate_gradient(weights, np.outer(delta, inputs), group_size=group_size)
    step = 0.5  # the margin delta . (W x) is linear in the gates, so one finite difference is exact

    def unit(i: int, g: int) -> float:
        gated = weights.astype(np.float64)
        gated[i, g * group_size : (g + 1) * group_size] *= 1 + step
        return float(delta @ (gated @ inputs) - delta @ (weights.astype(np.float64) @ inputs)) / step

    np.testing.assert_allclose(found, naive(3, 8 // group_size, unit), rtol=1e-4, atol=1e-5)


def test_benefit_is_the_negated_gradient() -> None:
    assert np.array_equal(scores.suppression_benefit(array(2, -3)), array(-2, 3))


def test_kfac_by_hand() -> None:
    found = scores.kfac_group_damage(array([1, -2, 3, 0]), array(1, 0.5, 2, 9), array(4), group_size=2)
    assert np.array_equal(found, array([0.5 * 4 * (1 + 2), 0.5 * 4 * 18]))


@pytest.mark.parametrize("group_size", [1, 32])
def test_kfac_equals_its_formula(rng: np.random.Generator, group_size: int) -> None:
    weights, inputs, outputs = normal(rng, 3, 64), np.square(normal(rng, 64)), np.square(normal(rng, 3))

    def unit(i: int, g: int) -> float:
        columns = range(g * group_size, (g + 1) * group_size)
        return 0.5 * float(outputs[i]) * math.fsum(float(weights[i, j]) ** 2 * float(inputs[j]) for j in columns)

    found = scores.kfac_group_damage(weights, inputs, outputs, group_size=group_size)
    np.testing.assert_allclose(found, naive(3, 64 // group_size, unit), rtol=1e-5)


def test_kfac_sees_parts_that_cancel_where_the_gate_fisher_is_blind() -> None:
    weights, inputs, delta = array([1, -1]), array(1, 1), array(1)
    gradient = scores.gate_gradient(weights, np.outer(delta, inputs), group_size=2)
    assert scores.gate_fisher_damage(np.square(gradient)) == 0
    assert scores.kfac_group_damage(weights, np.square(inputs), np.square(delta), group_size=2) == 1


def test_weighted_damage_is_a_weighted_sum() -> None:
    found = scores.weighted_damage((array([1, 5]), array([2, 4])), (1, 0.25))
    assert np.array_equal(found, array([1.5, 6]))


def test_ratio_by_hand_and_bounded() -> None:
    benefit, damage = array(6, -6, 1, 3e38, 0), array(2, 2, 0, 0, 0)
    found = scores.contrastive_fisher_ratio(benefit, damage, epsilon=0.5)
    np.testing.assert_allclose(found, array(2.4, -2.4, 2, np.finfo(np.float32).max, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "shows"),
    [
        (lambda: scores.wanda_scores(array([1, 2]), array(1)), "input_norms is (1,)"),
        (lambda: scores.wanda_scores(array(1, 2), array(1, 2)), "(n_rows, n_columns)"),
        (lambda: scores.contrastive_sparse_scores(array([1]), array([1, 2])), "one shape"),
        (lambda: scores.contrastive_sparse_scores(array([-1]), array([1])), "at least 0, got -1"),
        (lambda: scores.kfac_group_damage(array([1, 2]), array(1, 1), array(1, 1)), "output gradients"),
        (lambda: scores.kfac_group_damage(array([1, 2]), array(1, 1), array(1)), "2 columns do not divide"),
        (lambda: scores.gate_gradient(array([1, 2]), array([1])), "one shape"),
        (lambda: scores.weighted_damage((), ()), "0 neutral texts"),
        (lambda: scores.weighted_damage((array(1), array(1, 2)), (1, 1)), "one shape"),
        (lambda: scores.weighted_damage((array(1),), (-1,)), "at least 0"),
        (lambda: scores.contrastive_fisher_ratio(array(1), array(1, 2)), "one shape"),
        (lambda: scores.contrastive_fisher_ratio(array(1), array(1), epsilon=0), "epsilon must be a positive number"),
    ],
)
def test_unusable_arguments_are_named(call: Callable[[], object], shows: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert shows in str(error.value)


def test_unknown_phi() -> None:
    with pytest.raises(InputError, match="tanh"):
        scores.contrastive_wanda_scores(array([1]), *[array(1)] * 4, phi="tanh")  # type: ignore[arg-type]
