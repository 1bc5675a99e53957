"""A llama.cpp model whose weights can be edited: loading it that way, and finding its tensors in memory.

Weights are loaded into plain heap memory of the CPU (no mmap, no repacked buffers, no GPU), in the layout of the GGUF
file, so what is written to them takes effect on the next evaluated token. A tensor's address is asked from the model by
name, or, where the library does not export that method, read off the graph of one evaluated token; both give the same.
How the weights are used is `llama_backend`'s business, what is written to them `switcher`'s.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import ModelError, ModelFileError, UnsupportedModelError, WeightAccessError
from persona_edge.gguf_magic import check_is_gguf
from persona_edge.runtime.llama_library import GgmlTensor, GgufInitParams, LlamaLibrary, load_library
from persona_edge.runtime.switcher import WeightTensor

__all__ = ["LlamaModel", "TensorLookup", "find_tensors", "weights_digest"]

TensorLookup = Literal["auto", "symbol", "graph"]
_UNSUPPORTED = ("unknown model architecture", "unknown pre-tokenizer", "unsupported")
_OUT_OF_MEMORY = ("allocate", "bad_alloc")


class LlamaModel:
    """A loaded model. It owns the memory that `find_tensors` hands out views of: never use them after `close`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Load the GGUF at `path`, or all parts when it is the first part of a split model.

        Raises ModelNotFoundError, ModelFileError (not a GGUF, damaged), UnsupportedModelError (an architecture that
        this libllama does not know, or one that does not generate text), ModelError (too large for the memory) and
        MissingDependencyError.
        """
        self.path = Path(path)
        check_is_gguf(self.path)
        self.library: LlamaLibrary = load_library()
        parts = _split_parts(self.library, self.path)
        self.file_tensor_names = tuple(name for part in parts for name in _tensor_names(self.library, part))
        self._handle: int | None = _load(self.library, self.path)
        self._finalizer = weakref.finalize(self, self.library.api.llama_model_free, self._handle)
        self.architecture = self.metadata("general.architecture") or "unknown"
        _check_generates_text(self)

    @property
    def handle(self) -> int:
        """The `llama_model *`. WeightAccessError after `close`."""
        if self._handle is None:
            raise WeightAccessError(f"{self.path.name} is closed; load it again")
        return self._handle

    def metadata(self, key: str) -> str | None:
        """The GGUF metadata value of `key` as text; None when there is none."""
        read, name = self.library.api.llama_model_meta_val_str, key.encode()
        length = read(self.handle, name, None, 0)
        if length < 0:
            return None
        text = ctypes.create_string_buffer(length + 1)
        read(self.handle, name, text, len(text))
        return text.raw[:length].decode("utf-8", "replace")

    def close(self) -> None:
        """Free the model and its weights."""
        self._handle = None
        self._finalizer()


def find_tensors(model: LlamaModel, *, lookup: TensorLookup = "auto") -> dict[str, WeightTensor]:
    """Every tensor of the file that the model keeps in memory, by GGUF name, in the file's order.

    `data` is a writable view of the model's own memory, shape (n_bytes,); `n_rows` counts the rows of all higher
    dimensions, so a vector has one row. `lookup` forces one of the two ways of finding addresses.
    Raises WeightAccessError when a tensor cannot be found, or does not lie in memory that the CPU may write.
    """
    if lookup == "auto":
        lookup = "symbol" if model.library.get_tensor is not None else "graph"
    handles = _handles_by_symbol(model) if lookup == "symbol" else _handles_in_graph(model)
    if not handles:
        raise WeightAccessError(
            f"none of the {len(model.file_tensor_names)} tensors of {model.path.name} could be found in memory; "
            "install llama-cpp-python 0.3.36"
        )
    return {name: _weight_tensor(model, name, handles[name]) for name in model.file_tensor_names if name in handles}


def weights_digest(tensors: Iterable[WeightTensor]) -> str:
    """SHA-256, as hex, over name and memory of each of `tensors` in order: equal digests mean equal weights."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.name}\0{tensor.data.nbytes}\0".encode())
        digest.update(tensor.data.data)
    return digest.hexdigest()


def _split_parts(library: LlamaLibrary, path: Path) -> list[Path]:
    """The files of a model, by llama.cpp's rule: `name-00001-of-00003.gguf` and so on, loaded by naming the first."""
    stem, _, count = path.stem.rpartition("-of-")
    prefix, _, number = stem.rpartition("-")
    if not (prefix and len(number) == len(count) == 5 and (number + count).isdigit()):
        return [path]
    if int(number) != 1:
        raise ModelFileError(f"{path.name} is part {int(number)} of a split model; give the path of part 1")
    buffer = ctypes.create_string_buffer(len(os.fsencode(path)) + 64)
    parts = []
    for index in range(int(count)):
        library.api.llama_split_path(buffer, len(buffer), os.fsencode(path.with_name(prefix)), index, int(count))
        parts.append(Path(os.fsdecode(buffer.value)))
        check_is_gguf(parts[-1])
    return parts


def _tensor_names(library: LlamaLibrary, path: Path) -> list[str]:
    """Tensor names of one GGUF file, in order, read by ggml's own reader without loading weights."""
    ggml = library.ggml
    library.log.clear()
    gguf = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
    if not gguf:
        raise ModelFileError(_damaged(path, library.log.first_error()))
    try:
        return [ggml.gguf_get_tensor_name(gguf, i).decode() for i in range(ggml.gguf_get_n_tensors(gguf))]
    except UnicodeDecodeError:
        raise ModelFileError(_damaged(path, "a tensor's name is not UTF-8")) from None
    finally:
        ggml.gguf_free(gguf)


