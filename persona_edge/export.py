"""`export`, as one call: resolve the model, load it, build the personas, write the pack next to the weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from persona_edge.build import BuildSettings, build_personas
from persona_edge.cache import file_sha256
from persona_edge.calibration import CalibrationSettings, Calibrator, Progress, silent
from persona_edge.catalogue import resolve_model
from persona_edge.downloads import Progress as DownloadProgress
from persona_edge.errors import ModelError
from persona_edge.exporters.to_gguf import check_gguf, pack_path, require_writable
from persona_edge.maskpack import PackSummary, write_pack
from persona_edge.masks import PersonaSet
from persona_edge.modeling import DType, load_torch_model, require_offline
from persona_edge.persona_sets import load_persona_set

__all__ = ["ExportRequest", "ExportResult", "export", "fingerprint", "weights_of"]


@dataclass(frozen=True)
class ExportRequest:
    """What to export. `model` and `personas` are as on the command line; `output` None means next to the weights."""

    model: str
    personas: str
    output: Path | None = None
    build: BuildSettings = field(default_factory=BuildSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    original: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    n_contrasts: int | None = None


@dataclass(frozen=True)
class ExportResult:
    """Where the pack is, what it costs, and the personas with their report."""

    path: Path
    summary: PackSummary
    personas: PersonaSet


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
    target = pack_path(weights, spec.name) if request.output is None else request.output
    require_writable(target)
    source = weights if request.original is None else _original(request.original)
    model = load_torch_model(source, name=weights.stem, device=request.device, dtype=request.dtype)
    calibrator = Calibrator(model, fingerprint(source), settings=request.calibration, progress=progress)
    personas = build_personas(calibrator, spec, request.build)
    if weights.is_file():
        check_gguf(weights, personas)
    return ExportResult(target, write_pack(target, personas), personas)


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
    """SHA-256 of a file; of a folder, over its weight files' names, sizes and modification times."""
    if source.is_file():
        return file_sha256(source)
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    listed = "\n".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()
