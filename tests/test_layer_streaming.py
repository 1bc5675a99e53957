"""Streaming one block at a time: the same numbers, less memory, and nothing left behind.

No second device is needed to see what lies on one: the tests place weights by copying them, and watch the copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from persona_edge import layer_streaming
from persona_edge.collect import collect_damage, collect_drift, collect_margins
from persona_edge.encoding import EncodedText, encode_text, pad
from persona_edge.errors import UnsupportedModelError
from persona_edge.generate import answer
from persona_edge.layer_streaming import exceeds_memory, start_streaming, stream_blocks, streamed
from persona_edge.masked_model import masked
from persona_edge.masks import Plane
from persona_edge.modeling import TorchModel
from persona_edge.statistics import Statistics
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return load(save_folder(tmp_path_factory.mktemp("tiny")))


def blocks_of(model: TorchModel) -> list[torch.nn.Module]:
    return list(model.model.get_decoder().layers)


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


class Copies:
    """Places weights by copying them, and counts the bytes of the copies that are still alive."""

    def __init__(self) -> None:
        self.now = self.most = self.n_made = 0

    def place(self, weights: torch.Tensor) -> torch.Tensor:
        copy = weights.detach().clone()
        n_bytes = copy.numel() * copy.element_size()
        self.now += n_bytes
        self.n_made += 1
        self.most = max(self.most, self.now)
        weakref.finalize(copy.untyped_storage(), self._gone, n_bytes)
        return copy

    def _gone(self, n_bytes: int) -> None:
        self.now -= n_bytes


@contextmanager
def streaming_copies(model: TorchModel) -> Iterator[Copies]:
    copies = Copies()
    stop = stream_blocks(blocks_of(model), copies.place)
    try:
        yield copies
    finally:
        stop()


def margins(model: TorchModel) -> Statistics:
    return collect_margins(model, model.layers, contrast_pairs(model))


def damage(model: TorchModel) -> Statistics:
    texts = [encode_text(model.tokenizer, text, max_tokens=24) for text in SENTENCES]
    return collect_damage(model, model.layers, pad(texts, model.device), seed=3)


def drift(model: TorchModel) -> Statistics:
    texts = [encode_text(model.tokenizer, text, max_tokens=24) for text in SENTENCES]
    positions = {layer.name: np.arange(0, layer.shape.n_units(32), 5, dtype=np.uint32) for layer in model.layers}
    return collect_drift(model, model.layers, pad(texts, model.device), [Plane(0, positions)])


def assert_identical(a: Statistics, b: Statistics) -> None:
    assert (a.kind, a.counts, a.tensors, a.sums.keys()) == (b.kind, b.counts, b.tensors, b.sums.keys())
    for field, tensors in a.sums.items():
        for name, values in tensors.items():
            np.testing.assert_array_equal(values, b.sums[field][name], err_msg=f"{field} {name}")


@pytest.mark.parametrize("collect", [margins, damage, drift])
def test_statistics_are_the_same_bit_for_bit(model: TorchModel, collect: Any) -> None:
    plain = collect(model)
    with streamed(model, "cpu"):
        assert_identical(collect(model), plain)
    with streaming_copies(model) as copies:
        assert_identical(collect(model), plain)
        assert copies.n_made > 0
    assert_identical(collect(model), plain)


def test_the_copies_of_one_block_live_at_a_time_forward_and_backward(llama: TorchModel) -> None:
    with streaming_copies(llama) as copies:
        margins(llama)
        tensors_per_block = len(list(blocks_of(llama)[0].parameters()))
        assert copies.n_made == 2 * len(blocks_of(llama)) * tensors_per_block  # forward, and again for backward
        assert copies.most == max(weight_bytes(block) for block in blocks_of(llama))
        assert copies.now == 0


@dataclass(eq=False)
class Held:
    """What autograd holds in a saved tensor's place."""

    tensor: torch.Tensor


class SavedForBackward:
    """Bytes that autograd keeps for the backward pass, weights not counted: now, and at most."""

    def __init__(self, model: TorchModel) -> None:
        self.now = self.most = 0
        self._weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
        self._n_holders: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> Held:
        storage = tensor.untyped_storage()
        held = Held(tensor)
        if storage.data_ptr() not in self._weights:
            self._hold(storage.data_ptr(), storage.nbytes())
            weakref.finalize(held, self._release, storage.data_ptr(), storage.nbytes())
        return held

    def unpack(self, held: Held) -> torch.Tensor:
        return held.tensor

    def _hold(self, key: int, n_bytes: int) -> None:
        self._n_holders[key] = self._n_holders.get(key, 0) + 1
        if self._n_holders[key] == 1:
            self.now += n_bytes
            self.most = max(self.most, self.now)

    def _release(self, key: int, n_bytes: int) -> None:
        self._n_holders[key] -= 1
        if not self._n_holders[key]:
            self.now -= n_bytes


