"""Thin access to ONNX Runtime: importing it, making sessions, and what identifies a machine to cached packings.

Everything that makes a session goes through `make_session`, so that threads and log level are set in one place, and the
differences between an unmodified session and a masked one are the arguments: other initializers, or an output file.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from persona_edge.errors import GenerationError, MissingDependencyError, ModelFileError
from persona_edge.machine import cpu_flags

__all__ = ["load_onnxruntime", "machine_key", "make_session", "save_packed"]

_QUIET = 3  # errors only: saving a packed model warns that it is for this machine, which is what it is for


@cache
def load_onnxruntime() -> ModuleType:
    """The onnxruntime package; MissingDependencyError when it is missing or does not load."""
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        raise MissingDependencyError("ONNX models need onnxruntime; run: pip install 'persona-edge[onnx]'") from None
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise MissingDependencyError(
            f"onnxruntime is installed but does not load ({reason}); run: pip install --force-reinstall onnxruntime"
        ) from None


@cache
def machine_key() -> str:
    """What decides how ONNX Runtime packs weights: its version, the processor's kind and features."""
    flags = cpu_flags()
    features = " ".join(sorted(flags)) if flags is not None else platform.processor()
    text = "\n".join([load_onnxruntime().__version__, platform.system(), platform.machine(), features])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_session(
    model: Path | bytes,
    *,
    n_threads: int,
    initializers: Mapping[str, NDArray[Any]] | None = None,
    save_packed_to: Path | None = None,
    data_folder: Path | None = None,
) -> Any:
    """An InferenceSession on the CPU.

    `initializers` replace those of the model, which stays as it is; to edit them later, keep the arrays. A `model`
    given as bytes has its external data in `data_folder`. `save_packed_to` writes the optimized model with its packed
    weights, data file beside it. Raises ModelFileError when ONNX Runtime refuses the model, GenerationError when memory
    does not suffice.
    """
    runtime = load_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    kept = {name: runtime.OrtValue.ortvalue_from_numpy(values) for name, values in (initializers or {}).items()}
    for name, value in kept.items():
        options.add_initializer(name, value)
    if save_packed_to is not None:
        options.optimized_model_filepath = str(save_packed_to)
        entry = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(entry + "file_name", save_packed_to.name + ".data")
        options.add_session_config_entry(entry + "min_size_in_bytes", "256")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    if isinstance(model, bytes) and data_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data_folder))
    try:
        source: str | bytes = model if isinstance(model, bytes) else str(model)
        session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise GenerationError("not enough memory to load the model; close other programs") from None
    except Exception as error:  # its own exceptions share no base but Exception
        reason = " ".join(str(error).split())
        name = "the graph" if isinstance(model, bytes) else str(model)
        raise ModelFileError(f"{name}: ONNX Runtime cannot load it ({reason:.300}); export it again") from error
    session.kept_initializers = kept  # ONNX Runtime only borrows them, and crashes when they are gone
    return session


def save_packed(model: Path | bytes, target: Path) -> None:
    """Write `model`, optimized for and packed on this machine, as `target` with `<target>.data` beside it."""
    make_session(model, n_threads=1, save_packed_to=target)
