"""The real 135M model: masked in ONNX as in PyTorch, on the same int4 weights, with the GGUF's tokens and packs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona_edge.exporters.to_gguf import check_gguf
from persona_edge.exporters.to_onnx import write_onnx_model
from persona_edge.masked_model import masked
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import Plane
from persona_edge.modeling import TorchModel
from persona_edge.onnx_model import OnnxModel, output_matrix
from persona_edge.onnx_weights import dequantize_matrix, dequantize_weight
from persona_edge.runtime.onnx_session import OnnxRuntime
from persona_edge.runtime.probabilities import log_softmax
from persona_edge.runtime.session import PersonaRuntime
from tests.tiny_onnx import personas_of

pytestmark = pytest.mark.model

TEXT = (
    "The river rises in the hills, runs past the old mill and reaches the sea after a week. People have fished there "
    "since the first houses were built, and every spring there is a small market by the bridge."
)


def test_masked_agrees_with_pytorch_as_closely_as_unmasked(
    smollm2_path: Path, smollm2_torch: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path / "cache"))
    onnx_model = write_onnx_model(smollm2_path, tmp_path / "smollm2.onnx-int4")
    model = deepcopy(smollm2_torch)  # it gets other weights
    personas = personas_of(model, share=0.005)
    check_gguf(smollm2_path, personas)  # one pack for both
    with OnnxRuntime.open(onnx_model.path, MaskPack.from_bytes(encode_pack(personas)[0]), n_ctx=256) as runtime:
        with PersonaRuntime.open(smollm2_path, n_ctx=64) as other:
            tokens = runtime.tokenize(TEXT)
            assert tokens == other.tokenize(TEXT)
            chat = [{"role": "user", "content": "Why is the sky blue?"}]
            assert runtime.tokenize_chat(chat) == other.tokenize_chat(chat)  # type: ignore[arg-type]
        _take_weights(model, onnx_model)
        base, expected = log_softmax(runtime.logits(tokens)), _torch(model, tokens, ())
        runtime.switch("both")
        planes = [plane for pole in personas.resolve("both") for plane in pole.planes]
        in_persona, expected_in_persona = log_softmax(runtime.logits(tokens)), _torch(model, tokens, planes)
    unmasked, both_masked = _kl(expected, base), _kl(expected_in_persona, in_persona)
    assert unmasked < 0.02  # 8-bit activations
    assert both_masked < 2 * unmasked + 0.002
    assert _kl(expected, expected_in_persona) > 5 * both_masked


def _take_weights(model: TorchModel, onnx_model: OnnxModel) -> None:
    """Give the torch model the int4 weights of the ONNX model."""
    output = output_matrix(onnx_model)
    assert output is not None
    model.model.get_output_embeddings().weight.data.copy_(torch.from_numpy(dequantize_matrix(output)))
    for layer in model.layers:
        order = np.arange(layer.shape.n_rows) if layer.row_order is None else layer.row_order
        weights = dequantize_weight(onnx_model.weights[layer.name])
        layer.module.weight.data[torch.from_numpy(order)] = torch.from_numpy(weights)


def _torch(model: TorchModel, tokens: list[int], planes: list[Plane] | tuple[()]) -> NDArray[np.float32]:
    with masked(model, planes), torch.no_grad():
        return log_softmax(model.model(torch.tensor([tokens])).logits[0].numpy())


def _kl(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """Nats per token."""
    return float((np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q)).sum(-1).mean())
