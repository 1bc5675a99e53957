"""Masked ONNX Runtime = masked PyTorch: both on the weights that the ONNX model holds, dequantized.

ONNX Runtime rounds activations to 8 bits in quantized products, so they never agree to the last bit. The yardstick is
their disagreement on the unmasked model, as in parity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.parity import Agreement, compare, neutral_tokens
from persona_edge.masked_model import masked
from persona_edge.maskpack import MaskPack
from persona_edge.modeling import TorchModel, load_torch_model
from persona_edge.onnx_model import OnnxModel, output_matrix, read_onnx_model
from persona_edge.onnx_weights import dequantize_matrix, dequantize_weight
from persona_edge.runtime.onnx_session import OnnxRuntime

__all__ = ["OnnxParity", "measure_parity", "take_weights"]


@dataclass(frozen=True)
class OnnxParity:
    """The engines under one persona, None for base; `kl_from_base` is KL(base || persona) within ONNX Runtime, nats."""

    persona: str | None
    agreement: Agreement
    kl_from_base: float | None


def measure_parity(
    gguf: Path,
    graph: Path,
    pack: MaskPack,
    personas: Sequence[str],
    *,
    n_positions: int,
    n_threads: int | None = None,
) -> list[OnnxParity]:
    """Base and each of `personas`. `gguf` gives PyTorch the architecture; its weights are replaced by `graph`'s."""
    model = load_torch_model(gguf, name=gguf.stem, device="cpu", dtype="float32")
    take_weights(model, read_onnx_model(graph))
    loaded = pack.load()
    with OnnxRuntime.open(graph, pack, n_ctx=n_positions + 1, n_threads=n_threads) as runtime:
        texts = neutral_tokens(runtime, n_positions)
        base = [runtime.logits(tokens) for tokens in texts]
        found = [OnnxParity(None, compare(model, runtime, texts, {}).runtime, None)]
        for name in personas:
            runtime.switch(name)
            with masked(model, [plane for pole in loaded.resolve(name) for plane in pole.planes]):
                agreement = compare(model, runtime, texts, {}).runtime
            changed = [runtime.logits(tokens) for tokens in texts]
            found.append(OnnxParity(name, agreement, _divergence(base, changed)))
    return found


def take_weights(model: TorchModel, onnx_model: OnnxModel) -> None:
    """CHANGES the torch model: gives it the dequantized weights of the ONNX model, the last layer's included.

    Where the last layer is the embedding too, it is so in both: the builder then looks tokens up in the same codes.
    """
    import torch

    output, head = output_matrix(onnx_model), model.model.get_output_embeddings().weight.data
    if output is not None:
        head.copy_(torch.from_numpy(dequantize_matrix(output)[: len(head)]))
    for layer in model.layers:
        order = np.arange(layer.shape.n_rows) if layer.row_order is None else layer.row_order
        weights = torch.from_numpy(dequantize_weight(onnx_model.weights[layer.name]))
        layer.module.weight.data[torch.from_numpy(order)] = weights


def _divergence(base: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> float:
    """KL(base || changed), the mean over all positions, in nats."""
    total, n = 0.0, 0
    for p, q in zip(base, changed, strict=True):
        log_p, log_q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=-1, keepdims=True) for x in (p, q))
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
        n += len(p)
    return total / n
