"""What the rivals of a benchmark carry, for any model: random mask packs, LoRA adapters and control vectors.

Sizes and times of these do not depend on what the numbers are, so random ones stand in for trained ones. All of them
come in a pair, so that there is something to switch between, and cover what the usual tools cover: a pack's poles gate
every matrix of every block, an adapter has rank 16 in the same matrices, in float16, a vector acts on every layer but
the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persona_edge.maskpack import write_pack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, SignSample, TensorShape
from persona_edge.runtime.dequantize import dequantize
from persona_edge.runtime.layouts import LAYOUTS
from persona_edge.runtime.llama_weights import LlamaModel, find_tensors
from persona_edge.runtime.switcher import WeightTensor

__all__ = ["AXES", "PERSONAS", "Rivals", "control_vector_bytes", "make_lora", "make_pack", "make_rivals"]

AXES = ("IE", "NS", "FT", "PJ")
PERSONAS = ("INFP", "ENTJ")
RANK = 16
_LOOKED_AT = 256  # weights of a row among which the sketch takes the largest
_SCALE = 1e-3  # of adapters: what they change must not overflow


@dataclass(frozen=True)
class Rivals:
    """The files of one model's arms: the pack, two adapters, two control vectors. `density` None: not a random pack."""

    pack: Path
    density: float | None
    loras: tuple[Path, Path]
    vectors: tuple[Path, Path]


def make_rivals(model: Path, folder: Path, density: float, pack: Path | None = None) -> Rivals:
    """Everything that arms of `model` need, made where it is not there; `pack` takes the place of the random one."""
    loras = make_lora(model, folder, 0), make_lora(model, folder, 1)
    vectors = _make_vector(model, folder, 0), _make_vector(model, folder, 1)
    return Rivals(pack or make_pack(model, folder, density), None if pack else density, loras, vectors)


def make_pack(model: Path, folder: Path, density: float) -> Path:
    """A pack of eight poles on four axes and their sixteen personas, each of which gates `density` of all groups.

    The groups are drawn independently, a quarter of `density` for each pole, in all matrices of all blocks.
    """
    path = folder / f"{model.stem}.{density:g}.maskpack"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    loaded = LlamaModel(model)
    try:
        tensors = _matrices(loaded)
        shapes = tuple(TensorShape(tensor.name, tensor.n_rows, tensor.n_columns) for tensor in tensors)
        sketch = {tensor.name: _signs(tensor) for tensor in tensors}
        identity = ModelIdentity(loaded.architecture, shapes, sketch)
    finally:
        loaded.close()
    random = np.random.default_rng(0)
    poles = tuple(
        Pole(name, axis, (_random_plane(random, shapes, density / len(AXES)),)) for axis in AXES for name in axis
    )
    personas = {"".join(ends): ends for ends in itertools.product(*AXES)}
    write_pack(path, PersonaSet(identity, poles, personas))
    return path


def make_lora(model: Path, folder: Path, number: int) -> Path:
    """A LoRA adapter of rank 16 in float16 for every matrix of every block."""
    from gguf import GGUFType, GGUFWriter

    path = folder / f"{model.stem}.lora-r{RANK}-{number}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    loaded = LlamaModel(model)
    try:
        writer = GGUFWriter(path.with_suffix(".part"), loaded.architecture)
        shapes = [(tensor.name, tensor.n_rows, tensor.n_columns) for tensor in _matrices(loaded)]
    finally:
        loaded.close()
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    random = np.random.default_rng(number)
    for name, n_rows, n_columns in shapes:
        for part, shape in (("lora_a", (RANK, n_columns)), ("lora_b", (n_rows, RANK))):
            values = random.standard_normal(shape, np.float32) * _SCALE
            writer.add_tensor(f"{name}.{part}", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").replace(path)
    return path


def control_vector_bytes(path: Path) -> int:
    """What the numbers of a control vector take, as float32: a GGUF of them is hardly larger."""
    return int(np.load(path, mmap_mode="r").nbytes)


def _make_vector(model: Path, folder: Path, number: int) -> Path:
    """The directions of all layers but the first, (n_layers - 1, hidden) float32."""
    path = folder / f"{model.stem}.vector-{number}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        loaded = LlamaModel(model)
        n_layers = int(loaded.library.api.llama_model_n_layer(loaded.handle))
        hidden = int(loaded.metadata(f"{loaded.architecture}.embedding_length") or 0)
        loaded.close()
        random = np.random.default_rng(number)
        np.save(path, random.standard_normal((n_layers - 1, hidden), np.float32) * _SCALE)
    return path


def _matrices(model: LlamaModel) -> list[WeightTensor]:
    """The weights of all blocks that can be gated."""
    found = find_tensors(model).values()
    return [t for t in found if t.name.startswith("blk.") and t.n_rows > 1 and t.ggml_type in LAYOUTS]


def _signs(tensor: WeightTensor) -> SignSample:
    """As `sample_signs`, but only of the first weights of 64 rows: reading all of a large model takes minutes."""
    rows = np.unique(np.arange(64, dtype=np.int64) * tensor.n_rows // 64)
    columns = np.arange(min(_LOOKED_AT, tensor.n_columns))
    positions = (rows[:, None] * tensor.n_columns + columns).astype(np.uint32)
    weights = dequantize(tensor.data, tensor.ggml_type, positions.ravel()).reshape(positions.shape)
    largest = np.abs(weights).argmax(axis=1)
    at = np.arange(len(rows))
    return SignSample(positions[at, largest], weights[at, largest] < 0)


def _random_plane(random: np.random.Generator, shapes: Sequence[TensorShape], density: float) -> Plane:
    positions = {}
    for shape in shapes:
        n_groups = shape.n_units(32)
        drawn = random.integers(0, n_groups, max(1, round(density * n_groups)))
        positions[shape.name] = np.unique(drawn).astype(np.uint32)
    return Plane(0.0, positions)
