"""Thin access to libllama and libggml-base: loading them, ggml's functions, and the layout of a tensor in memory.

Any libllama whose structures are known will do (`llama_find` says which is taken, `llama_api` binds it). The layout of
`ggml_tensor` is no public interface of ggml; it is proven on tensors made for the purpose (`check_tensor_layout`)
before a tensor of a model is read. A process holds one libllama: two would share one another's ggml.

ctypes functions carry no static types: `LlamaLibrary.api` and `.ggml` are namespaces of untyped names.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from persona_edge.errors import MissingDependencyError, WeightAccessError
from persona_edge.machine import cpu_flags
from persona_edge.runtime.llama_api import Prototypes, bind, bind_api, find_symbol
from persona_edge.runtime.llama_find import LibraryFile, find_library
from persona_edge.runtime.older_glibc import is_about_glibc, loadable_copy

__all__ = [
    "GgmlTensor",
    "GgufInitParams",
    "LlamaLibrary",
    "LogCollector",
    "check_processor",
    "check_tensor_layout",
    "load_library",
]

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


_TENSOR = c_void_p
_BUFFER = c_void_p
_PROTOTYPES: Prototypes = {
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
    "ggml_backend_tensor_get": (None, (_TENSOR, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_set": (None, (_TENSOR, c_void_p, c_size_t, c_size_t)),
    "gguf_init_from_file": (c_void_p, (c_char_p, GgufInitParams)),
    "gguf_free": (None, (c_void_p,)),
    "gguf_get_n_tensors": (c_int64, (c_void_p,)),
    "gguf_get_tensor_name": (c_char_p, (c_void_p, c_int64)),
    "gguf_get_data_offset": (c_size_t, (c_void_p,)),
    "gguf_get_tensor_offset": (c_size_t, (c_void_p, c_int64)),
    "gguf_get_tensor_size": (c_size_t, (c_void_p, c_int64)),
}
_GPU_KINDS = (1, 2)  # ggml's device types: a GPU of its own, one that shares the CPU's memory
_INSTRUCTIONS = {
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AVX_VNNI": "avx_vnni",
    "BMI2": "bmi2",
    "F16C": "f16c",
    "FMA": "fma",
}
"""llama.cpp's names of instruction sets, and what /proc/cpuinfo calls them."""
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

    `api` holds libllama's functions, structures and constants under their C names (`llama_api`); `ggml` those of
    libggml-base listed in `_PROTOTYPES`. `get_tensor(model, name)` returns a tensor's address or None; it is None
    itself where the library does not export that C++ method. `name` is the package and its version, `path` the file
    that was loaded. `has_gpu`: it would put layers on a GPU. `log_callback` is `log` as C calls it.
    """

    api: SimpleNamespace
    ggml: SimpleNamespace
    get_tensor: Callable[[int, bytes], int | None] | None
    log: LogCollector
    name: str
    path: Path
    has_gpu: bool
    log_callback: object

    def listen(self) -> None:
        """Take over llama.cpp's log, also from an app that set its own since, and forget what was reported."""
        self.api.llama_log_set(self.log_callback, None)
        self.log.clear()


_loaded: dict[Path, LlamaLibrary] = {}
_loading = threading.Lock()


def load_library(wanted: str | os.PathLike[str] | None = None) -> LlamaLibrary:
    """The libllama that `find_library` finds, loaded once per process, with its log turned silent.

    Raises MissingDependencyError when there is none or it cannot be loaded, ModelNotFoundError when `wanted` is no
    file, and WeightAccessError when its parameters or tensors are laid out in a way that is not known, or when the
    process already holds another one.
    """
    file = find_library(wanted)
    with _loading:
        if _loaded and file.path not in _loaded:
            [used] = _loaded
            raise WeightAccessError(f"this process already uses {used}; {file.path} needs a process of its own")
        if not _loaded:
            _loaded[file.path] = _load(file)
        return _loaded[file.path]


def _load(file: LibraryFile) -> LlamaLibrary:
    libraries = _open(file)
    ggml = SimpleNamespace(**bind(libraries, _PROTOTYPES, file.name))
    _check_own_ggml(file, libraries[0])
    api = bind_api(libraries, file.name)
    check_tensor_layout(ggml)
    log, path = LogCollector(), Path(libraries[0]._name)
    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, None)
    api.llama_backend_init()
    _find_devices(libraries, file)
    check_processor(file, api.llama_print_system_info().decode("utf-8", "replace"), cpu_flags())
    has_gpu = api.llama_supports_gpu_offload() and _has_gpu(libraries)
    return LlamaLibrary(api, ggml, _bind_get_tensor(libraries), log, file.name, path, has_gpu, callback)


