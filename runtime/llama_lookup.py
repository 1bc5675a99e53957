"""The address of each `ggml_tensor` of a loaded model: asked by name, or read off the graph of one evaluated token.

Asking needs an exported C++ method (`llama_model::get_tensor`) that not every libllama has; the graph is there always,
takes one evaluation and misses tensors that take no part in it. Where both find a tensor they find the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

from persona_edge.errors import WeightAccessError
from persona_edge.runtime.llama_library import GgmlTensor, LlamaLibrary

__all__ = ["TensorLookup", "tensor_handles"]

TensorLookup = Literal["auto", "symbol", "graph"]


def tensor_handles(library: LlamaLibrary, model: int, names: Sequence[str], lookup: TensorLookup) -> dict[str, int]:
    """The addresses of those tensors of `names` that are found. `lookup` forces one of the two ways.

    Raises WeightAccessError when none is found, or when that way does not exist.
    """
    if lookup == "auto":
        lookup = "symbol" if library.get_tensor is not None else "graph"
    handles = _by_symbol(library, model, names) if lookup == "symbol" else _in_graph(library, model, names)
    if not handles:
        raise WeightAccessError(
            f"none of the model's {len(names)} tensors could be found in memory; install llama-cpp-python 0.3.36"
        )
    return handles


def _by_symbol(library: LlamaLibrary, model: int, names: Sequence[str]) -> dict[str, int]:
    if library.get_tensor is None:
        raise WeightAccessError("this libllama does not export llama_model::get_tensor; use the graph lookup")
    found = {name: library.get_tensor(model, name.encode()) for name in names}
    return {name: handle for name, handle in found.items() if handle}


def _in_graph(library: LlamaLibrary, model: int, names: Sequence[str]) -> dict[str, int]:
    api = library.api
    wanted = {name.encode() for name in names}
    found: dict[bytes, int] = {}

    def look_at(node: int, _ask: bool, _user_data: object) -> bool:
        for source in GgmlTensor.from_address(node).src:
            if source and (name := GgmlTensor.from_address(source).name) in wanted:
                found[name] = source
        return False  # its values are of no interest

    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 32
    callback = api.ggml_backend_sched_eval_callback(look_at)
    params.cb_eval = ctypes.cast(callback, ctypes.c_void_p)
    context = api.llama_init_from_model(model, params)
    if not context:
        raise WeightAccessError(f"cannot evaluate the model to find its tensors; {library.log.first_error()}")
    try:
        api.llama_decode(context, api.llama_batch_get_one((api.llama_token * 1)(0), 1))
    finally:
        api.llama_free(context)
    return {name.decode(): handle for name, handle in found.items()}
