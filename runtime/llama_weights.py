"""A llama.cpp model whose weights can be edited: loading it that way, and views of its tensors' memory.

Weights lie in memory in the layout of the GGUF file, so what is written to them takes effect on the next evaluated
token. That memory is the process's own heap, or the file itself, mapped copy-on-write; `placement` says which is when
better. How the weights are used is `llama_backend`'s business, what is written to them `switcher`'s.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import ModelError, ModelFileError, UnsupportedModelError, WeightAccessError
from persona_edge.gguf_magic import check_is_gguf
from persona_edge.runtime.huge_pages import huge_pages
from persona_edge.runtime.llama_device import REPACKED, DeviceTensor, check_device, file_copy
from persona_edge.runtime.llama_files import ModelPart, damaged, read_parts
from persona_edge.runtime.llama_library import GgmlTensor, LlamaLibrary, load_library
from persona_edge.runtime.llama_lookup import TensorLookup, tensor_handles
from persona_edge.runtime.llama_mapping import make_private, mapped_spans
from persona_edge.runtime.placement import Placement, WeightsMode, choose_placement
from persona_edge.runtime.switcher import WeightTensor

__all__ = ["LlamaModel", "TensorLookup", "find_tensors", "weights_digest"]

_UNSUPPORTED = ("unknown model architecture", "unknown pre-tokenizer", "unsupported")
_ALL_LAYERS = 999
_OUT_OF_MEMORY = ("allocate", "bad_alloc")


class LlamaModel:
    """A loaded model. It owns the memory that `find_tensors` hands out views of: never use them after `close`.

    `placement` says where the weights lie, and why there.
    """

    _handle: int | None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        weights: WeightsMode = "auto",
        n_gpu_layers: int = 0,
        library: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load the GGUF at `path`, or all parts when it is the first part of a split model.

        `n_gpu_layers` counts from the last layer; negative means all. It has no effect where the library finds no GPU.
        Raises ModelNotFoundError, ModelFileError (not a GGUF, damaged), UnsupportedModelError (an architecture that
        this libllama does not know, or one that does not generate text), ModelError (too large for the memory),
        WeightAccessError ("mmap" was asked for and is impossible here) and MissingDependencyError.
        """
        self.path = Path(path)
        check_is_gguf(self.path)
        self.library: LlamaLibrary = load_library(library)
        self.parts = read_parts(self.library, self.path)
        self.file_tensor_names = tuple(tensor.name for part in self.parts for tensor in part.tensors)
        self.n_gpu_layers = _ALL_LAYERS if n_gpu_layers < 0 else n_gpu_layers
        n_bytes = sum(part.path.stat().st_size for part in self.parts)
        self.placement = choose_placement(weights, n_bytes, self.n_gpu_layers if self.library.has_gpu else 0)
        if self.placement.kind == "repacked":
            _check_no_amx(self.library)
        self._load()
        self.architecture = self.metadata("general.architecture") or "unknown"
        _check_generates_text(self)
        if self.placement.kind == "mmap":
            self._make_mapping_writable(or_use_heap=weights == "auto")

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

    def tensor_handles(self, lookup: TensorLookup = "auto") -> dict[str, int]:
        """The address of each `ggml_tensor` of the file that the model keeps, by name, in the file's order."""
        found = tensor_handles(self.library, self.handle, self.file_tensor_names, lookup)
        return {name: found[name] for name in self.file_tensor_names if name in found}

    def _load(self) -> None:
        params = _editable_params(self.library.api, self.placement, n_gpu_layers=self.n_gpu_layers)
        with huge_pages(params) if self.placement.kind == "heap" else nullcontext():
            self._handle = _load(self.library, self.path, params)
        self._finalizer = weakref.finalize(self, self.library.api.llama_model_free, self._handle)

    def _make_mapping_writable(self, *, or_use_heap: bool) -> None:
        """From now on an edit copies its page. Where that fails, load anew into the heap, or say why it failed."""
        try:
            make_private(mapped_spans(self.parts, _mapped_addresses(self)))
        except WeightAccessError as error:
            self.close()
            if not or_use_heap:
                raise WeightAccessError(
                    f"the mapped weights of {self.path.name} cannot be edited: {error}; open it with weights='heap'"
                ) from None
            self.placement = Placement("heap", f"mapped weights cannot be edited ({error})", is_fallback=True)
            self._load()


def find_tensors(model: LlamaModel, *, lookup: TensorLookup = "auto") -> dict[str, WeightTensor]:
    """Every tensor of the file that the model keeps in memory, by GGUF name, in the file's order.

    `data` is a writable view of the model's own memory, shape (n_bytes,); `n_rows` counts the rows of all higher
    dimensions, so a vector has one row. A tensor on a GPU is a `DeviceTensor`, whose `data` is a copy to edit. `lookup`
    forces one of the two ways of finding addresses.
    Raises WeightAccessError when a tensor cannot be found, or lies where it cannot be written.
    """
    handles = model.tensor_handles(lookup)
    in_file = _FileCopy(model.parts)
    return {name: _weight_tensor(model, name, handle, in_file) for name, handle in handles.items()}


