"""Statistics against what they are defined as: finite differences, weight gradients, and one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona_edge import collect
from persona_edge.collect import collect_damage, collect_drift, collect_margins
from persona_edge.encoding import EncodedText, encode_chat, encode_text, pad
from persona_edge.errors import CalibrationError
from persona_edge.forward import scored_logits
from persona_edge.masked_model import masked
from persona_edge.masks import Granularity, Plane
from persona_edge.modeling import LinearLayer, TorchModel, load_torch_model
from persona_edge.statistics import Statistics, merge
from tests.tiny_models import (
    ARCHITECTURES,
    SENTENCES,
    contrast_pairs,
    load,
    one_thread,  # noqa: F401 - a fixture
    save_folder,
    tokenizer,
)

Floats = NDArray[np.float32] | NDArray[np.float64]
Pairs = Sequence[tuple[EncodedText, EncodedText]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_folder(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> TorchModel:
    return load(folders["llama"])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TorchModel:
    return load(folders[request.param])


def log_probability(model: TorchModel, text: EncodedText) -> torch.Tensor:
    """Mean log-probability of the scored tokens, from a plain call on one sequence."""
    tokens = torch.tensor([text.tokens])
    log_p: torch.Tensor = model.model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    return log_p.gather(-1, tokens[0, 1:, None])[-text.n_scored :].mean()


def total_margin(model: TorchModel, pairs: Pairs) -> torch.Tensor:
    return torch.stack([log_probability(model, a) - log_probability(model, b) for a, b in pairs]).sum()


@contextmanager
def weight_gradients(model: TorchModel) -> Iterator[None]:
    model.model.requires_grad_(True)
    try:
        yield
    finally:
        model.model.zero_grad(set_to_none=True)
        model.model.requires_grad_(False)


def rows_of(layer: LinearLayer, values: Floats) -> Floats:
    return values if layer.row_order is None else values[layer.row_order]


def group_sums(values: Floats, size: int) -> Floats:
    sums: Floats = values.reshape(len(values), -1, size).sum(-1)
    return sums


@pytest.mark.parametrize("granularity", [32, 1])
def test_gate_gradients_are_group_sums_of_weight_times_weight_gradient(
    model: TorchModel, granularity: Granularity
) -> None:
    pairs = contrast_pairs(model)
    found = collect_margins(model, model.layers, pairs, granularity=granularity).sums["gate_gradient"]
    with weight_gradients(model):
        total_margin(model, pairs).backward()
        for layer in model.layers:
            weight = layer.module.weight
            assert weight.grad is not None
            expected = group_sums(rows_of(layer, (weight * weight.grad).detach().numpy()), granularity)
            np.testing.assert_allclose(found[layer.name], expected, rtol=1e-3, atol=2e-5, err_msg=layer.name)


def test_gate_gradients_are_finite_differences_of_the_margin(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    pairs = contrast_pairs(model, 2)
    found = collect_margins(model, model.layers, pairs).sums["gate_gradient"]
    model.model.double()
    rng = np.random.default_rng(0)
    for layer in model.layers:
        # The group with the largest derivative, which a wrong row order would miss, and one at random.
        largest = np.unravel_index(np.abs(found[layer.name]).argmax(), found[layer.name].shape)
        for row, group in (largest, tuple(rng.integers(found[layer.name].shape))):
            difference = gate_difference(model, layer, (int(row), int(group)), lambda: total_margin(model, pairs))
            assert found[layer.name][row, group] == pytest.approx(difference, rel=2e-3, abs=2e-5), layer.name


def gate_difference(
    model: TorchModel, layer: LinearLayer, at: tuple[int, int], function: Callable[[], torch.Tensor]
) -> float:
    """d function / d gate of GGUF row and group `at`, at gate 1, by five points: norms compute in float32 at best."""
    row = at[0] if layer.row_order is None else int(layer.row_order[at[0]])
    block = layer.module.weight.data[row, 32 * at[1] : 32 * at[1] + 32]
    original, step = block.clone(), 0.02
    values = []
    with torch.no_grad():
        for distance in (-2, -1, 1, 2):
            block.copy_(original * (1 + distance * step))
            values.append(float(function()))
        block.copy_(original)
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)


def some_planes(model: TorchModel) -> tuple[Plane, ...]:
    """Every seventh group closed, and every eleventh of one tensor doubled, where none of the others is."""
    closed = {layer.name: np.arange(0, layer.shape.n_units(32), 7, dtype=np.uint32) for layer in model.layers}
    first = model.layers[0]
    doubled = np.arange(3, first.shape.n_units(32), 11, dtype=np.uint32)
    return Plane(0, closed), Plane(2, {first.name: doubled[doubled % 7 != 0]})


def total_drift(model: TorchModel, before: Sequence[torch.Tensor], texts: Sequence[EncodedText]) -> torch.Tensor:
    """KL(before || model as it stands), summed over the scored tokens, from plain calls on one sequence."""
    now = [scored_log_softmax(model, text) for text in texts]
    return torch.stack([(b.exp() * (b - n)).sum() for b, n in zip(before, now, strict=True)]).sum()


def scored_log_softmax(model: TorchModel, text: EncodedText) -> torch.Tensor:
    logits: torch.Tensor = model.model(input_ids=torch.tensor([text.tokens])).logits[0, :-1]
    return logits[-text.n_scored :].log_softmax(-1)


@pytest.mark.parametrize("granularity", [32, 1])
def test_drift_gradients_are_group_sums_of_weight_times_weight_gradient(
    model: TorchModel, granularity: Granularity
) -> None:
    texts, planes = neutral_texts(model), some_planes(model)
    with torch.no_grad():
        before = [scored_log_softmax(model, text) for text in texts]
    found = collect_drift(model, model.layers, pad(texts, "cpu"), planes, granularity=granularity)
    assert found.counts == {"batches": 1, "tokens": sum(text.n_scored for text in texts)}
    with masked(model, planes), weight_gradients(model):
        drift = total_drift(model, before, texts)
        assert float(drift.detach()) > 1e-3
        drift.backward()
        for layer in model.layers:
            weight = layer.module.weight
            assert weight.grad is not None
            expected = group_sums(rows_of(layer, (weight * weight.grad).detach().numpy()), granularity)
            got = found.sums["drift_gradient"][layer.name]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-5, err_msg=layer.name)
            if granularity == 32:
                assert not got.ravel()[planes[0].positions[layer.name]].any()


def test_without_a_mask_there_is_no_drift_to_change(model: TorchModel) -> None:
    found = collect_drift(model, model.layers, pad(neutral_texts(model), "cpu"), ())
    assert max(float(np.abs(values).max()) for values in found.sums["drift_gradient"].values()) < 1e-5


def test_channel_sums_cover_the_inputs_that_predict_an_answer(model: TorchModel) -> None:
    pairs = contrast_pairs(model, 5)
    found = collect_margins(model, model.layers, pairs)
    for side, index in (("positive", 0), ("negative", 1)):
        texts = [pair[index] for pair in pairs]
        seen = inputs_before_scored_tokens(model, texts)
        assert found.counts[f"{side}_tokens"] == sum(text.n_scored for text in texts)
        for layer in model.layers:
            x = seen[layer.name]
            for field, values in (("abs", np.abs(x)), ("sum", x), ("square", x**2)):
                got = found.sums[f"{side}_{field}"][layer.name]
                np.testing.assert_allclose(got, values.sum(0), rtol=1e-4, atol=1e-4)


def inputs_before_scored_tokens(model: TorchModel, texts: Sequence[EncodedText]) -> dict[str, NDArray[np.float64]]:
    """Each layer's inputs, (n_scored in all, n_columns): a token is predicted from the position before it."""
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in model.layers}
    for text in texts:
        for name, x, _ in traced(model, text.tokens)[0]:
            seen[name].append(x[-1 - text.n_scored : -1])
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