def test_activations_of_one_block_are_kept_not_of_all(tmp_path: Path) -> None:
    model = load(save_folder(tmp_path, n_blocks=8))
    most = {}
    for name, context in (("plain", nullcontext()), ("streamed", streamed(model, "cpu"))):
        saved = SavedForBackward(model)
        with context, torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            damage(model)
        assert saved.now == 0
        most[name] = saved.most
    assert most["streamed"] < most["plain"] / 3


def test_a_mask_counts_while_streaming(llama: TorchModel) -> None:
    plane = Plane(0.0, {"blk.1.ffn_down.weight": np.arange(0, 190, 2, dtype=np.uint32)})
    tokens = torch.tensor([llama.tokenizer(SENTENCES[0])["input_ids"]])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = llama.model(tokens).logits
        return found

    base = logits()
    with masked(llama, [plane]):
        expected = logits()
    with streaming_copies(llama):
        assert torch.equal(logits(), base)
        with masked(llama, [plane]):
            assert torch.equal(logits(), expected)
        assert torch.equal(logits(), base)
    assert not torch.equal(expected, base)


def test_answers_are_generated_while_streaming(model: TorchModel) -> None:
    expected = answer(model, ["Who are you?", "And what do you do all day?"], max_tokens=6)
    with streaming_copies(model):
        assert answer(model, ["Who are you?", "And what do you do all day?"], max_tokens=6) == expected


def test_nothing_is_left_after_an_error(llama: TorchModel) -> None:
    beyond = EncodedText((10**6, 1, 2), 1)
    before = llama.model.state_dict()
    with pytest.raises(IndexError), streamed(llama, "cpu"):
        collect_margins(llama, llama.layers, [(beyond, beyond)])
    assert not any("forward" in vars(block) for block in blocks_of(llama))
    assert all(
        tensor is before[name] or torch.equal(tensor, before[name]) for name, tensor in llama.model.state_dict().items()
    )
    assert len(blocks_of(llama)) == llama.n_blocks


def test_a_block_that_fails_can_run_again(llama: TorchModel) -> None:
    expected = margins(llama)
    with streaming_copies(llama):
        block = blocks_of(llama)[1]
        handle = block.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            margins(llama)
        handle.remove()
        assert_identical(margins(llama), expected)


def fail(_module: torch.nn.Module, _inputs: object) -> None:
    raise ZeroDivisionError


def test_only_what_lies_around_the_blocks_moves(tmp_path: Path) -> None:
    # PyTorch's meta device holds shapes without data: enough to see what went where. (It unties the output layer.)
    model = load(save_folder(tmp_path))
    stop = start_streaming(model.model, "meta")
    stop()
    assert model.device.type == "meta"
    on_meta = {name for name, p in model.model.named_parameters() if p.device.type == "meta"}
    assert on_meta == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    np.testing.assert_equal(model.layers[0].weights().shape, (64, 64))


def test_a_model_loads_with_streaming_on(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    plain, streaming = load(folder), load(folder, streaming=True)
    assert all("forward" in vars(block) for block in blocks_of(streaming))
    assert not any("forward" in vars(block) for block in blocks_of(plain))
    assert_identical(margins(streaming), margins(plain))


def test_streaming_is_chosen_by_the_free_memory_of_a_cuda_device(
    llama: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = weight_bytes(llama.model)
    for free, expected in ((needed, True), (2 * needed, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 10 * needed))
        assert exceeds_memory(llama.model, "cuda:0") is expected
    beside: tuple[tuple[int | None, bool], ...] = ((0, True), (needed, False), (None, False))
    for available, expected in beside:  # the weights are in main memory already
        monkeypatch.setattr(layer_streaming, "available_memory", lambda available=available: available)
        assert exceeds_memory(llama.model, "cpu") is expected
    assert not exceeds_memory(llama.model, "mps")


def test_a_model_without_a_list_of_blocks_is_refused(llama: TorchModel) -> None:
    other = SimpleNamespace(get_decoder=lambda: torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="without streaming"):
        start_streaming(other, "cpu")
