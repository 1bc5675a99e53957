"""Margins, drift and perplexity against one plain call per sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_edge.encoding import EncodedText, encode_chat, encode_text
from persona_edge.errors import CalibrationError
from persona_edge.evaluation import (
    AnswerScores,
    margins,
    mean_kl,
    measure_base,
    perplexity,
    score_answers,
    summarize,
)
from persona_edge.masked_model import masked
from persona_edge.masks import Plane
from persona_edge.modeling import TorchModel
from tests.tiny_models import (
    ARCHITECTURES,
    SENTENCES,
    contrast_pairs,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny"), request.param))


def log_probabilities(model: TorchModel, text: EncodedText) -> torch.Tensor:
    """(n_scored, n_vocab) of one sequence on its own, no padding, no mask."""
    with torch.no_grad():
        logits: torch.Tensor = model.model(input_ids=torch.tensor([text.tokens])).logits
    return logits[0, -1 - text.n_scored : -1].double().log_softmax(-1)


def scored(model: TorchModel, text: EncodedText) -> torch.Tensor:
    """Log-probability of each scored token, (n_scored,)."""
    targets = torch.tensor(text.tokens[len(text.tokens) - text.n_scored :], dtype=torch.int64)
    return log_probabilities(model, text).gather(-1, targets[:, None])[:, 0]


def neutral(model: TorchModel) -> list[EncodedText]:
    """Texts of many lengths, some of them chat turns, one with nothing to predict."""
    running = [encode_text(model.tokenizer, text, max_tokens=5 + 7 * i) for i, text in enumerate(SENTENCES)]
    chats = [encode_chat(model.tokenizer, "And then?", text[: 9 * i + 9]) for i, text in enumerate(SENTENCES)]
    return [*running, *chats, encode_text(model.tokenizer, "A", max_tokens=1)]


def harmful(model: TorchModel) -> Plane:
    return Plane(3.0, {layer.name: np.arange(0, 60, 2, dtype=np.uint32) for layer in model.layers})


@pytest.mark.parametrize("max_tokens", [1, 150, 10_000])
def test_answers_score_as_sequences_of_their_own(model: TorchModel, max_tokens: int) -> None:
    pairs = contrast_pairs(model, 6)
    found = score_answers(model, pairs, max_tokens=max_tokens)
    for side, index in ((found.positive, 0), (found.negative, 1)):
        np.testing.assert_allclose(side, [float(scored(model, pair[index]).sum()) for pair in pairs], rtol=1e-4)
    assert found.positive_tokens.tolist() == [positive.n_scored for positive, _ in pairs]
    assert found.negative_tokens.tolist() == [negative.n_scored for _, negative in pairs]


def test_margins_summarize_the_scores(model: TorchModel) -> None:
    pairs = contrast_pairs(model, 6)
    means = np.array([[float(scored(model, text).mean()) for text in pair] for pair in pairs])
    sums = np.array([[float(scored(model, text).sum()) for text in pair] for pair in pairs])
    found = margins(model, pairs)
    assert found.n_contrasts == 6
    assert found.share_mean == pytest.approx((means[:, 0] > means[:, 1]).mean())
    assert found.share_summed == pytest.approx((sums[:, 0] > sums[:, 1]).mean())
    assert (found.mean_positive, found.mean_negative) == pytest.approx(tuple(means.mean(0)), rel=1e-4)
    assert found.mean_margin == pytest.approx(float((means[:, 0] - means[:, 1]).mean()), abs=1e-4)


def test_shares_count_a_tie_one_half_and_lengths_matter() -> None:
    scores = AnswerScores(
        np.array([-2.0, -6.0, -1.0]), np.array([-2.0, -4.0, -3.0]), np.array([2, 6, 1]), np.array([2, 2, 3])
    )
    found = summarize(scores)
    assert found.share_summed == pytest.approx(0.5)  # tie, lost, won
    assert found.share_mean == pytest.approx(2 / 3)  # tie, won (-1 against -2), tie (-1 against -1)
    assert found.mean_margin == pytest.approx(1 / 3)


def test_perplexity_is_that_of_all_scored_tokens(model: TorchModel) -> None:
    texts = neutral(model)
    log_p = torch.cat([scored(model, text) for text in texts])
    for max_tokens in (1, 100, 10_000):
        assert perplexity(model, texts, max_tokens=max_tokens) == pytest.approx(
            math.exp(-float(log_p.mean())), rel=1e-4
        )
    assert measure_base(model, texts).perplexity == pytest.approx(math.exp(-float(log_p.mean())), rel=1e-4)


def test_drift_is_the_divergence_from_base_to_the_model_as_it_stands(model: TorchModel) -> None:
    texts = neutral(model)
    before = [log_probabilities(model, text) for text in texts]
    base = measure_base(model, texts, max_tokens=120)
    with masked(model, [harmful(model)]):
        after = [log_probabilities(model, text) for text in texts]
        found = mean_kl(model, base)
        ratio = perplexity(model, texts) / base.perplexity
    there, back = (
        float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(a, b, strict=True)]).mean())
        for a, b in ((before, after), (after, before))
    )
    assert there != pytest.approx(back, rel=0.01)  # far enough apart for the direction to matter
    assert found.kl_divergence == pytest.approx(there, rel=1e-3)
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-4)


def test_the_unmasked_model_has_not_drifted(model: TorchModel) -> None:
    found = mean_kl(model, measure_base(model, neutral(model)))
    assert abs(found.kl_divergence) < 5e-6  # what float16 rounding leaves
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("texts", [[], [EncodedText((5,), 0)]], ids=["no text", "no token to predict"])
def test_nothing_to_measure_on_is_an_error(model: TorchModel, texts: Sequence[EncodedText]) -> None:
    for measure in (perplexity, measure_base):
        with pytest.raises(CalibrationError, match="no tokens"):
            measure(model, texts)
    with pytest.raises(CalibrationError, match="no contrasts"):
        margins(model, [])


def test_measuring_changes_nothing(model: TorchModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    mean_kl(model, measure_base(model, neutral(model)))
    margins(model, contrast_pairs(model, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.model.parameters())
