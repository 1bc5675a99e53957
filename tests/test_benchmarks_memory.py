"""The arithmetic of `benchmarks memory` counts what a tiny model really allocates, and its tables carry it on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.calibration_memory import Plan, Run, measure, slopes
from benchmarks.calibration_memory_run import HELD_OUT_TOKENS, Peaks, run
from benchmarks.memory_arithmetic import PHASES, Job, phases
from benchmarks.synthetic_models import SHAPES, make_model
from persona_edge.errors import GenerationError
from persona_edge.modeling import TorchModel, load_torch_model
from tests.tiny_models import one_thread  # noqa: F401 - a fixture

TINY = SHAPES["tiny"]
N_TOKENS = 64


def tiny_model(folder: Path, n_layers: int) -> TorchModel:
    shape = replace(TINY, name=f"tiny-{n_layers}", n_layers=n_layers)
    return load_torch_model(make_model(shape, folder), name="tiny", device="cpu", dtype="bfloat16", streaming=False)


def job(n_layers: int, *, streaming: bool = False) -> Job:
    return Job(replace(TINY, n_layers=n_layers), N_TOKENS, streaming, 2 * (HELD_OUT_TOKENS - 1))


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_statistics_and_predictions_are_as_large_as_the_arithmetic_says(
    tmp_path: Path, streaming: bool
) -> None:
    found = run(make_model(TINY, tmp_path), N_TOKENS, streaming=streaming)
    n, expected = TINY.n_layers, job(TINY.n_layers, streaming=streaming)
    inputs = 6 * TINY.hidden + TINY.feed_forward  # columns of a block's layers
    assert found["weights"] == expected.weights
    assert found["damage_statistics"] == 2 * n * (expected.field + expected.channels)
    assert found["damages"] == 2 * n * expected.field
    assert found["margins"] == n * (expected.field + 6 * 4 * inputs)  # and moments of both answers' inputs
    assert found["predictions"] == expected.base_predictions
    assert list(found["peaks"]) == ["before", *PHASES]
    assert min(found["peaks"].values()) > 50e6


def test_a_block_keeps_the_activations_that_are_counted(tmp_path: Path) -> None:
    one, two = (kept_for_backward(tiny_model(tmp_path, n)) for n in (1, 2))
    assert two - one == job(1).block_activations


def kept_for_backward(model: TorchModel) -> int:
    """Bytes that autograd and the hooks of collect.py hold on to, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def watch(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        keep(inputs[0])

    handles = [layer.module.register_forward_hook(watch) for layer in model.layers]
    tokens = torch.ones(1, N_TOKENS, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = model.model.get_input_embeddings()(tokens).requires_grad_(True)
        output = model.model(inputs_embeds=embeddings, attention_mask=tokens, use_cache=False, logits_to_keep=1)
    assert output.logits.requires_grad
    for handle in handles:
        handle.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_streaming_keeps_one_input_per_block() -> None:
    plain, streamed = job(2), job(2, streaming=True)
    assert streamed.block_activations == 2 * N_TOKENS * TINY.hidden < plain.block_activations
    for alone, here in zip(phases(plain), phases(streamed), strict=True):
        assert here.at(32) <= alone.at(32)


def test_llama_3_8b_has_the_weights_that_it_has() -> None:
    whole = Job(SHAPES["8b"], 1024, True, 0)
    assert whole.weights == 2 * 8_030_261_248
    assert 32 * whole.field == 4 * 6_979_321_856 // 32


def test_a_slope_is_what_a_block_adds() -> None:
    def made(n: int, *, streaming: bool) -> Run:
        per_block = 7 if streaming else 5
        return Run(job(n, streaming=streaming), 100, dict.fromkeys(PHASES, 1000 + per_block * n))

    runs = [made(n, streaming=streaming) for n in (1, 2, 3) for streaming in (False, True)]
    for streaming, expected in ((False, 5), (True, 7)):
        assert slopes(runs, streaming) == pytest.approx(dict.fromkeys(PHASES, expected))


def test_where_peaks_cannot_be_forgotten_they_only_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.calibration_memory_run._RESET", tmp_path / "none" / "clear_refs")
    pytest.importorskip("resource")
    peaks = Peaks()
    assert not peaks.is_per_phase
    block = torch.ones(64 << 20, dtype=torch.uint8)
    peaks.end("with")
    del block
    peaks.end("without")
    assert peaks.by_phase["without"] >= peaks.by_phase["with"] >= 64 << 20


def process(returncode: int, stdout: str, stderr: str) -> Callable[..., Any]:
    def started(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], returncode, stdout, stderr)

    return started


def test_a_process_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", process(1, "", "Traceback\nMemoryError: no room\n"))
    with pytest.raises(GenerationError, match=r"1 blocks, plain.* code 1: MemoryError: no room$"):
        measure(TINY, Plan(n_vocab=TINY.n_vocab).quick())
