"""What a persona's program does to the initializers of an ONNX model: pure functions from stored to masked arrays.

A gated group is one block of MatMulNBits (or two, where blocks are 16 wide): its scale is multiplied, so gate 0 is an
exact zero. A gated weight of a quantized matrix gets the code nearest to its product, the code of zero for gate 0.
Float matrices are multiplied themselves. Products are rounded once, from float64 where the code is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import ModelMismatchError, UnsupportedModelError
from persona_edge.masks import GROUP_SIZE, Granularity
from persona_edge.onnx_model import OnnxMatrix, OnnxWeight
from persona_edge.onnx_weights import codes_at, zeros_of
from persona_edge.runtime.programs import PersonaProgram

__all__ = ["GatedBlocks", "check_program", "gated_blocks", "gates_scales_only", "masked_initializers"]


@dataclass(frozen=True, eq=False)
class GatedBlocks:
    """Blocks of one matrix whose scale is multiplied: flat indices (row * blocks + block), ascending, and gates."""

    matrix: OnnxMatrix
    blocks: NDArray[np.int64]
    gates: NDArray[np.float32]

    def masked_scales(self) -> NDArray[np.float32]:
        """The scales of `blocks`, (n,) float32, multiplied."""
        assert self.matrix.scales is not None
        scales = self.matrix.scales.read().ravel()[self.blocks].astype(np.float32)
        return _times(scales, self.gates)

    def base_scales(self) -> NDArray[np.float32]:
        """The scales of `blocks` as stored, (n,) float32."""
        assert self.matrix.scales is not None
        return np.asarray(self.matrix.scales.read().ravel()[self.blocks], np.float32)


def check_program(program: PersonaProgram, weights: Mapping[str, OnnxWeight]) -> None:
    """Raise what keeps `program` from being applied: ModelMismatchError, UnsupportedModelError. Writes nothing."""
    for name in program.names:
        if name not in weights:
            raise ModelMismatchError(f"the model has no weight {name!r} that can be edited; use a pack made from it")
        matrix = weights[name].matrix
        granularity, positions, _ = program.units(name)
        n_units = weights[name].shape.n_units(granularity)
        if int(positions[-1]) >= n_units:
            raise ModelMismatchError(
                f"{name}: the pack gates unit {positions[-1]} and the model has {n_units}; use a pack made from it"
            )
        if granularity == GROUP_SIZE and matrix.scales is not None and matrix.block_size not in (16, 32):
            raise UnsupportedModelError(
                f"{name}: blocks of {matrix.block_size} weights share a scale, so groups of {GROUP_SIZE} cannot be "
                "gated; export the model with blocks of 32"
            )
        if granularity == 1 and matrix.scales is not None and matrix.bits not in (4, 8):
            raise UnsupportedModelError(f"{name}: {matrix.bits}-bit codes cannot be edited; export the model in int4")


def gates_scales_only(program: PersonaProgram, weights: Mapping[str, OnnxWeight]) -> bool:
    """Whether scales are all that `program` changes: groups of quantized matrices."""
    quantized = all(weights[name].matrix.scales is not None for name in program.names)
    return quantized and bool((program.granularities == GROUP_SIZE).all())


def gated_blocks(program: PersonaProgram, weights: Mapping[str, OnnxWeight]) -> tuple[GatedBlocks, ...]:
    """The blocks that `program` gates, one entry per matrix, for a program that `gates_scales_only`."""
    parts: dict[str, list[tuple[OnnxMatrix, NDArray[np.int64], NDArray[np.float32]]]] = {}
    for name in program.names:
        weight = weights[name]
        _, positions, gates = program.units(name)
        blocks, of_unit = _blocks_of(weight, positions)
        parts.setdefault(weight.matrix.name, []).append((weight.matrix, blocks, gates[of_unit]))
    joined = []
    for found in parts.values():
        blocks, gates = (np.concatenate([part[i] for part in found]) for i in (1, 2))
        order = np.argsort(blocks, kind="stable")
        joined.append(GatedBlocks(found[0][0], blocks[order].astype(np.int64), gates[order].astype(np.float32)))
    return tuple(joined)


def masked_initializers(program: PersonaProgram, weights: Mapping[str, OnnxWeight]) -> dict[str, NDArray[Any]]:
    """New contents, by initializer name, of every initializer that `program` changes, in the stored shape and type."""
    changed: dict[str, NDArray[Any]] = {}
    for name in program.names:
        weight = weights[name]
        granularity, positions, gates = program.units(name)
        if weight.matrix.scales is None:
            _mask_floats(weight, granularity, positions, gates, changed)
        elif granularity == GROUP_SIZE:
            _mask_scales(weight, positions, gates, changed)
        else:
            _mask_codes(weight, positions, gates, changed)
    return changed


def _copy_of(stored: Any, changed: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """The array to change: made from the stored one, once."""
    if stored.name not in changed:
        changed[stored.name] = np.array(stored.read())
    return changed[stored.name]


def _mask_scales(
    weight: OnnxWeight, positions: NDArray[np.uint32], gates: NDArray[np.float32], changed: dict[str, NDArray[Any]]
) -> None:
    scales = _copy_of(weight.matrix.scales, changed).reshape(-1)
    blocks, of_unit = _blocks_of(weight, positions)
    scales[blocks] = _times(scales[blocks], gates[of_unit])


def _mask_codes(
    weight: OnnxWeight, positions: NDArray[np.uint32], gates: NDArray[np.float32], changed: dict[str, NDArray[Any]]
) -> None:
    matrix = weight.matrix
    row, column = np.divmod(positions.astype(np.int64), matrix.n_columns)
    row = weight.rows[row]
    zeros = zeros_of(matrix)
    zero = zeros if isinstance(zeros, int) else zeros[row, column // matrix.block_size].astype(np.float64)
    codes = codes_at(matrix, row, column).astype(np.float64)
    wanted = np.clip(np.rint((codes - zero) * gates + zero), 0, 2**matrix.bits - 1).astype(np.uint8)
    packed = _copy_of(matrix.codes, changed).reshape(matrix.n_rows, -1)
    if matrix.bits == 8:
        packed[row, column] = wanted
        return
    for half in (0, 1):  # two weights share a byte: fancy assignment would lose one of them
        chosen = column % 2 == half
        r, byte = row[chosen], column[chosen] // 2
        kept = packed[r, byte] & np.uint8(0xF0 if half == 0 else 0x0F)
        packed[r, byte] = kept | (wanted[chosen] << np.uint8(4 * half))


def _mask_floats(
    weight: OnnxWeight,
    granularity: Granularity,
    positions: NDArray[np.uint32],
    gates: NDArray[np.float32],
    changed: dict[str, NDArray[Any]],
) -> None:
    values = _copy_of(weight.matrix.codes, changed)
    row, unit = np.divmod(positions.astype(np.int64), weight.matrix.n_columns // granularity)
    columns = (unit * granularity)[:, None] + np.arange(granularity)
    rows = np.repeat(weight.rows[row][:, None], granularity, axis=1)
    values[columns, rows] = _times(values[columns, rows], gates[:, None])


def _blocks_of(weight: OnnxWeight, positions: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flat block indices of groups, and for each block the number of its group among `positions`."""
    matrix = weight.matrix
    per_group = GROUP_SIZE // matrix.block_size
    row, group = np.divmod(positions.astype(np.int64), matrix.n_columns // GROUP_SIZE)
    first = weight.rows[row] * matrix.blocks_per_row + group * per_group
    blocks = (first[:, None] + np.arange(per_group)).ravel()
    return blocks, np.repeat(np.arange(len(positions)), per_group)


def _times(values: NDArray[Any], gates: NDArray[np.float32]) -> NDArray[Any]:
    """`values * gates` in the values' type. Gate 0 gives +0, also of what is infinite; overflow saturates."""
    limit = float(np.finfo(values.dtype).max)
    with np.errstate(invalid="ignore"):
        product = np.clip(values.astype(np.float64) * gates, -limit, limit).astype(values.dtype)
    return np.where(gates == 0, values.dtype.type(0), product)