def traced(
    model: TorchModel, tokens: Sequence[int]
) -> tuple[list[tuple[str, torch.Tensor, torch.Tensor]], torch.Tensor]:
    """(layer name, its input (n_tokens, n_columns), its output in the graph) of one sequence, and the logits."""
    found: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def record(_module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
            found.append((name, inputs[0][0].detach(), output))

        return record

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in model.layers]
    embeddings = model.model.get_input_embeddings()(torch.tensor([tokens])).requires_grad_(True)
    logits = model.model(inputs_embeds=embeddings, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return found, logits


def neutral_texts(model: TorchModel) -> list[EncodedText]:
    running = [
        encode_text(model.tokenizer, text, max_tokens=n) for text, n in zip(SENTENCES[:3], (9, 23, 14), strict=True)
    ]
    return [*running, encode_chat(model.tokenizer, "And then?", SENTENCES[3])]


@pytest.mark.parametrize("stride", [1, collect.GATE_TOKEN_STRIDE])
def test_damage_sums_are_those_of_a_loop_over_tokens(
    model: TorchModel, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "GATE_TOKEN_STRIDE", stride)
    texts = neutral_texts(model)
    found = collect_damage(model, model.layers, pad(texts, "cpu"), seed=5)
    assert found.counts == {"batches": 1, "tokens": sum(text.n_scored for text in texts)}
    for layer in model.layers:
        expected = damage_of_tokens(layer, model, texts, stride)
        for field, values in expected.items():
            got = found.sums[field][layer.name]
            scale = np.abs(values).max()
            np.testing.assert_allclose(got, values, rtol=2e-3, atol=1e-5 * scale, err_msg=f"{layer.name} {field}")


def damage_of_tokens(
    layer: LinearLayer, model: TorchModel, texts: Sequence[EncodedText], stride: int
) -> dict[str, NDArray[np.float64]]:
    """The sums of statistics.py, one sequence and one token at a time; every `stride`-th token for the gates."""
    n_rows, n_columns = layer.shape.n_rows, layer.shape.n_columns
    sums = {
        "input_square": np.zeros(n_columns),
        "output_gradient_square": np.zeros(n_rows),
        "gate_gradient_square": np.zeros((n_rows, n_columns // 32)),
    }
    tokens = token_terms(layer, model, texts)
    for i, (x, delta) in enumerate(tokens):
        sums["input_square"] += x**2
        sums["output_gradient_square"] += delta**2
        if i % stride == 0:
            term = delta[:, None] * group_sums(layer.weights().astype(np.float64) * x, 32)
            sums["gate_gradient_square"] += term**2 * len(tokens) / len(range(0, len(tokens), stride))
    return sums


def token_terms(
    layer: LinearLayer, model: TorchModel, texts: Sequence[EncodedText]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(input, gradient at the output in GGUF rows) of every token, for the labels that seed 5 draws."""
    with torch.no_grad():
        probabilities = scored_logits(model, pad(texts, "cpu")).softmax(-1)
        labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(5))
    terms = []
    for text, own in zip(texts, labels.split([text.n_scored for text in texts]), strict=True):
        runs, logits = traced(model, text.tokens)
        logits[-1 - text.n_scored : -1].log_softmax(-1).gather(-1, own).sum().backward()
        _, x, output = next(run for run in runs if run[0] == layer.name)
        assert output.grad is not None
        deltas = rows_of(layer, output.grad[0].double().numpy().T).T
        terms += list(zip(x.double().numpy(), deltas, strict=True))
    return terms


def test_a_batch_is_the_sum_of_its_contrasts_in_any_order(model: TorchModel) -> None:
    pairs = contrast_pairs(model)
    together = collect_margins(model, model.layers, pairs)
    singly = Statistics("margin")
    for pair in reversed(pairs):
        singly = merge(singly, collect_margins(model, model.layers, [pair]))
    assert {**singly.counts, "batches": 1} == together.counts
    for field in together.sums:
        assert_close(singly, together, field)


@pytest.mark.parametrize("kind", ["margin", "damage", "drift"])
def test_adding_in_place_is_merging_bit_for_bit(llama: TorchModel, kind: str) -> None:
    pairs, batch = contrast_pairs(llama), pad(neutral_texts(llama), "cpu")

    def collect(i: int, onto: Statistics | None = None) -> Statistics:
        if kind == "margin":
            return collect_margins(llama, llama.layers, pairs[i : i + 1], onto=onto)
        if kind == "drift":
            return collect_drift(llama, llama.layers, batch, some_planes(llama)[i:], onto=onto)
        return collect_damage(llama, llama.layers, batch, seed=i, onto=onto)

    apart = merge(collect(0), collect(1))
    together = collect(1, onto=collect(0))
    assert together.counts == apart.counts
    assert together.sums.keys() == apart.sums.keys()
    for field, tensors in apart.sums.items():
        for name, values in tensors.items():
            np.testing.assert_array_equal(together.sums[field][name], values)


def assert_close(a: Statistics, b: Statistics, field: str) -> None:
    for name, values in a.sums[field].items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(values, b.sums[field][name], rtol=1e-3, atol=1e-5 * scale, err_msg=f"{field} {name}")


def test_damage_without_the_gates_own_fisher_is_the_same_without_it(llama: TorchModel) -> None:
    batch = pad(neutral_texts(llama), "cpu")
    whole = collect_damage(llama, llama.layers, batch, seed=1)
    part = collect_damage(llama, llama.layers, batch, seed=1, gate_fisher=False)
    assert set(part.sums) == {"input_square", "output_gradient_square"} == set(whole.sums) - {"gate_gradient_square"}
    for field in part.sums:
        for name, values in part.sums[field].items():
            np.testing.assert_array_equal(values, whole.sums[field][name])


def test_labels_are_drawn_by_the_seed(llama: TorchModel) -> None:
    batch = pad(neutral_texts(llama), "cpu")
    one, same, other = (
        collect_damage(llama, llama.layers, batch, seed=s).sums["output_gradient_square"]["blk.0.ffn_up.weight"]
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_only_the_layers_asked_for_are_watched_and_no_hook_stays(llama: TorchModel) -> None:
    chosen = [llama.layer("blk.1.ffn_down.weight"), llama.layer("blk.0.attn_k.weight")]
    found = collect_margins(llama, chosen, contrast_pairs(llama, 2))
    assert found.tensors == ("blk.1.ffn_down.weight", "blk.0.attn_k.weight")
    assert not any(layer.module._forward_hooks for layer in llama.layers)
    assert all(parameter.grad is None for parameter in llama.model.parameters())
    beyond = EncodedText((10**6, 1, 2), 1)
    with pytest.raises(IndexError):
        collect_margins(llama, chosen, [(beyond, beyond)])
    assert not any(layer.module._forward_hooks for layer in llama.layers)


def test_no_contrasts_are_an_error(llama: TorchModel) -> None:
    with pytest.raises(CalibrationError, match="no contrasts"):
        collect_margins(llama, llama.layers, [])


def test_bfloat16_finds_the_same_gates(llama: TorchModel, folders: dict[str, Path]) -> None:
    half = load_torch_model(folders["llama"], name="tiny", device="cpu", dtype="bfloat16")
    pairs = contrast_pairs(llama)
    exact, rough = (collect_margins(m, m.layers, pairs).sums["gate_gradient"] for m in (llama, half))
    for name, values in exact.items():
        assert rough[name].dtype == np.float32
        assert np.corrcoef(values.ravel(), rough[name].ravel())[0, 1] > 0.95, name


def test_the_tokenizer_of_the_tiny_models_is_a_real_one() -> None:
    # The tests above would prove little if every text were one unknown token.
    assert len({tokenizer().decode(tokenizer()(text)["input_ids"]) for text in SENTENCES}) == len(SENTENCES)
