"""`export`, as one call: resolve the model, load it, build the personas, write the pack next to the weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from persona_edge.build import BuildSettings, build_personas
from persona_edge.cache import file_sha256
from persona_edge.calibration import CalibrationSettings, Calibrator, Progress, silent
from persona_edge.catalogue import resolve_model
from persona_edge.downloads import Progress as DownloadProgress
from persona_edge.errors import ModelError
from persona_edge.exporters.to_gguf import check_gguf, pack_path, require_writable
from persona_edge.exporters.to_onnx import export_onnx, onnx_folder, require_onnx
from persona_edge.maskpack import PackSummary, write_pack
from persona_edge.masks import PersonaSet
from persona_edge.modeling import DType, load_torch_model, require_offline
from persona_edge.onnx_model import read_onnx_model
from persona_edge.persona_sets import load_persona_set
from persona_edge.runtime.onnx_prepared import model_hash

__all__ = ["ExportRequest", "ExportResult", "Format", "export", "fingerprint", "weights_of"]

Format = Literal["gguf", "onnx"]
"""What a pack goes next to: the weights that were named, or an int4 ONNX model made from them."""


@dataclass(frozen=True)
class ExportRequest:
    """What to export. `model` and `personas` are as on the command line.

    `output` None means next to the weights. With both formats it is the pack next to the weights that it names.
    """

    model: str
    personas: str
    output: Path | None = None
    build: BuildSettings = field(default_factory=BuildSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    original: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    n_contrasts: int | None = None
    formats: tuple[Format, ...] = ("gguf",)


@dataclass(frozen=True)
class ExportResult:
    """Where the pack is, what it costs, the personas with their report, and the ONNX model if one was asked for."""

    path: Path
    summary: PackSummary
    personas: PersonaSet
    onnx_folder: Path | None = None


def export(
    request: ExportRequest, progress: Progress = silent, download_progress: DownloadProgress | None = None
) -> ExportResult:
    """Do everything `persona-edge export` does; every error is a PersonaEdgeError and leaves no half-written pack.

    What can be refused is refused before the minutes of work: settings, the persona set, the target folder.
    """
    request.build.check()
    spec = load_persona_set(request.personas)
    require_offline()
    if request.n_contrasts is not None:
        limited = tuple(item.limit(request.n_contrasts) for item in spec.sets)
        spec = type(spec)(spec.name, limited, spec.personas)
    weights = weights_of(request.model, download_progress)
    folder = onnx_folder(weights) if "onnx" in request.formats else None
    if folder is not None:
        require_onnx()
        require_writable(folder.parent / f"{folder.name}.tmp")
    target = pack_path(weights, spec.name) if request.output is None else request.output
    if "gguf" in request.formats or request.output is not None:
        require_writable(target)
    source = weights if request.original is None else _original(request.original)
    model = load_torch_model(source, name=weights.stem, device=request.device, dtype=request.dtype)
    calibrator = Calibrator(model, fingerprint(source), settings=request.calibration, progress=progress)
    personas = build_personas(calibrator, spec, request.build)
    if weights.is_file():
        check_gguf(weights, personas)
    if folder is None:
        return ExportResult(target, write_pack(target, personas), personas)
    summary = write_pack(target, personas) if "gguf" in request.formats else None  # before the minutes of converting
    del model, calibrator
    alone = None if request.output is None or summary is not None else request.output
    made = export_onnx(weights, personas, set_name=spec.name, folder=folder, pack=alone)
    if summary is None:
        return ExportResult(made.pack, made.summary, personas, folder)
    return ExportResult(target, summary, personas, folder)


def weights_of(argument: str, progress: DownloadProgress | None = None) -> Path:
    """The GGUF file, or else the folder of weights, that `argument` stands for; fetched if need be. ModelError."""
    resolved = resolve_model(argument) if progress is None else resolve_model(argument, progress=progress)
    path = resolved.gguf_path or resolved.folder
    if path is None:
        raise ModelError(f"{argument} is not on this machine; download it (hf download {argument}) and pass its folder")
    return path


def _original(argument: str) -> Path:
    resolved = resolve_model(argument, want="original")
    path = resolved.folder or resolved.gguf_path
    if path is None:
        raise ModelError(f"{argument} is not on this machine; download it first and pass its folder")
    return path


def fingerprint(source: Path) -> str:
    """SHA-256 of a file, of an ONNX graph with its data; of a folder, over its files' names, sizes and times."""
    if source.suffix == ".onnx":
        return model_hash(read_onnx_model(source))
    if source.is_file():
        return file_sha256(source)
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    listed = "\n".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()
