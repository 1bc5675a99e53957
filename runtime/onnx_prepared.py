"""The model packed for this machine: made once with ONNX Runtime itself, kept in the cache, never changed afterwards.

    <cache>/onnx/<model hash>-<machine>/model.onnx, model.onnx.data     the packed model
    <cache>/onnx/<model hash>-<machine>/checked.json                    what the self-test found (onnx_mechanism)
    <cache>/onnx/<model hash>-<machine>/images/<program>.npz            packed personas (onnx_editors)
    <cache>/onnx/layouts-<machine>/<layout>.npz                         where packed scales lie (onnx_packing)
    <cache>/onnx/hashes/<path's hash>.json                              a file's SHA-256, while it is unchanged

The original model's files are only read.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persona_edge.cache import cache_folder, file_sha256, writing_to
from persona_edge.files import write_atomically
from persona_edge.onnx_model import OnnxMatrix, OnnxModel
from persona_edge.runtime.onnx_packing import Blob, ScalePlaces, layout_key, learn_places, packed_blobs
from persona_edge.runtime.onnx_runtime import machine_key, save_packed

__all__ = ["PreparedModel", "model_hash", "places_for", "prepare"]

_GRAPH = "model.onnx"


@dataclass(frozen=True)
class PreparedModel:
    """A packed model in the cache; `blobs` says where in `data` each matrix's packed form lies."""

    graph: Path
    blobs: Mapping[str, Blob]

    @property
    def data(self) -> Path:
        """The file of weights."""
        return self.graph.with_name(self.graph.name + ".data")

    @property
    def folder(self) -> Path:
        """Where everything about this model on this machine is kept."""
        return self.graph.parent


def prepare(model: OnnxModel) -> PreparedModel:
    """The packed form of `model`, from the cache or made now (seconds). Raises OutputError, ModelFileError."""
    folder = cache_folder() / "onnx" / f"{model_hash(model)[:24]}-{machine_key()}"
    if not (folder / _GRAPH).is_file():
        work = folder.with_name(f".persona-edge-{secrets.token_hex(8)}.tmp")
        with writing_to(folder):
            work.mkdir(parents=True)
            try:
                save_packed(model.path, work / _GRAPH)
                _take_place(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return PreparedModel(folder / _GRAPH, packed_blobs(folder / _GRAPH))


def _take_place(work: Path, folder: Path) -> None:
    """Rename; another process may have been faster, and its result is as good."""
    try:
        os.replace(work, folder)
    except OSError:
        if not (folder / _GRAPH).is_file():
            raise


def places_for(matrix: OnnxMatrix) -> ScalePlaces | None:
    """`learn_places`, remembered in the cache per layout and machine."""
    path = cache_folder() / "onnx" / f"layouts-{machine_key()}" / f"{layout_key(matrix)}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            offsets, factors = kept["offsets"], kept["factors"]
        if offsets.dtype == np.int32 and offsets.shape == (matrix.n_rows * matrix.blocks_per_row, len(factors)):
            return ScalePlaces(offsets, factors)
    except (OSError, ValueError, KeyError, EOFError):
        pass
    places = learn_places(matrix)
    if places is not None:
        save_arrays(path, offsets=places.offsets, factors=places.factors)
    return places


def save_arrays(path: Path, **arrays: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    """Write arrays as an .npz file that appears whole or not at all. OutputError."""
    import io

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def model_hash(model: OnnxModel) -> str:
    """SHA-256 over the graph and its data files, which are read once and then recognised by size and time."""
    digest = hashlib.sha256()
    for path in model.data_files():
        digest.update(_file_hash(path).encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    path, stat = path.resolve(), path.stat()
    now = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "path": str(path)}
    note = cache_folder() / "onnx" / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        kept = json.loads(note.read_bytes())
        if {key: kept[key] for key in now} == now:
            return str(kept["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = file_sha256(path)
    with writing_to(note.parent):
        note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps({**now, "sha256": sha256}).encode())
    return sha256
