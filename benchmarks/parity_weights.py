"""The weights and activations behind `parity`: what the runtime's memory holds, and how llama.cpp rounds its inputs.

Dequantization is the gguf package's here, on purpose: the runtime's own tables are what is being checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import ModelFileError
from persona_edge.masks import Plane
from persona_edge.modeling import LinearLayer, TorchModel
from persona_edge.runtime.layouts import layout_of
from persona_edge.runtime.switcher import WeightTensor

if TYPE_CHECKING:
    import torch

__all__ = ["activation_blocks", "as_in_memory", "largest_error", "rounded_activations", "write_float32_copy"]

Tensors = Mapping[str, WeightTensor]
Rows = NDArray[np.int64]
_OUTPUT = "output.weight"


def write_float32_copy(gguf: Path, target: Path) -> None:
    """Write `gguf` with all weights as 32-bit floats: the same values, 4 bytes each. ModelFileError when that fails."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(target).encode(), ctypes.byref(params)):
        raise ModelFileError(f"{gguf}: llama.cpp could not write a 32-bit copy to {target}; is the disk full?")


def activation_blocks(model: TorchModel, tensors: Tensors) -> dict[str, int]:
    """How many inputs of each quantized layer share a scale when llama.cpp rounds them to 8 bits.

    Names are GGUF's; the output layer is `output.weight`, also where it shares the embedding's tensor. Layers whose
    weights are plain floats are left out.
    """
    blocks = {}
    output = tensors.get(_OUTPUT, tensors["token_embd.weight"])
    for name, tensor in ((_OUTPUT, output), *((layer.name, tensors[layer.name]) for layer in model.layers)):
        block = layout_of(tensor.ggml_type).block_weights
        if block > 1:
            blocks[name] = block  # 256 for K-quants, 32 for the others: the same as the weights' own
    return blocks


@contextmanager
def rounded_activations(model: TorchModel, blocks: Mapping[str, int]) -> Iterator[None]:
    """While open, the inputs of the layers in `blocks` are rounded to 8 bits as llama.cpp does it."""
    modules = {layer.name: layer.module for layer in model.layers}
    modules[_OUTPUT] = model.model.get_output_embeddings()
    handles = [modules[name].register_forward_pre_hook(_rounding(block)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding(block: int) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values = inputs[0].unflatten(-1, (-1, block))
        scale = values.abs().amax(-1, keepdim=True) / 127
        codes = (values / scale.clamp_min(1e-30)).round()
        stored = scale if block == 256 else scale.half().float()  # one scale per 256 is kept in 32 bits
        return ((stored * codes).flatten(-2), *inputs[1:])

    return hook


@contextmanager
def as_in_memory(model: TorchModel, tensors: Tensors, planes: Sequence[Plane]) -> Iterator[None]:
    """While open, the rows that `planes` touch hold what the runtime's memory holds; on exit every bit is as before."""
    import torch

    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for layer, rows in _touched_rows(model, planes):
            weight = layer.module.weight.detach()
            saved.append((weight, weight.clone()))
            weight[_module_rows(layer, rows)] = torch.from_numpy(_dequantized(tensors[layer.name], rows))
        yield
    finally:
        for weight, values in saved:
            weight.copy_(values)


def largest_error(model: TorchModel, tensors: Tensors, planes: Sequence[Plane]) -> float:
    """The largest difference between a torch weight and the runtime's, in rows that `planes` touch, relative to the
    tensor's largest weight.
    """
    worst = 0.0
    for layer, rows in _touched_rows(model, planes):
        weight = layer.module.weight.detach()
        in_torch = weight[_module_rows(layer, rows)].numpy()
        difference = np.abs(in_torch - _dequantized(tensors[layer.name], rows)).max()
        worst = max(worst, float(difference / weight.abs().max()))
    return worst


def _touched_rows(model: TorchModel, planes: Sequence[Plane]) -> Iterator[tuple[LinearLayer, Rows]]:
    """Each layer that `planes` gate, with the GGUF rows that have a gated unit."""
    for layer in model.layers:
        touching = [plane for plane in planes if layer.name in plane.positions]
        if touching:
            rows = [p.positions[layer.name] // (layer.shape.n_columns // p.granularity) for p in touching]
            yield layer, np.unique(np.concatenate(rows)).astype(np.int64)


def _module_rows(layer: LinearLayer, rows: Rows) -> torch.Tensor:
    import torch

    return torch.from_numpy(rows if layer.row_order is None else layer.row_order[rows])


def _dequantized(tensor: WeightTensor, rows: Rows) -> NDArray[np.float32]:
    """Rows (n, n_columns) of a tensor in memory, by the gguf package."""
    import gguf

    quantized = tensor.data.reshape(tensor.n_rows, -1)[rows]
    values = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType(tensor.ggml_type))
    return np.asarray(values, np.float32).reshape(len(rows), tensor.n_columns)
