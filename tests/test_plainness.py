"""What a model says of a set's answers: levels, balance, and which contrasts stand out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from persona_edge import cli
from persona_edge.calibration import silent
from persona_edge.encoding import encode_contrast
from persona_edge.errors import CalibrationError
from persona_edge.evaluation import AnswerScores, margins
from persona_edge.modeling import TorchModel
from persona_edge.plainness import plainness_findings, plainness_lines, score_set
from persona_edge.set_file import write_set
from tests.tiny_models import calibration_set, load, save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> TorchModel:
    return load(folder)


def scores(positive: np.ndarray, negative: np.ndarray) -> AnswerScores:
    """Answers of 10 and of 20 tokens at these levels, nats per token."""
    ten, twenty = np.full(len(positive), 10), np.full(len(negative), 20)
    return AnswerScores(positive * ten, negative * twenty, ten, twenty)


def levels(*margins: float, level: float = -3.0) -> AnswerScores:
    halves = np.array(margins) / 2
    return scores(level + halves, level - halves)


def test_a_set_is_scored_in_parts_as_margins_are(model: TorchModel) -> None:
    items = calibration_set(70)
    seen: list[tuple[str, int, int]] = []
    found = score_set(model, items, lambda *call: seen.append(call))
    pairs = [encode_contrast(model.tokenizer, contrast, i) for i, contrast in enumerate(items.contrasts)]
    whole = margins(model, pairs)
    positive, negative = found.levels
    assert positive.mean() == pytest.approx(whole.mean_positive, abs=1e-5)
    assert negative.mean() == pytest.approx(whole.mean_negative, abs=1e-5)
    assert [(done, total) for _, done, total in seen] == [(0, 70), (32, 70), (64, 70), (70, 70)]
    turned = tuple(replace(c, positive=c.negative, negative=c.positive) for c in items.contrasts)
    other = score_set(model, replace(items, contrasts=turned), silent).levels
    np.testing.assert_allclose(other[0], negative, atol=1e-5)


def test_a_set_without_contrasts_is_an_error(model: TorchModel) -> None:
    with pytest.raises(CalibrationError, match="no contrasts"):
        score_set(model, replace(calibration_set(1), contrasts=()), silent)


def test_plain_and_even_answers_are_not_warned_of() -> None:
    found = levels(*([0.3, -0.3] * 8))
    assert not plainness_findings(found)
    assert plainness_lines(found, "m") == (
        "under m: -3.00 and -3.00 nats per token",
        "prefers the positive answer in 50% (50% is even); margins +0.00, spread 0.30",
    )


def test_what_is_far_from_the_model_or_uneven_is_warned_of() -> None:
    (far,) = plainness_findings(levels(*([0.3, -0.3] * 8), level=-4.5))
    assert (far.rule, far.severity, far.contrasts) == ("plain", "warning", ())
    assert "-4.50 nats per token" in far.message
    (tilted,) = plainness_findings(levels(*([0.3] * 7 + [-0.3] * 3)))
    assert tilted.message.startswith("the negative answer is the likelier in only 30%")
    one = levels(*([0.3, -0.3] * 8), 1.5)
    (lopsided,) = plainness_findings(one)
    assert (lopsided.rule, lopsided.contrasts) == ("even", (17,))
    positive, negative = one.levels
    rare = scores(np.append(positive[:16], -4.2), np.append(negative[:16], -3.0))
    (finding,) = plainness_findings(rare)
    assert (finding.rule, finding.contrasts) == ("plain", (17,))


def test_few_contrasts_are_not_judged_as_a_whole() -> None:
    assert not plainness_findings(levels(0.3, 0.2, 0.1, level=-6.0))


def test_check_asks_a_model(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    write_set(file, calibration_set(12))
    plain = CliRunner().invoke(cli.main, ["personas", "check", str(file)])
    asked = CliRunner().invoke(cli.main, ["personas", "check", str(file), "--model", str(folder)])
    assert asked.exit_code == plain.exit_code, "what a model says is never an error"
    more = [line for line in asked.stdout.splitlines() if line not in plain.stdout.splitlines()]
    assert more[0].startswith(f"  under {folder.name}: -")
    assert "prefers the positive answer in" in more[1]
    none = CliRunner().invoke(cli.main, ["personas", "check", str(file), "--model", str(tmp_path / "none.gguf")])
    assert none.exit_code in (1, 2)
    assert none.stderr.count("\n") == 1
