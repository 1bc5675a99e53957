"""Thin access to libllama and libggml-base: which libraries, their functions, and the layout of a tensor in memory.

Everything that touches a native library goes through a `LlamaLibrary`, so that another libllama can take the place of
llama-cpp-python's by changing `load_library` alone. The layout of `ggml_tensor` is no public interface of ggml; it is
proven on tensors made for the purpose (`check_tensor_layout`) before a tensor of a model is read.

ctypes functions carry no static types: `LlamaLibrary.api` and `.ggml` are namespaces of untyped names.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
from collections import deque
from collections.abc import Callable, Mapping
from ctypes import c_bool, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from persona_edge.errors import MissingDependencyError, WeightAccessError

__all__ = ["GgmlTensor", "GgufInitParams", "LlamaLibrary", "LogCollector", "check_tensor_layout", "load_library"]

_ERROR_LEVEL = 4


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml 0.9 and later. `ne` counts elements per dimension, rows of `ne[0]` columns."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


class _GgmlInitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class GgufInitParams(ctypes.Structure):
    _fields_ = (("no_alloc", c_bool), ("ctx", c_void_p))


_Prototype = Callable[[tuple[str, ctypes.CDLL]], Callable[..., Any]]
_TENSOR = c_void_p
_BUFFER = c_void_p
_PROTOTYPES: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_get_name": (c_char_p, (_TENSOR,)),
    "ggml_get_data": (c_void_p, (_TENSOR,)),
    "ggml_nelements": (c_int64, (_TENSOR,)),
    "ggml_nbytes": (c_size_t, (_TENSOR,)),
    "ggml_init": (c_void_p, (_GgmlInitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_new_tensor_2d": (_TENSOR, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (_TENSOR, (c_void_p, _TENSOR, _TENSOR)),
    "ggml_set_name": (_TENSOR, (_TENSOR, c_char_p)),
    "ggml_backend_cpu_buffer_from_ptr": (_BUFFER, (c_void_p, c_size_t)),
    "ggml_backend_tensor_alloc": (c_int, (_BUFFER, _TENSOR, c_void_p)),
    "ggml_backend_buffer_free": (None, (_BUFFER,)),
    "ggml_backend_buffer_is_host": (c_bool, (_BUFFER,)),
    "ggml_backend_buffer_name": (c_char_p, (_BUFFER,)),
    "gguf_init_from_file": (c_void_p, (c_char_p, GgufInitParams)),
    "gguf_free": (None, (c_void_p,)),
    "gguf_get_n_tensors": (c_int64, (c_void_p,)),
    "gguf_get_tensor_name": (c_char_p, (c_void_p, c_int64)),
    "gguf_get_data_offset": (c_size_t, (c_void_p,)),
    "gguf_get_tensor_offset": (c_size_t, (c_void_p, c_int64)),
    "gguf_get_tensor_size": (c_size_t, (c_void_p, c_int64)),
}
_GET_TENSOR = "_ZNK11llama_model10get_tensorEPKc"


class LogCollector:
    """Keeps what llama.cpp reports as errors, so that a failure becomes one clear line instead of a page on stderr."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=20)

    def __call__(self, level: int, text: bytes | None, _user_data: object) -> None:
        """llama.cpp's log callback; keeps errors, drops the rest."""
        line = (text or b"").decode("utf-8", "replace").strip()
        if level == _ERROR_LEVEL and line:
            self._lines.append(line)

    def clear(self) -> None:
        """Forget what was reported so far."""
        self._lines.clear()

    def first_error(self) -> str:
        """The first error since `clear`, without the name of the C function that reported it; "" when there is none."""
        return self._lines[0].split(": ", 1)[-1] if self._lines else ""


@dataclass(frozen=True)
class LlamaLibrary:
    """A loaded libllama with its libggml-base.

    `api` holds libllama's functions, structures and constants under their C names (the llama_cpp module); `ggml` those
    of libggml-base listed in `_PROTOTYPES`. `get_tensor(model, name)` returns a tensor's address or None; it is None
    itself where the library does not export that C++ method. `keep_alive` holds what the C side points to.
    """

    api: ModuleType
    ggml: SimpleNamespace
    get_tensor: Callable[[int, bytes], int | None] | None
    log: LogCollector
    version: str
    path: Path
    keep_alive: tuple[object, ...]


