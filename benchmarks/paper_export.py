"""The paper's own way from weights to stored masks, re-created to be compared with; it is not how this project does it.

    python -m benchmarks.paper_export MODEL.gguf FOLDER N_CONTRASTS [SET]

One mask per pole: a forward pass per example, mean |x| of every layer's input channels, |w| times that for every
weight, and row by row the indices of the K largest, set in a mask of the weights' shape. Each tensor's mask is a file
of its own. Prints the seconds of each part as JSON on its last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from persona_edge.modeling import TorchModel

__all__ = ["SUPPRESSED", "export", "mean_inputs", "row_masks"]

SUPPRESSED = 0.3  # share of each row's weights that the mask takes away


def export(model: Path, folder: Path, n_contrasts: int, personas: str = "mbti16") -> Mapping[str, float]:
    """Write a mask per pole and tensor of set `personas` below `folder`; the seconds of each part."""
    from persona_edge.modeling import load_torch_model
    from persona_edge.persona_sets import load_persona_set

    seconds = {"load": 0.0, "calibrate": 0.0, "select": 0.0, "store": 0.0}
    with _adding_to(seconds, "load"):
        loaded = load_torch_model(model, name=model.stem, device="cpu", dtype="float32")
    for axis in load_persona_set(personas).sets:
        contrasts = axis.limit(n_contrasts).contrasts
        positive = [(contrast.prompt, contrast.positive) for contrast in contrasts]
        negative = [(contrast.prompt, contrast.negative) for contrast in contrasts]
        for pole, examples in ((axis.positive_pole, positive), (axis.negative_pole, negative)):
            with _adding_to(seconds, "calibrate"):
                means = mean_inputs(loaded, examples)
            _masks_of_pole(loaded, means, folder / pole, seconds)
    return seconds


def mean_inputs(model: TorchModel, examples: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Mean |x| of each layer's input channels, (n_columns,), over the tokens of `examples` (prompt, response)."""
    import torch

    from persona_edge.encoding import encode_chat

    sums = {layer.name: torch.zeros(layer.module.in_features) for layer in model.layers}

    def watch(name: str) -> Any:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] += inputs[0][0].abs().sum(0)

        return hook

    handles = [layer.module.register_forward_pre_hook(watch(layer.name)) for layer in model.layers]
    n_tokens = 0
    try:
        with torch.no_grad():
            for prompt, response in examples:
                tokens = encode_chat(model.tokenizer, prompt, response).tokens
                model.model(torch.tensor([tokens]))
                n_tokens += len(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / n_tokens for name, total in sums.items()}


def row_masks(weights: torch.Tensor, means: torch.Tensor, suppressed: float = SUPPRESSED) -> torch.Tensor:
    """True where a weight stays, (n_rows, n_columns): the largest |w| * mean|x| of each row, one row after another."""
    import torch

    scores = weights.abs() * means
    mask = torch.zeros_like(weights, dtype=torch.bool)
    n_kept = round((1 - suppressed) * weights.shape[1])
    for row in range(weights.shape[0]):
        mask[row, torch.topk(scores[row], n_kept).indices] = True
    return mask


def _masks_of_pole(
    model: TorchModel, means: Mapping[str, torch.Tensor], folder: Path, seconds: dict[str, float]
) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for layer in model.layers:
        with _adding_to(seconds, "select"):
            mask = row_masks(layer.module.weight.detach(), means[layer.name])
        with _adding_to(seconds, "store"):
            torch.save(mask, folder / f"{layer.name}.pt")


@contextmanager
def _adding_to(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = perf_counter()
    yield
    seconds[part] += perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(export(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:5])))
