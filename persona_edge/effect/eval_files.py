"""Which files an evaluation runs: what a model argument and a backend stand for, engine by engine.

A record is of one model. With a GGUF file that is the file, also when the ONNX folder made from it runs beside it or in
its place; the ONNX folder's own hash is then part of the settings. An ONNX model by itself has nothing that PyTorch
could load, so only what a pack holds can be measured on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from persona_edge.downloads import Progress as DownloadProgress
from persona_edge.effect.eval_plan import EvalRequest
from persona_edge.effect.interfaces import EngineName
from persona_edge.errors import InputError
from persona_edge.export import fingerprint, weights_of
from persona_edge.onnx_start import onnx_model_for

__all__ = ["EvalFiles", "files_of"]


@dataclass(frozen=True)
class EvalFiles:
    """`weights` are what the record is of: an ONNX graph, or the GGUF file or Hugging Face folder that PyTorch loads.

    `runtimes` are the files of the engines beside PyTorch, in the order in which they run.
    """

    weights: Path
    with_pytorch: bool
    runtimes: Mapping[EngineName, Path] = field(default_factory=dict)

    @property
    def is_onnx(self) -> bool:
        """Whether the record is of an ONNX model."""
        return self.weights.suffix == ".onnx"

    @property
    def name(self) -> str:
        """What the model is called: an ONNX graph, always called alike, by its folder."""
        if self.is_onnx:
            return self.weights.resolve().parent.name
        return self.weights.stem if self.weights.is_file() else self.weights.name

    @property
    def engines(self) -> tuple[EngineName, ...]:
        """The engines in the order in which they run."""
        return (*(("pytorch",) if self.with_pytorch else ()), *self.runtimes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return fingerprint(self.weights)

    @cached_property
    def onnx_fingerprint(self) -> str | None:
        """SHA-256 of the graph and its data that the engine onnx runs; None when it does not run."""
        graph = self.runtimes.get("onnx")
        return None if graph is None else fingerprint(graph)


def files_of(request: EvalRequest, progress: DownloadProgress | None = None) -> EvalFiles:
    """The files of `request`, fetched if need be.

    Raises InputError when engine, backend and model do not go together, and what `weights_of` and `onnx_model_for`
    raise.
    """
    with_pytorch, with_runtime = request.engine != "runtime", request.engine != "pytorch"
    if request.backend != "auto" and not with_runtime:
        raise InputError(f"--backend {request.backend} is for the runtime; add --engine runtime or --engine both")
    graph = onnx_model_for(request.model, "gguf" if request.backend == "gguf" else "auto") if with_runtime else None
    if graph is not None:
        if with_pytorch or request.backend == "both":
            raise InputError(
                f"{request.model} is an ONNX model, which runs on --engine runtime alone; "
                "pass its GGUF file with --backend onnx or both for more"
            )
        return EvalFiles(graph, with_pytorch=False, runtimes={"onnx": graph})
    weights = weights_of(request.model, progress)
    runtimes: dict[EngineName, Path] = {}
    if with_runtime:
        if not weights.is_file():
            raise InputError(
                f"the engine runtime needs a .gguf file or an ONNX folder, and {weights.name} is neither; "
                "use --engine pytorch"
            )
        if request.backend != "onnx":
            runtimes["runtime"] = weights
        beside = onnx_model_for(request.model, "onnx") if request.backend in ("onnx", "both") else None
        if beside is not None:
            runtimes["onnx"] = beside
    return EvalFiles(weights, with_pytorch, runtimes)
