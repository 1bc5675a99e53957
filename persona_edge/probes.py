"""Questions to libraries that may be slow, missing a symbol, or built for another processor.

Each runs in a Python of its own with a time limit: an illegal instruction ends that process, not the one that asks.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LLAMA_PROBE", "TORCH_PROBE", "ProbeResult", "run_probe"]

_SECONDS = 60.0

# What editing weights needs of llama.cpp: reading and writing a tensor through its backend. The tensor itself is asked
# of `llama_model::get_tensor` by its C++ symbol; without it, a callback sees every tensor during one evaluation.
LLAMA_PROBE = """
import ctypes, json, pathlib
import llama_cpp
folder = pathlib.Path(llama_cpp.__file__).parent / "lib"
libraries = []
for path in sorted(folder.iterdir()):
    if path.suffix in (".so", ".dylib", ".dll"):
        try:
            libraries.append(ctypes.CDLL(str(path)))
        except OSError:
            pass
def exported(name):
    return any(hasattr(library, name) for library in libraries)
required = ["llama_model_load_from_file", "llama_decode", "ggml_get_data", "ggml_nbytes",
            "ggml_backend_tensor_get", "ggml_backend_tensor_set"]
direct = ["_ZNK11llama_model10get_tensorEPKc", "?get_tensor@llama_model@@QEBAPEBUggml_tensor@@PEBD@Z"]
print(json.dumps({
    "required": {name: exported(name) for name in required},
    "direct": {name: exported(name) for name in direct},
    "gpu": bool(llama_cpp.llama_supports_gpu_offload()),
}))
"""

TORCH_PROBE = """
import json
import torch
if torch.cuda.is_available():
    found = {"device": "cuda", "name": torch.cuda.get_device_name()}
elif torch.backends.mps.is_available():
    found = {"device": "mps", "name": "Apple GPU"}
else:
    found = {"device": "cpu", "name": ""}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class ProbeResult:
    """What the library answered, or in one line why it did not."""

    values: Mapping[str, object] = field(default_factory=dict)
    failure: str | None = None


def run_probe(code: str, seconds: float = _SECONDS) -> ProbeResult:
    """Runs `code`, whose last line of output is a JSON object, in another Python for at most `seconds`."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(failure=f"no answer within {seconds:.0f} seconds")
    except OSError as error:
        return ProbeResult(failure=f"{sys.executable} cannot be run: {error.strerror or error}")
    if process.returncode < 0:
        return ProbeResult(failure=f"its process died of {_signal_name(-process.returncode)}")
    if process.returncode:
        return ProbeResult(failure=_last_line(process.stderr) or f"exit code {process.returncode}")
    try:
        values = json.loads(_last_line(process.stdout))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        return ProbeResult(failure="its answer cannot be read")
    return ProbeResult(values=values)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
