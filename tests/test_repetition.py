"""Replies of a masked model are cut where they begin to repeat themselves, and masks are kept from leading there."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_edge.calibration import CalibrationSettings, Calibrator
from persona_edge.encoding import prompt_tokens
from persona_edge.evaluation import score_answers
from persona_edge.masked_model import masked
from persona_edge.masks import Plane
from persona_edge.modeling import TorchModel
from persona_edge.repetition import (
    FEWEST,
    LOOP_TOKENS,
    MIN_ANSWER,
    MIN_CONTEXT,
    RECURRING,
    RepetitionProbe,
    repeats_at,
)
from tests.tiny_models import contrasts, load, one_thread, save_folder  # noqa: F401 - a fixture

PROMPTS = [f"{contrast.prompt} {more}" for contrast in contrasts(20) for more in ("", "Now", "Again", "Please")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def calibrator(model: TorchModel, tmp_path: Path) -> Calibrator:
    return Calibrator(model, "tiny", settings=CalibrationSettings(max_batch_tokens=2048), folder=tmp_path)


@pytest.fixture(scope="module")
def planes(model: TorchModel) -> tuple[Plane, ...]:
    """A mask on half of one layer, which changes what the model says."""
    layer = model.layer("blk.1.ffn_down.weight")
    n_units = layer.shape.n_units(32)
    return (Plane(0.0, {layer.name: np.arange(0, n_units, 2, dtype=np.uint32)}, 32),)


def greedy(model: TorchModel, tokens: tuple[int, ...], n: int) -> list[int]:
    found: list[int] = []
    with torch.no_grad():
        while len(found) < n:
            found.append(int(model.model(torch.tensor([[*tokens, *found]])).logits[0, -1].argmax()))
    return found


def slowly(tokens: list[int], length: int) -> int | None:
    for i in range(len(tokens)):
        run = tokens[i : i + length]
        if len(run) == length and any(tokens[j : j + length] == run for j in range(i)):
            return i
    return None


def test_where_a_reply_repeats_itself_against_the_obvious_search() -> None:
    rng = random.Random(3)
    found = []
    for _ in range(400):
        tokens = [rng.randrange(rng.choice((2, 3, 5))) for _ in range(rng.randrange(40))]
        length = rng.randrange(1, 7)
        found.append(repeats_at(tokens, length))
        assert found[-1] == slowly(tokens, length)
    assert None in found
    assert any(found)
    assert repeats_at([7] * (RECURRING + 1)) == 1
    assert repeats_at([7] * RECURRING) is None


def test_pairs_part_where_the_masked_model_repeats_itself(
    calibrator: Calibrator, model: TorchModel, planes: tuple[Plane, ...]
) -> None:
    probe = RepetitionProbe(calibrator, PROMPTS)
    prompts = {tuple(prompt_tokens(model.tokenizer, prompt, None)) for prompt in PROMPTS}
    pairs = probe.pairs(planes)
    assert len(pairs) >= FEWEST
    for on, loop in pairs:
        context = loop.tokens[: -loop.n_scored]
        (prompt,) = (p for p in prompts if context[: len(p)] == p)
        said = list(context[len(prompt) :])
        assert on.tokens[: -on.n_scored] == context
        assert len(said) >= MIN_CONTEXT
        assert MIN_ANSWER <= min(on.n_scored, loop.n_scored) <= max(on.n_scored, loop.n_scored) <= LOOP_TOKENS
        assert repeats_at([*said, *loop.tokens[-loop.n_scored :]]) == len(said)
        assert on.tokens != loop.tokens
    on, loop = pairs[0]
    with masked(model, planes):
        assert greedy(model, loop.tokens[: -loop.n_scored], loop.n_scored) == list(loop.tokens[-loop.n_scored :])


def test_other_masks_repeat_other_things_and_each_is_asked_once(
    calibrator: Calibrator, planes: tuple[Plane, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = RepetitionProbe(calibrator, PROMPTS)
    with_mask, without = probe.pairs(planes), probe.pairs(())
    assert with_mask != without

    def refuse(*_args: object, **_options: object) -> None:
        pytest.fail("asked again")

    monkeypatch.setattr("persona_edge.repetition.continue_together", refuse)
    again = RepetitionProbe(calibrator, PROMPTS)
    assert (again.pairs(planes), again.pairs(())) == (with_mask, without)


def test_what_is_measured_is_the_masked_model(
    calibrator: Calibrator, model: TorchModel, planes: tuple[Plane, ...]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    probe = RepetitionProbe(calibrator, PROMPTS)
    pairs = probe.pairs(planes)
    (other,) = probe.others(pairs, planes)
    (farther,) = probe.others(pairs, planes, away=0.3)
    assert other.one_way
    assert other.moved is not None
    levels = []
    for on in (planes, ()):
        with masked(model, on):
            going_on, going_round = score_answers(model, pairs).levels
        levels.append(float((going_on - going_round).mean()))
    assert other.moved == pytest.approx(min(levels[0] - levels[1], 0), abs=1e-6)
    assert farther.moved == pytest.approx(other.moved - 0.3)
    name = "blk.0.ffn_up.weight"
    unit = int(np.abs(other.benefit[name]).argmax())
    moved = []
    for gate in (1.0 - 1e-2, 1.0 + 1e-2):  # a little more closed, a little more open
        with masked(model, (*planes, Plane(gate, {name: np.array([unit], np.uint32)}, 32))):
            going_on, going_round = score_answers(model, pairs[0::2]).levels
        moved.append(float((going_on - going_round).mean()))
    assert other.benefit[name].ravel()[unit] == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=0.02)
    assert not np.array_equal(other.benefit[name], other.check[name])
    assert other.benefit["blk.1.ffn_down.weight"].ravel()[0] == 0  # closed
    assert all(bool((tensor == before[n]).all()) for n, tensor in model.model.state_dict().items())


def test_of_few_loops_nothing_is_learned(calibrator: Calibrator) -> None:
    probe = RepetitionProbe(calibrator, PROMPTS)
    assert not probe.others(probe.pairs(())[: FEWEST - 1], ())
