"""A torch model whose linear layers are known by their GGUF names and rows.

Masks are positions in GGUF's row order, so every maskable layer carries the order in which GGUF stores its rows:
llama.cpp's converter permutes the rows of attn_q and attn_k for the llama architecture, and transformers' GGUF loader
undoes it. When the weights come from a GGUF file, the order is not assumed: the file's rows are compared.

Leaves to others: running the model (collect.py, evaluation.py) and editing it (masked_model.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError, MissingDependencyError, ModelFileError, UnsupportedModelError
from persona_edge.layer_streaming import exceeds_memory, start_streaming
from persona_edge.machine import set_thread_waiting
from persona_edge.masks import GROUP_SIZE, ModelIdentity, TensorShape
from persona_edge.sketch import sample_signs

if TYPE_CHECKING:
    import torch

__all__ = ["DType", "LinearLayer", "TorchModel", "load_torch_model", "require_offline", "text_config"]

DType = Literal["auto", "float32", "bfloat16"]

OFFLINE_PACKAGES = ("torch", "transformers", "gguf", "safetensors", "accelerate")

# Architectures of GGUF whose converter permutes the rows of attn_q and attn_k (rotary halves interleaved).
ROTARY_PERMUTED = frozenset({"llama"})

# model_type of a Hugging Face config -> general.architecture of the GGUF that llama.cpp's converter writes.
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


def require_offline() -> None:
    """Raise MissingDependencyError, naming the packages, unless the offline extra is installed."""
    missing = [name for name in OFFLINE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"this needs {', '.join(missing)}, not installed here; run: pip install 'persona-edge[offline]'"
        )


@dataclass(frozen=True)
class LinearLayer:
    """A maskable linear layer.

    `name` is GGUF's (`blk.3.ffn_down.weight`). `row_order` (n_rows,) holds the module's row for each GGUF row, or None
    where both orders are the same. `weight` (n_rows, n_columns) belongs to the live module.
    """

    name: str
    module: torch.nn.Linear
    row_order: NDArray[np.int64] | None

    @property
    def shape(self) -> TensorShape:
        """Rows and columns under the GGUF name."""
        return TensorShape(self.name, self.module.out_features, self.module.in_features)

    def to_gguf_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Reorder the first dimension (n_rows, …) from the module's rows to GGUF's."""
        import torch

        return values if self.row_order is None else values[torch.from_numpy(self.row_order).to(values.device)]

    def weights(self) -> NDArray[np.float32]:
        """The weights in GGUF row order, float32 (n_rows, n_columns)."""
        import torch

        return np.asarray(self.to_gguf_rows(self.module.weight.detach()).to(torch.float32).cpu().numpy())


@dataclass(frozen=True)
class TorchModel:
    """A loaded causal language model with its tokenizer and its maskable layers, in GGUF's tensor order."""

    name: str
    architecture: str
    model: Any
    tokenizer: Any
    layers: tuple[LinearLayer, ...]
    n_blocks: int

    @property
    def device(self) -> torch.device:
        """Where the embedding lives, which is where token ids must go."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype_name(self) -> str:
        """`float32` or `bfloat16`."""
        return str(self.layers[0].module.weight.dtype).removeprefix("torch.")

    def layer(self, name: str) -> LinearLayer:
        """The layer called `name`; KeyError when the model has none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def identity(self) -> ModelIdentity:
        """Shapes and sign sketch of the maskable tensors, as a pack records them."""
        shapes = tuple(layer.shape for layer in self.layers)
        return ModelIdentity(self.architecture, shapes, {ly.name: sample_signs(ly.weights()) for ly in self.layers})


def choose_device(wanted: str = "auto") -> str:
    """`wanted`, or for `auto` the best of cuda, mps and cpu that this machine has."""
    import torch

    if wanted != "auto":
        if wanted.split(":", maxsplit=1)[0] == "cuda" and not torch.cuda.is_available():
            raise InputError("no CUDA device here; use --device cpu or auto")
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(wanted: DType, device: str) -> DType:
    """`wanted`, or for `auto` bfloat16 where the hardware multiplies it natively, else float32."""
    import torch

    if wanted != "auto":
        return wanted
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device == "cpu" and torch.cpu.is_available() and _cpu_multiplies_bfloat16():
        return "bfloat16"
    return "float32"


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def load_torch_model(
    source: Path, *, name: str, device: str = "auto", dtype: DType = "auto", streaming: bool | Literal["auto"] = "auto"
) -> TorchModel:
    """Load `source`, a GGUF file or a Hugging Face folder, for calibration and evaluation.

    `streaming` keeps the decoder blocks in main memory and runs them on the device one at a time (layer_streaming.py):
    `auto` does so where memory is short for the weights; on a CPU that trades time for the memory of activations.
    Raises MissingDependencyError without the offline extra, ModelFileError when the file cannot be read and
    UnsupportedModelError when its layers have no GGUF names.
    """
    require_offline()
    set_thread_waiting()  # read when torch is first imported
    device = choose_device(device)
    model, tokenizer = _load_pretrained(source, choose_dtype(dtype, device))
    model.eval().requires_grad_(False)
    architecture = _architecture(model.config)
    layers = _named_layers(model, architecture)
    if source.is_file():
        layers = _ordered_as_in_file(layers, source)
    if streaming is True or (streaming == "auto" and exceeds_memory(model, device)):
        start_streaming(model, device)
    else:
        model.to(device)
    return TorchModel(name, architecture, model, tokenizer, layers, int(text_config(model.config).num_hidden_layers))


