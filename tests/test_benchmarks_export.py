"""The export benchmark: the paper's procedure keeps what its formula says, and processes are measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import paper_export
from benchmarks.export_cost import run_measured
from benchmarks.paper_export import mean_inputs, row_masks
from persona_edge.errors import GenerationError
from persona_edge.scores import wanda_scores
from tests.tiny_models import load, one_thread, save_folder

__all__ = ["one_thread"]


def test_rows_keep_the_largest_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, means = torch.randn(5, 40, generator=generator), torch.rand(40, generator=generator)
    mask = row_masks(weights, means, suppressed=0.25)
    assert mask.sum(1).tolist() == [30] * 5
    scores = wanda_scores(weights.numpy(), means.numpy())
    kept, gone = np.where(mask, scores, np.inf).min(1), np.where(mask, -np.inf, scores).max(1)
    assert (kept >= gone).all()


def test_means_are_over_all_tokens_of_all_examples(tmp_path: Path) -> None:
    model = load(save_folder(tmp_path / "model"))
    examples = [("Are you well?", "Quite."), ("And you?", "A quiet evening with one good friend.")]
    both = mean_inputs(model, examples)
    assert set(both) == {layer.name for layer in model.layers}
    one, other = (mean_inputs(model, [example]) for example in examples)
    for name, mean in both.items():
        assert (torch.minimum(one[name], other[name]) - 1e-5 <= mean).all()
        assert (mean <= torch.maximum(one[name], other[name]) + 1e-5).all()
    assert not model.layers[0].module._forward_pre_hooks


def test_memory_of_a_process_is_its_own() -> None:
    seconds, processor, peak = run_measured([sys.executable, "-c", "bytearray(300_000_000)"], os.environ)
    assert seconds > 0
    if hasattr(os, "wait4"):
        assert processor is not None
        assert peak is not None
        assert 300_000_000 < peak < 600_000_000


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(GenerationError, match="code 3: no room"):
        run_measured([sys.executable, "-c", "import sys; print('no room'); sys.exit(3)"], os.environ)


def test_a_pole_has_a_file_for_every_tensor(tmp_path: Path) -> None:
    model, folder = save_folder(tmp_path / "model"), tmp_path / "masks"
    seconds = paper_export.export(model, folder, 1)
    assert all(value > 0 for value in seconds.values())
    assert len(list(folder.iterdir())) == 8
    assert len(list(folder.glob("*/*.pt"))) == 8 * len(load(model).layers)