def weights_digest(tensors: Iterable[WeightTensor]) -> str:
    """SHA-256, as hex, over name and memory of each of `tensors` in order: equal digests mean equal weights."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.name}\0{tensor.data.nbytes}\0".encode())
        digest.update((tensor.read() if isinstance(tensor, DeviceTensor) else tensor.data).data)
    return digest.hexdigest()


def _load(library: LlamaLibrary, path: Path, params: ctypes.Structure) -> int:
    """The `llama_model *` of `path`."""
    library.listen()
    handle: int | None = library.api.llama_model_load_from_file(os.fsencode(path), params)
    if handle:
        return handle
    reason = library.log.first_error().removeprefix("error loading model: ")
    if any(phrase in reason for phrase in _UNSUPPORTED) and "''" not in reason:  # '' is a name that is missing
        raise UnsupportedModelError(f"{path.name} cannot be run by {library.name}: {reason}")
    if any(phrase in reason for phrase in _OUT_OF_MEMORY):
        n_megabytes = path.stat().st_size // 10**6
        raise ModelError(f"not enough memory for {path.name} ({n_megabytes} MB): {reason}; use a smaller model")
    raise ModelFileError(damaged(path, reason))


def _editable_params(api: SimpleNamespace, placement: Placement, *, n_gpu_layers: int) -> ctypes.Structure:
    """Model parameters that put weights where they can be edited: in the layout of the file, unless they are repacked.

    `load_mode` replaced `use_mmap` within the range of versions that are supported.
    """
    params: ctypes.Structure = api.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    params.use_extra_bufts = placement.kind == "repacked"
    is_mapped = placement.kind == "mmap"
    if hasattr(params, "load_mode"):
        params.load_mode = api.LLAMA_LOAD_MODE_MMAP if is_mapped else api.LLAMA_LOAD_MODE_NONE
    else:
        params.use_mmap = is_mapped
    return params


def _check_no_amx(library: LlamaLibrary) -> None:
    """With AMX, llama.cpp repacks into tiles of its own. Some virtual machines announce AMX and die of it."""
    if b"AMX_INT8 = 1" in library.api.llama_print_system_info():
        raise WeightAccessError(
            "on a processor with AMX repacked weights cannot be edited; open it with weights='auto'"
        )


def _check_generates_text(model: LlamaModel) -> None:
    api = model.library.api
    if api.llama_model_has_encoder(model.handle) or not api.llama_model_has_decoder(model.handle):
        model.close()
        raise UnsupportedModelError(
            f"{model.path.name} ({model.architecture}) is not a decoder-only language model; use one that is"
        )


def _mapped_addresses(model: LlamaModel) -> dict[str, int]:
    """Where the data of each tensor begins that lies in a mapped buffer."""
    tensors = {name: GgmlTensor.from_address(handle) for name, handle in model.tensor_handles().items()}
    return {name: tensor.data for name, tensor in tensors.items() if _is_mapped(model, tensor.buffer)}


def _weight_tensor(model: LlamaModel, name: str, handle: int, in_file: _FileCopy) -> WeightTensor:
    ggml = model.library.ggml
    tensor = GgmlTensor.from_address(handle)
    n_columns, *higher = (int(n) for n in tensor.ne)
    n_rows = int(np.prod(higher))
    n_bytes = int(ggml.ggml_nbytes(handle))
    confirmed: Mapping[str, bool] = {
        "name": ggml.ggml_get_name(handle) == name.encode() == tensor.name,
        "shape": ggml.ggml_nelements(handle) == n_columns * n_rows,
        "data": bool(tensor.data and tensor.buffer) and ggml.ggml_get_data(handle) == tensor.data,
    }
    if not all(confirmed.values()):
        wrong = ", ".join(what for what, agrees in confirmed.items() if not agrees)
        raise WeightAccessError(
            f"{name}: {wrong} in memory is not what libllama reports; install llama-cpp-python 0.3.36"
        )
    if _is_in_reach(model, tensor.buffer):
        data: NDArray[np.uint8] = np.asarray(_Memory(tensor.data, n_bytes, model))
        return WeightTensor(name, int(tensor.type), n_rows, n_columns, data)
    kind = ggml.ggml_backend_buffer_name(tensor.buffer).decode()
    check_device(name, kind)
    ggml_type, data, is_repacked = int(tensor.type), in_file[name], kind.startswith(REPACKED)
    return DeviceTensor(name, ggml_type, n_rows, n_columns, data, model.library, handle, model, repacked=is_repacked)


class _FileCopy:
    """`file_copy` of a model, made when a tensor of it is wanted."""

    def __init__(self, parts: Sequence[ModelPart]) -> None:
        self._parts = parts

    @cached_property
    def _tensors(self) -> dict[str, NDArray[np.uint8]]:
        return file_copy(self._parts)

    def __getitem__(self, name: str) -> NDArray[np.uint8]:
        return self._tensors[name]


class _Memory:
    """`n_bytes` at `address`, for NumPy to view. A view holds this, and so the model, as long as it exists itself."""

    def __init__(self, address: int, n_bytes: int, owner: LlamaModel) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (n_bytes,), "data": (address, False)}


def _is_in_reach(model: LlamaModel, buffer: int) -> bool:
    """Whether the CPU may write there. Repacked, AMX and GPU buffers are no host buffers; a mapped one is, but its
    pages are read-only at first."""
    is_host = model.library.ggml.ggml_backend_buffer_is_host(buffer)
    return bool(is_host) and (model.placement.kind == "mmap" or not _is_mapped(model, buffer))


def _is_mapped(model: LlamaModel, buffer: int | None) -> bool:
    """Whether `buffer` is pages of the file; ggml says so in the buffer's name only."""
    return bool(buffer) and b"Mapped" in model.library.ggml.ggml_backend_buffer_name(buffer)