def _load_pretrained(source: Path, dtype: DType) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, file = (source.parent, source.name) if source.is_file() else (source, None)
    extra: dict[str, Any] = {} if file is None else {"gguf_file": file}
    try:
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # its GGUF reader draws a progress bar that cannot be turned off
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **extra)
            model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype), **extra)
    except Exception as error:  # a damaged file makes its readers raise whatever they stumble over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(f"{source}: transformers cannot load it ({reason})") from error
    return model, tokenizer


def text_config(config: Any) -> Any:
    """The language model's part of a Hugging Face config, which may have one for images too."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _architecture(config: Any) -> str:
    model_type = str(text_config(config).model_type)
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {model_type!r} has no known mapping to GGUF; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def _named_layers(model: Any, architecture: str) -> tuple[LinearLayer, ...]:
    """Every linear layer inside a block whose rows divide into groups, in GGUF's order of blocks and names."""
    import gguf
    import torch

    config = text_config(model.config)
    number = {text: value for value, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    layers = []
    for path, module in model.named_modules():
        name = names.get_name(path, try_suffixes=(".weight", ".bias")) if isinstance(module, torch.nn.Linear) else None
        if name is None or not name.startswith("blk.") or module.in_features % GROUP_SIZE:
            continue
        layers.append(LinearLayer(f"{name}.weight", module, _rotary_order(name, architecture, config)))
    if not layers:
        raise UnsupportedModelError(f"{architecture}: no linear layer of this model has a GGUF name")
    return tuple(layers)


def _rotary_order(name: str, architecture: str, config: Any) -> NDArray[np.int64] | None:
    """The row order that llama.cpp's converter gives attn_q and attn_k of a ROTARY_PERMUTED architecture."""
    part = name.rsplit(".", 1)[-1]
    if architecture not in ROTARY_PERMUTED or part not in ("attn_q", "attn_k"):
        return None
    n_heads = int(config.num_attention_heads if part == "attn_q" else config.num_key_value_heads)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    order = np.arange(n_heads * head_size).reshape(n_heads, 2, head_size // 2)
    return np.ascontiguousarray(order.swapaxes(1, 2).reshape(-1)).astype(np.int64)


def _ordered_as_in_file(layers: Sequence[LinearLayer], path: Path) -> tuple[LinearLayer, ...]:
    """The layers with the row order that the file shows, and in the file's own tensor order."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    missing = [layer.name for layer in layers if layer.name not in tensors]
    if missing:
        raise UnsupportedModelError(f"{path.name}: no tensor {missing[0]} ({len(missing)} of {len(layers)} missing)")
    rank = {name: i for i, name in enumerate(tensors)}
    checked = [_with_checked_order(layer, tensors[layer.name], path) for layer in layers]
    return tuple(sorted(checked, key=lambda layer: rank[layer.name]))


def _with_checked_order(layer: LinearLayer, tensor: Any, path: Path) -> LinearLayer:
    import gguf

    shape = layer.shape
    if tuple(int(n) for n in tensor.shape) != (shape.n_columns, shape.n_rows):
        raise ModelFileError(f"{path.name}: {layer.name} has shape {tuple(tensor.shape)}, expected {shape}")
    rows = np.unique(np.linspace(0, shape.n_rows - 1, 24).astype(np.int64))
    in_file = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type).astype(np.float32)
    weight = layer.module.weight.detach()
    for order in _candidate_orders(layer):
        in_model = weight[rows if order is None else order[rows]].float().cpu().numpy()
        # bfloat16 keeps 8 bits of the mantissa, so equal rows differ by at most 1/256 of their largest weight.
        if np.abs(in_model - in_file).max() <= np.abs(in_file).max() / 256:
            return LinearLayer(layer.name, layer.module, order)
    raise UnsupportedModelError(f"{path.name}: the rows of {layer.name} are stored in an order that is not known")


def _candidate_orders(layer: LinearLayer) -> Iterator[NDArray[np.int64] | None]:
    if layer.row_order is not None:
        yield layer.row_order
    yield None
