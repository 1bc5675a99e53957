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

__all__ = ["LLAMA_PROBE", "ONNX_PROBE", "TORCH_PROBE", "ProbeResult", "run_probe"]

_SECONDS = 60.0

# Everything that opening a model asks of libllama before the model: its functions, structures, tensors and devices.
LLAMA_PROBE = """
import json
from persona_edge.errors import PersonaEdgeError
from persona_edge.runtime.llama_library import load_library
try:
    library = load_library()
except PersonaEdgeError as error:
    print(json.dumps({"problem": str(error)}))
else:
    print(json.dumps({
        "name": library.name,
        "path": str(library.path),
        "direct": library.get_tensor is not None,
        "gpu": library.has_gpu,
    }))
"""

# How personas would be applied to an ONNX model, tried on a tiny one; what it would leave in the cache goes with it.
ONNX_PROBE = """
import json, os, tempfile
from pathlib import Path
from persona_edge.errors import PersonaEdgeError
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    os.environ["PERSONA_EDGE_CACHE"] = folder
    from persona_edge.runtime.onnx_trial import try_mechanisms
    model = Path(folder) / "trial"
    model.mkdir()
    try:
        chosen = try_mechanisms(model)
    except PersonaEdgeError as error:
        print(json.dumps({"problem": str(error)}))
    else:
        print(json.dumps({"mechanism": chosen.editor.mechanism, "notes": chosen.notes}))
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
