"""Weights quantized by GGML itself, for types that gguf-py can read and not write."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_NAMES = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}


@cache
def _library() -> ctypes.CDLL:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(folder / _NAMES.get(sys.platform, "libggml-base.so")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def quantized(weights: NDArray[np.float32], ggml_type: int, n_bytes: int) -> NDArray[np.uint8]:
    """`weights` (n_rows, n_columns) in a GGML type: (n_bytes,) uint8, which must be as many as the type takes."""
    source, data = np.ascontiguousarray(weights), np.zeros(n_bytes, np.uint8)
    written = _library().ggml_quantize_chunk(ggml_type, source.ctypes.data, data.ctypes.data, 0, *weights.shape, None)
    assert written == n_bytes
    return data
