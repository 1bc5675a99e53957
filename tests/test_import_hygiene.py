"""Importing the runtime costs little and pulls in nothing heavy; what is missing is one clear error."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "click", "llama_cpp", "jinja2", "onnxruntime", "gguf", "tqdm", "safetensors")


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["session", "switcher", "llama_backend", "onnx_session", "open_runtime"])
def test_the_runtime_imports_nothing_heavy(module: str) -> None:
    loaded = run(f"import sys, persona_edge.runtime.{module}; print(*(m for m in {HEAVY!r} if m in sys.modules))")
    assert loaded == ""


@pytest.mark.model
def test_a_whole_session_needs_neither_torch_nor_transformers_nor_click(request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue("smollm2_path")
    code = f"""
import sys
from persona_edge.runtime.session import PersonaRuntime, SamplingOptions
with PersonaRuntime.open({str(path)!r}, n_ctx=256, n_threads=1) as model:
    model.chat([{{"role": "user", "content": "Hi"}}], SamplingOptions(max_tokens=1))
print(*(m for m in ("torch", "transformers", "click", "gguf") if m in sys.modules))
"""
    assert run(code) == ""


def test_without_a_libllama_the_error_says_what_to_install(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("model") / "any.gguf"
    path.write_bytes(b"GGUF")
    code = f"""
import sys
sys.modules["llama_cpp"] = sys.modules["llama_cpp_py_sync"] = None
from persona_edge.errors import MissingDependencyError
from persona_edge.runtime.session import PersonaRuntime
try:
    PersonaRuntime.open({str(path)!r})
except MissingDependencyError as error:
    print(error)
"""
    message = run(code)
    assert message == (
        "running a GGUF model needs llama.cpp; install it with: pip install 'persona-edge[prebuilt]' "
        "(no compiler needed), or: pip install 'llama-cpp-python>=0.3.36,<0.4' (builds it for this machine)"
    )


def test_all_names_exist() -> None:
    modules = [
        *("chat_template", "fair_lock", "generation", "llama_backend", "llama_library", "llama_vocabulary"),
        *("llama_api", "llama_files", "llama_find", "llama_lookup", "llama_mapping", "llama_structs", "llama_weights"),
        *("attached", "backend", "kv_cache", "older_glibc", "onnx_session", "open_runtime", "persona_session"),
        *("placement", "session", "text_stream", "values"),
    ]
    code = f"""
import importlib
for name in {modules!r}:
    module = importlib.import_module("persona_edge.runtime." + name)
    assert module.__doc__ and all(hasattr(module, public) for public in module.__all__), name
"""
    assert run(code) == ""
