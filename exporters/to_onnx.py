"""From the model at hand, a GGUF file or a Hugging Face folder, to an ONNX folder that the same mask packs fit.

The conversion is done by onnxruntime-genai's model builder: int4 in blocks of 32 (a block is then a pack's group), with
fused attention and a KV cache, the tokenizer's files beside it. The builder runs in a process of its own, so that its
memory and its output stay there. The folder appears under its name once complete and read back, or not at all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from persona_edge.errors import MissingDependencyError, ModelError, OutputError, UnsupportedModelError
from persona_edge.exporters import onnx_builder
from persona_edge.maskpack import PACK_SUFFIX, PackSummary, write_pack
from persona_edge.masks import GROUP_SIZE, PersonaSet
from persona_edge.onnx_model import OnnxModel, read_onnx_model
from persona_edge.onnx_weights import check_onnx

__all__ = [
    "OnnxExport",
    "Precision",
    "export_onnx",
    "onnx_folder",
    "onnx_pack_path",
    "require_onnx",
    "write_onnx_model",
]

Precision = Literal["int4", "int8", "fp32", "fp16"]

_PACKAGES = ("onnx", "onnxruntime", "onnxruntime_genai", "onnx_ir", "torch", "transformers")
_OPTIONS = ("windowed_kv_cache=false",)  # every layer keeps the whole context, so that a cache can be cut anywhere


@dataclass(frozen=True)
class OnnxExport:
    """The folder that was written, its graph, and the pack in it."""

    folder: Path
    model: Path
    pack: Path
    summary: PackSummary


def onnx_folder(weights: Path, precision: Precision = "int4") -> Path:
    """Where the ONNX form of `weights` goes: `<name>.onnx-int4` beside them."""
    name = weights.name if weights.is_dir() else weights.stem
    return weights.parent / f"{name}.onnx-{precision}"


def onnx_pack_path(model: Path, set_name: str) -> Path:
    """The pack of a graph: `model.<set>.maskpack` in its folder."""
    return model.parent / f"{model.stem}.{set_name}{PACK_SUFFIX}"


def export_onnx(
    weights: Path,
    personas: PersonaSet,
    *,
    set_name: str,
    folder: Path | None = None,
    pack: Path | None = None,
    precision: Precision = "int4",
) -> OnnxExport:
    """Write the ONNX form of `weights`, unless it is there already, and the pack of `personas` into it (or to `pack`).

    Raises ModelMismatchError when the personas belong to other weights, and what `write_onnx_model` raises.
    """
    target = onnx_folder(weights, precision) if folder is None else folder
    model = read_onnx_model(target) if target.exists() else write_onnx_model(weights, target, precision)
    check_onnx(personas.identity, model)
    place = onnx_pack_path(model.path, set_name) if pack is None else pack
    return OnnxExport(target, model.path, place, write_pack(place, personas))


def write_onnx_model(source: Path, folder: Path, precision: Precision = "int4") -> OnnxModel:
    """Convert `source` into the new folder `folder`. Whole or not at all.

    Raises MissingDependencyError, OutputError when `folder` exists or cannot be written, ModelFileError for a source
    that cannot be read, UnsupportedModelError when the builder does not know the architecture or writes other blocks.
    """
    require_onnx()
    if folder.exists():
        raise OutputError(f"{folder} exists already; remove it or choose another place")
    with _temporary_beside(folder) as work:
        original = source if source.is_dir() else _write_original(source, work / "original")
        built = work / folder.name
        _run_builder(original, built, work / "cache", precision, name=source.name)
        _check_blocks(read_onnx_model(built))
        try:
            os.replace(built, folder)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}; nothing was written") from error
    return read_onnx_model(folder)


def require_onnx() -> None:
    """Raise MissingDependencyError, naming the packages, unless the extras offline and onnx are installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"writing ONNX models needs {', '.join(missing)}, not installed here; "
            "run: pip install 'persona-edge[offline,onnx]'"
        )


@contextmanager
def _temporary_beside(folder: Path) -> Iterator[Path]:
    """A folder on the same disk as `folder`, gone afterwards."""
    try:
        work = Path(tempfile.mkdtemp(prefix=".persona-edge-", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder.parent}: {error.strerror or error}; choose another place"
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_original(gguf: Path, folder: Path) -> Path:
    """A GGUF's weights, dequantized to float32, as a Hugging Face folder.

    A model that was loaded from a GGUF refuses to be saved, so its tensors move into a fresh model of its config.
    """
    import torch
    import transformers

    from persona_edge.modeling import load_torch_model

    loaded = load_torch_model(gguf, name=gguf.stem, device="cpu", dtype="float32", streaming=False)
    state, config = loaded.model.state_dict(), loaded.model.config
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        fresh: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    try:
        fresh.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; free some space") from error
    return folder


def _run_builder(original: Path, folder: Path, cache: Path, precision: Precision, *, name: str) -> None:
    """Convert the Hugging Face folder `original`, which errors call `name`, into `folder`."""
    command = [sys.executable, "-m", onnx_builder.__name__]
    command += ["-i", str(original), "-o", str(folder), "-c", str(cache), "-p", precision, "-e", "cpu"]
    command += ["--extra_options", *_OPTIONS]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0 and (folder / "model.onnx").is_file():
        return
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    reason = said[-1] if said and done.returncode >= 0 else f"exit code {done.returncode}"
    if done.returncode == onnx_builder.FULL_DISK:
        raise OutputError(f"cannot write {folder.name}: {reason}; free some space")
    what = f"{name} ({_architecture(original)})"
    if done.returncode == onnx_builder.UNKNOWN_MODEL:
        raise UnsupportedModelError(f"onnxruntime-genai cannot convert {what}: {reason}; use the GGUF file")
    raise ModelError(f"onnxruntime-genai could not convert {what}: {reason}; run again, or use the GGUF file")


def _architecture(folder: Path) -> str:
    """The class that the model in a Hugging Face folder is of, as its config says."""
    try:
        (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its config names no architecture"
    return str(name)


def _check_blocks(model: OnnxModel) -> None:
    for matrix in model.matrices():
        if matrix.scales is not None and matrix.block_size > GROUP_SIZE:
            raise UnsupportedModelError(
                f"{matrix.name} was quantized in blocks of {matrix.block_size}, masks need {GROUP_SIZE}; "
                "install another version of onnxruntime-genai"
            )