def _open(file: LibraryFile) -> list[ctypes.CDLL]:
    """libllama, and on Windows ggml's libraries: elsewhere a handle also finds what the library depends on."""
    try:
        return _open_at(file.path)
    except OSError as error:
        reason = " ".join(str(error).split())
    if not is_about_glibc(reason):
        raise MissingDependencyError(f"{file.name} does not load ({reason}); {file.reinstall}")
    from persona_edge.cache import cache_folder

    try:
        return _open_at(loadable_copy(file.path, cache_folder()))
    except OSError as error:
        reason = " ".join(str(error).split())
    raise MissingDependencyError(f"{file.name} needs a newer system ({reason}); use pip install llama-cpp-python")


def _open_at(path: Path) -> list[ctypes.CDLL]:
    if sys.platform == "win32":
        os.add_dll_directory(str(path.parent))
    beside = [path.with_name(name) for name in ("ggml-base.dll", "ggml.dll")]
    return [ctypes.CDLL(str(each)) for each in (path, *beside) if each == path or each.exists()]


class _SymbolInfo(ctypes.Structure):
    _fields_ = (("file", c_char_p), ("base", c_void_p), ("name", c_char_p), ("address", c_void_p))


def _check_own_ggml(file: LibraryFile, libllama: ctypes.CDLL) -> None:
    """The loader gives a library the ggml that is there already, be it another build's; where it tells, refuse that."""
    if sys.platform == "win32" or not any(Path(libllama._name).parent.glob("*ggml-base*")):
        return
    info = _SymbolInfo()
    address = ctypes.cast(libllama.ggml_nbytes, c_void_p)
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(info)) or not info.file:
        return
    used = Path(os.fsdecode(info.file)).resolve()
    if used.parent != Path(libllama._name).resolve().parent:
        raise WeightAccessError(
            f"this process already uses another llama.cpp ({used}); load {file.name} in a process of its own"
        )


def _find_devices(libraries: Sequence[ctypes.CDLL], file: LibraryFile) -> None:
    """Builds that keep each kind of processor in a library of its own start with none of them."""
    count = find_symbol(libraries, "ggml_backend_dev_count", ctypes.CFUNCTYPE(c_size_t))
    load_all = find_symbol(libraries, "ggml_backend_load_all_from_path", ctypes.CFUNCTYPE(None, c_char_p))
    if count is not None and load_all is not None and not count():
        load_all(os.fsencode(Path(libraries[0]._name).parent))
        if not count():
            raise MissingDependencyError(f"{file.name} finds no processor to compute on; {file.reinstall}")


def _has_gpu(libraries: Sequence[ctypes.CDLL]) -> bool:
    """A library may be able to use a GPU, and find none."""
    by_type = find_symbol(libraries, "ggml_backend_dev_by_type", ctypes.CFUNCTYPE(c_void_p, c_int))
    return by_type is not None and any(by_type(kind) for kind in _GPU_KINDS)


def check_processor(file: LibraryFile, system_info: str, flags: frozenset[str] | None) -> None:
    """MissingDependencyError when the library was compiled for instructions that the processor does not have.

    `system_info` is llama.cpp's own list (`AVX2 = 1 | …`), `flags` the processor's; None, not known, passes.
    """
    if flags is None:
        return
    compiled_for = set(re.findall(r"(\w+) = 1", system_info))
    missing = [name for name, flag in _INSTRUCTIONS.items() if name in compiled_for and flag not in flags]
    if missing:
        raise MissingDependencyError(
            f"{file.name} was compiled for a processor with {', '.join(missing)}, which this one does not have; "
            "install llama-cpp-python, which is built for this machine: pip install 'llama-cpp-python>=0.3.36,<0.4'"
        )


def _bind_get_tensor(libraries: Sequence[ctypes.CDLL]) -> Callable[[int, bytes], int | None] | None:
    """`const ggml_tensor * llama_model::get_tensor(const char *) const`: a C++ method under its mangled name."""
    return find_symbol(libraries, _GET_TENSOR, ctypes.CFUNCTYPE(c_void_p, c_void_p, c_char_p))


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
            "install a version that it knows: pip install 'llama-cpp-python==0.3.36'"
        )