def _load(library: LlamaLibrary, path: Path) -> int:
    """The `llama_model *` of `path`, with its weights in plain CPU memory."""
    library.log.clear()
    handle: int | None = library.api.llama_model_load_from_file(os.fsencode(path), _editable_params(library.api))
    if handle:
        return handle
    reason = library.log.first_error().removeprefix("error loading model: ")
    if any(phrase in reason for phrase in _UNSUPPORTED) and "''" not in reason:  # '' is a name that is missing
        raise UnsupportedModelError(f"{path.name} cannot be run by llama-cpp-python {library.version}: {reason}")
    if any(phrase in reason for phrase in _OUT_OF_MEMORY):
        n_megabytes = path.stat().st_size // 10**6
        raise ModelError(f"not enough memory for {path.name} ({n_megabytes} MB): {reason}; use a smaller model")
    raise ModelFileError(_damaged(path, reason))


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged or incomplete: {reason or 'llama.cpp gives no reason'}; download it again"


def _editable_params(api: ModuleType) -> ctypes.Structure:
    """Model parameters that put weights where they can be edited: heap, layout of the file, CPU.

    `load_mode` replaced `use_mmap` within the range of versions that are supported.
    """
    params: ctypes.Structure = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    if hasattr(params, "load_mode"):
        params.load_mode = api.LLAMA_LOAD_MODE_NONE
    else:
        params.use_mmap = False
    return params


def _check_generates_text(model: LlamaModel) -> None:
    api = model.library.api
    if api.llama_model_has_encoder(model.handle) or not api.llama_model_has_decoder(model.handle):
        model.close()
        raise UnsupportedModelError(
            f"{model.path.name} ({model.architecture}) is not a decoder-only language model; use one that is"
        )


def _handles_by_symbol(model: LlamaModel) -> dict[str, int]:
    """Address of each `ggml_tensor`, asked from the model by name."""
    get_tensor = model.library.get_tensor
    if get_tensor is None:
        raise WeightAccessError("this libllama does not export llama_model::get_tensor; use the graph lookup")
    found = {name: get_tensor(model.handle, name.encode()) for name in model.file_tensor_names}
    return {name: handle for name, handle in found.items() if handle}


def _handles_in_graph(model: LlamaModel) -> dict[str, int]:
    """Address of each `ggml_tensor` that takes part in evaluating one token, read off the graph's nodes."""
    api = model.library.api
    wanted = {name.encode() for name in model.file_tensor_names}
    found: dict[bytes, int] = {}

    def look_at(node: int, _ask: bool, _user_data: object) -> bool:
        for source in GgmlTensor.from_address(node).src:
            if source and (name := GgmlTensor.from_address(source).name) in wanted:
                found[name] = source
        return False  # its values are of no interest

    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 32
    params.cb_eval = api.ggml_backend_sched_eval_callback(look_at)
    context = api.llama_init_from_model(model.handle, params)
    if not context:
        raise WeightAccessError(
            f"cannot evaluate {model.path.name} to find its tensors; {model.library.log.first_error()}"
        )
    try:
        api.llama_decode(context, api.llama_batch_get_one((api.llama_token * 1)(0), 1))
    finally:
        api.llama_free(context)
    return {name.decode(): handle for name, handle in found.items()}


def _weight_tensor(model: LlamaModel, name: str, handle: int) -> WeightTensor:
    ggml = model.library.ggml
    tensor = GgmlTensor.from_address(handle)
    n_columns, *higher = (int(n) for n in tensor.ne)
    n_rows = int(np.prod(higher))
    n_bytes = int(ggml.ggml_nbytes(handle))
    confirmed: Mapping[str, bool] = {
        "name": ggml.ggml_get_name(handle) == name.encode() == tensor.name,
        "shape": ggml.ggml_nelements(handle) == n_columns * n_rows,
        "data": bool(tensor.data) and ggml.ggml_get_data(handle) == tensor.data,
    }
    if not all(confirmed.values()):
        wrong = ", ".join(what for what, agrees in confirmed.items() if not agrees)
        raise WeightAccessError(
            f"{name}: {wrong} in memory is not what libllama reports; install llama-cpp-python 0.3.36"
        )
    _check_writable(model, name, tensor.buffer)
    data: NDArray[np.uint8] = np.asarray(_Memory(tensor.data, n_bytes, model))
    return WeightTensor(name, int(tensor.type), n_rows, n_columns, data)


class _Memory:
    """`n_bytes` at `address`, for NumPy to view. A view holds this, and so the model, as long as it exists itself."""

    def __init__(self, address: int, n_bytes: int, owner: LlamaModel) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (n_bytes,), "data": (address, False)}


def _check_writable(model: LlamaModel, name: str, buffer: int | None) -> None:
    """Repacked, AMX and GPU buffers are no host buffers; a mapped one is, but its pages are read-only."""
    ggml = model.library.ggml
    kind = ggml.ggml_backend_buffer_name(buffer).decode() if buffer else "missing"
    if not buffer or not ggml.ggml_backend_buffer_is_host(buffer) or "Mapped" in kind:
        raise WeightAccessError(
            f"{name} lies in a {kind} buffer, which cannot be edited in place; "
            "weights must be in plain CPU memory (no mmap, no repacking, no GPU layers)"
        )
