"""llama.cpp as its other users run it, on the same library: stock loading, stock contexts, LoRA and control vectors.

The functions for adapters are bound here, since the runtime has no use for them. Their names changed between versions;
either is found.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_float, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import GenerationError
from persona_edge.runtime.llama_api import Prototypes, bind, find_symbol
from persona_edge.runtime.llama_backend import LlamaBackend
from persona_edge.runtime.llama_library import LlamaLibrary
from persona_edge.runtime.llama_weights import LlamaModel
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import KvPolicy

__all__ = ["Adapters", "Engine", "StockModel", "evaluate_anew", "opened_model", "opened_runtime"]

_FLOATS = ctypes.POINTER(c_float)
_LORAS: Prototypes = {
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_adapter_lora_free": (None, (c_void_p,)),
}
_OLDER: Prototypes = {
    "llama_set_adapter_lora": (c_int32, (c_void_p, c_void_p, c_float)),
    "llama_clear_adapter_lora": (None, (c_void_p,)),
}


class StockModel(LlamaModel):
    """A model loaded with llama.cpp's own defaults: mapped and read-only, repacked where llama.cpp likes that.

    `repack` False leaves the weights as they lie in the file, which loads faster.
    """

    def __init__(self, path: str | os.PathLike[str], *, repack: bool = True) -> None:
        """Raises what LlamaModel raises."""
        self._repack = repack
        super().__init__(path, weights="heap")

    def _load(self) -> None:
        params = self.library.api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = self._repack
        self.library.listen()
        self._handle = self.library.api.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._handle:
            raise GenerationError(f"{self.path.name} does not load: {self.library.log.first_error()}")
        self._finalizer = weakref.finalize(self, self.library.api.llama_model_free, self._handle)


class Adapters:
    """llama.cpp's functions for LoRA adapters and control vectors."""

    def __init__(self, library: LlamaLibrary) -> None:
        """Raises WeightAccessError when the library has no such functions."""
        handles = [ctypes.CDLL(str(library.path))]
        functions = bind(handles, _LORAS, library.name)
        self.load_lora, self.free_lora = functions["llama_adapter_lora_init"], functions["llama_adapter_lora_free"]
        self._set_many = find_symbol(
            handles, "llama_set_adapters_lora", ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_size_t, _FLOATS)
        )
        if self._set_many is None:
            functions = bind(handles, _OLDER, library.name)
            self._set_one, self._clear = functions["llama_set_adapter_lora"], functions["llama_clear_adapter_lora"]
        arguments = (c_void_p, _FLOATS, c_size_t, c_int32, c_int32, c_int32)
        names = ("llama_set_adapter_cvec", "llama_apply_adapter_cvec")
        prototype = ctypes.CFUNCTYPE(c_int32, *arguments)
        found = next((f for name in names if (f := find_symbol(handles, name, prototype)) is not None), None)
        self._set_vector: Any = found or bind(handles, {names[0]: (c_int32, arguments)}, library.name)[names[0]]

    def set_lora(self, context: int, adapter: int | None) -> int:
        """Make `adapter` the only one, or have none; 0 when it went well."""
        if self._set_many is not None:
            n = 0 if adapter is None else 1
            code: int = self._set_many(context, (c_void_p * 1)(adapter), n, (c_float * 1)(1.0))
            return code
        self._clear(context)
        return 0 if adapter is None else int(self._set_one(context, adapter, 1.0))

    def set_vector(self, context: int, vector: NDArray[np.float32] | None) -> int:
        """Add `vector`, (n_layers - 1, hidden), to what these layers put out, or nothing; 0 when it went well."""
        if vector is None:
            return int(self._set_vector(context, None, 0, 0, 0, 0))
        n, hidden = vector.shape
        return int(self._set_vector(context, vector.ctypes.data_as(_FLOATS), vector.size, hidden, 1, n))


class Engine:
    """One context with llama.cpp's default parameters on a model. A context manager; close it before the model."""

    def __init__(self, model: LlamaModel, *, n_ctx: int, n_threads: int) -> None:
        """Raises GenerationError when there is no memory for it."""
        self._api = model.library.api
        self._model = model
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = n_ctx, n_threads, n_threads
        self._n_batch = int(params.n_batch)
        self._context = self._api.llama_init_from_model(model.handle, params)
        if not self._context:
            raise GenerationError(f"no context of {n_ctx} tokens could be made; close something")
        self._adapters = Adapters(model.library)
        self._loras: list[int] = []

    def load_lora(self, path: Path) -> int:
        """An adapter for `set_lora`, freed with this object. Raises GenerationError."""
        adapter = self._adapters.load_lora(self._model.handle, os.fsencode(path))
        if not adapter:
            raise GenerationError(f"{path.name} does not load: {self._model.library.log.first_error()}")
        self._loras.append(adapter)
        return int(adapter)

    def set_lora(self, adapter: int | None) -> None:
        """Make `adapter` the only one, or have none."""
        _check(self._adapters.set_lora(self._context, adapter), "set the LoRA adapter")

    def set_vector(self, vector: NDArray[np.float32] | None) -> None:
        """Make `vector` the control vector, or have none."""
        _check(self._adapters.set_vector(self._context, vector), "set the control vector")

    def clear(self) -> None:
        """Forget every token."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def evaluate(self, tokens: Sequence[int]) -> None:
        """Evaluate `tokens` after those that are in the cache; returns when the logits of the last are there."""
        for start in range(0, len(tokens), self._n_batch):
            chunk = tokens[start : start + self._n_batch]
            array = (c_int32 * len(chunk))(*chunk)
            _check(self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(chunk))), "evaluate")
        if not np.isfinite(self._api.llama_get_logits_ith(self._context, -1)[0]):
            raise GenerationError("the model computes no numbers; its synthetic weights are wrong")

    def last_logits(self, n_vocab: int) -> NDArray[np.float32]:
        """Of the token evaluated last, (n_vocab,): a view of llama.cpp's own memory."""
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (n_vocab,))

    def close(self) -> None:
        """Free the context and its adapters."""
        if self._context:
            self._api.llama_free(self._context)
            for adapter in self._loras:
                self._adapters.free_lora(adapter)
        self._context, self._loras = None, []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def opened_model(path: str) -> Iterator[LlamaModel]:
    """The model as our runtime loads it, for several contexts."""
    model = LlamaModel(path)
    try:
        yield model
    finally:
        model.close()


@contextmanager
def opened_runtime(
    model: LlamaModel, *, n_ctx: int, n_threads: int, kv: KvPolicy = "reprefill", kv_megabytes: int = 256
) -> Iterator[tuple[PersonaRuntime, LlamaBackend]]:
    """A runtime on `model`, which stays open, and its backend, to evaluate tokens without sampling any."""
    backend = LlamaBackend(model, n_ctx=n_ctx, n_threads=n_threads)
    try:
        yield PersonaRuntime(model, backend, 0, kv, kv_megabytes), backend
    finally:
        backend.close()


def evaluate_anew(context: Engine | LlamaBackend, tokens: Sequence[int]) -> None:
    """Evaluate `tokens` from an empty cache."""
    context.clear()
    context.evaluate(tokens)


def _check(code: int, what: str) -> None:
    if code:
        raise GenerationError(f"llama.cpp could not {what} (code {code})")
