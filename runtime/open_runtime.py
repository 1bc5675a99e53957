"""One door to both backends: a GGUF file opens on llama.cpp, an ONNX folder or graph on ONNX Runtime.

What opens is a `PersonaSession`, whichever it is.
"""

from __future__ import annotations

import os
from pathlib import Path

from persona_edge.errors import InputError
from persona_edge.maskpack import MaskPack
from persona_edge.onnx_model import find_onnx
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.placement import WeightsMode
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import KvPolicy

__all__ = ["open_runtime"]


def open_runtime(
    model: str | os.PathLike[str],
    pack: str | os.PathLike[str] | MaskPack | None = None,
    *,
    n_ctx: int = 4096,
    n_threads: int | None = None,
    seed: int = 0,
    weights: WeightsMode = "auto",
    n_gpu_layers: int = 0,
    kv: KvPolicy = "reprefill",
) -> PersonaSession:
    """Load `model`, whichever of the two it is, and attach `pack` if given; see `PersonaRuntime.open`.

    `weights` and `n_gpu_layers` are for GGUF files: InputError with an ONNX model. Raises what `PersonaRuntime.open`
    and `OnnxRuntime.open` raise.
    """
    if find_onnx(Path(model)) is None:
        return PersonaRuntime.open(
            model, pack, n_ctx=n_ctx, n_threads=n_threads, seed=seed, weights=weights, n_gpu_layers=n_gpu_layers, kv=kv
        )
    if weights != "auto" or n_gpu_layers:
        raise InputError(
            "where weights lie can be chosen for GGUF files only; leave weights and GPU layers as they are"
        )
    from persona_edge.runtime.onnx_session import OnnxRuntime

    return OnnxRuntime.open(model, pack, n_ctx=n_ctx, n_threads=n_threads, seed=seed, kv=kv)