@cache
def load_library() -> LlamaLibrary:
    """The libllama that llama-cpp-python brings, loaded once per process, with its log turned silent.

    Raises MissingDependencyError when the package is missing or its library cannot be loaded, and WeightAccessError
    when this version lays out its tensors in a way that is not known.
    """
    api = _import_llama_cpp()
    libllama: ctypes.CDLL = api.llama_cpp._lib
    ggml = SimpleNamespace(**_bind_ggml(libllama))
    check_tensor_layout(ggml)
    log = LogCollector()
    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, c_void_p(0))
    api.llama_backend_init()
    return LlamaLibrary(
        api, ggml, _bind_get_tensor(libllama), log, str(api.__version__), Path(libllama._name), keep_alive=(callback,)
    )


def _import_llama_cpp() -> ModuleType:
    try:
        return importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        missing = "" if error.name == "llama_cpp" else f" ({error.name} is missing)"
        raise MissingDependencyError(
            f"running a GGUF model needs llama-cpp-python{missing}; install it with: "
            "pip install 'llama-cpp-python>=0.3.36,<0.4'"
        ) from None
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MissingDependencyError(
            f"llama-cpp-python is installed but its library does not load ({reason}); reinstall it with: "
            "pip install --force-reinstall --no-cache-dir llama-cpp-python"
        ) from None


def _bind_ggml(libllama: ctypes.CDLL) -> dict[str, Any]:
    """Functions of libggml-base; prototypes of our own, because llama_cpp shares its function objects with everyone.

    Where the loader also searches what libllama depends on (Linux, macOS) its handle finds them; Windows needs ggml's.
    """
    libraries = [libllama]
    folder = Path(libllama._name).parent
    libraries += [ctypes.CDLL(str(path)) for path in (folder / "ggml-base.dll",) if path.exists()]
    functions = {}
    for name, (result, arguments) in _PROTOTYPES.items():
        function = _find(libraries, name, ctypes.CFUNCTYPE(result, *arguments))
        if function is None:
            raise WeightAccessError(
                f"{folder} does not export {name}, which editing weights needs; install llama-cpp-python 0.3.36"
            )
        functions[name] = function
    return functions


def _bind_get_tensor(libllama: ctypes.CDLL) -> Callable[[int, bytes], int | None] | None:
    """`const ggml_tensor * llama_model::get_tensor(const char *) const`: a C++ method under its mangled name."""
    return _find([libllama], _GET_TENSOR, ctypes.CFUNCTYPE(c_void_p, c_void_p, c_char_p))


def _find(libraries: list[ctypes.CDLL], name: str, prototype: _Prototype) -> Callable[..., Any] | None:
    for library in libraries:
        try:
            return prototype((name, library))
        except AttributeError:
            continue
    return None


def check_tensor_layout(ggml: SimpleNamespace) -> None:
    """Prove that `GgmlTensor` reads what this libggml-base writes, on two small tensors and their product.

    Raises WeightAccessError when a field is elsewhere. Nothing is read beyond what ggml itself allocated.
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE)  # page-aligned, as ggml demands of a buffer
    address = ctypes.addressof(c_uint8.from_buffer(memory))
    context = ggml.ggml_init(_GgmlInitParams(16 * ggml.ggml_tensor_overhead(), None, True))
    buffer = ggml.ggml_backend_cpu_buffer_from_ptr(address, mmap.PAGESIZE)
    try:
        left, right = (ggml.ggml_new_tensor_2d(context, 0, 32, n_rows) for n_rows in (3, 5))
        ggml.ggml_set_name(left, b"layout.probe")
        ggml.ggml_backend_tensor_alloc(buffer, left, address)
        product = GgmlTensor.from_address(ggml.ggml_mul_mat(context, left, right))
        tensor = GgmlTensor.from_address(left)
        as_expected = (
            ggml.ggml_tensor_overhead() >= ctypes.sizeof(GgmlTensor)
            and (tensor.type, tuple(tensor.ne), tuple(tensor.nb)) == (0, (32, 3, 1, 1), (4, 128, 384, 384))
            and (tensor.name, tensor.data, tensor.buffer) == (b"layout.probe", address, buffer)
            and (tensor.view_src, tensor.op, product.op != 0) == (None, 0, True)
            and (tuple(product.ne), tuple(product.src[:3])) == ((3, 5, 1, 1), (left, right, None))
        )
    finally:
        ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(context)
    if not as_expected:
        raise WeightAccessError(
            "this libggml-base keeps its tensors in a layout that persona-edge does not know; "
            "install llama-cpp-python 0.3.36"
        )
