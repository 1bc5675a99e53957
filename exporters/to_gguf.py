"""Put a mask pack next to a GGUF file: check that the masks belong to its weights, then write.

The masks are in GGUF's names and row order already (modeling.py sees to that); here the file itself is asked: its
architecture, its tensors' shapes, and the signs of the sampled weights, dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import MissingDependencyError, ModelFileError, OutputError, UnsupportedModelError
from persona_edge.maskpack import PACK_SUFFIX, PackSummary, write_pack
from persona_edge.masks import PersonaSet, Positions, TensorShape
from persona_edge.sketch import SketchResult, check_identity

__all__ = ["GgufFile", "check_gguf", "export_gguf", "pack_path", "read_gguf", "require_writable"]


@dataclass(frozen=True)
class GgufFile:
    """What a check needs of a GGUF: its architecture, its 2-D tensors, and access to their weights."""

    path: Path
    architecture: str
    tensors: Mapping[str, Any]

    def shapes(self) -> tuple[TensorShape, ...]:
        """Every 2-D tensor as (n_rows, n_columns), in the file's order."""
        return tuple(
            TensorShape(name, int(tensor.shape[1]), int(tensor.shape[0]))
            for name, tensor in self.tensors.items()
            if len(tensor.shape) == 2
        )

    def read_weights(self, name: str, positions: Positions) -> NDArray[np.float32]:
        """Dequantized weights at flat `positions` (row * n_columns + column) of tensor `name`, shape (n,)."""
        import gguf

        tensor = self.tensors[name]
        rows, columns = np.divmod(positions.astype(np.int64), int(tensor.shape[0]))
        needed, row_of = np.unique(rows, return_inverse=True)
        try:
            values = gguf.quants.dequantize(tensor.data[needed], tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UnsupportedModelError(
                f"{self.path.name}: {name} is stored as {kind}, which gguf cannot read"
            ) from error
        return np.asarray(values[row_of, columns], np.float32)


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file. ModelFileError when it is none, MissingDependencyError without the gguf package."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingDependencyError("reading GGUF files needs the gguf package; run: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = str(field.contents()) if field is not None else ""
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelFileError(f"{path}: not a readable GGUF file ({error}); download it again") from error
    return GgufFile(path, architecture, {tensor.name: tensor for tensor in reader.tensors})


def check_gguf(path: Path, personas: PersonaSet) -> SketchResult:
    """Compare the personas' model with the file: architecture, shapes, signs. ModelMismatchError when they differ."""
    file = read_gguf(path)
    return check_identity(personas.identity, file.architecture, file.shapes(), file.read_weights)


def pack_path(weights: Path, set_name: str) -> Path:
    """`<model>.<set>.maskpack` next to the weights; for a folder of weights, inside it."""
    folder, stem = (weights, weights.name) if weights.is_dir() else (weights.parent, weights.stem)
    return folder / f"{stem}.{set_name}{PACK_SUFFIX}"


def export_gguf(weights: Path, personas: PersonaSet, *, set_name: str, output: Path | None = None) -> PackSummary:
    """Write the pack for `weights`, a GGUF file (checked first) or a folder of original weights.

    `output` replaces the default place next to the weights. Whole or not at all: ModelMismatchError, OutputError,
    ModelFileError when `weights` is neither.
    """
    if not weights.is_dir():
        check_gguf(weights, personas)
    return write_pack(pack_path(weights, set_name) if output is None else output, personas)


def require_writable(target: Path) -> None:
    """OutputError now rather than after minutes of work when `target` cannot be written where it is wanted."""
    from persona_edge.files import atomic_output

    probe = target.parent / f"{target.name}.probe"
    try:
        with atomic_output(probe):
            pass
    except OutputError as error:
        raise OutputError(str(error).replace(str(probe), str(target))) from error
    probe.unlink(missing_ok=True)
