"""How each GGML type lays weights out in memory, as one table that both the NumPy and the C kernels read.

A *unit* is what one gate multiplies: a group of 32 weights or a single weight. Its *field* is what has to change in
memory to multiply it, brought into a canonical form of a few bytes: the scales (and minima) of a group, or the code of
a weight. A `FieldMap` says where the bits of each field lie, so adding a type means adding one entry to the table.

Where a type has 16-wide sub-blocks a group owns two scales. In K-quants the 16-bit super-block scale belongs to eight
groups and is never edited: a super-block whose own scale is NaN or infinite cannot be silenced group by group.

Where a group has no scale that could be zero (MXFP4: a power of two; TQ2_0: none), its field holds its codes as well
and a gate rewrites them: see group_codes.py. Types whose groups can be given neither a zero scale nor zero codes (IQ1
to IQ3, Q1_0), or whose codes do not survive a rewriting to the byte (TQ1_0), have no layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import UnsupportedModelError
from persona_edge.masks import Granularity
from persona_edge.runtime.number_formats import BF16, E8M0, F16, F32, UE4M3, NumberFormat, integer

__all__ = ["LAYOUTS", "CodeFormat", "FieldMap", "Units", "WeightLayout", "layout_of", "type_name"]

Piece = tuple[int, int, int]  # byte in the block, shift in the byte, number of bits


@dataclass(frozen=True, eq=False)
class FieldMap:
    """Where the fields of a block's units lie.

    `pieces` is (units_per_block, n_field_bytes, n_pieces, 3) int32: each canonical field byte is put together, least
    significant first, from `(byte, shift, n_bits)` pieces of the block.
    """

    block_bytes: int
    pieces: NDArray[np.int32] = field(repr=False)

    @property
    def units_per_block(self) -> int:
        """How many units a block holds: a power of two."""
        return int(self.pieces.shape[0])

    @property
    def n_field_bytes(self) -> int:
        """Bytes of one field in canonical form."""
        return int(self.pieces.shape[1])

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether every field lies in memory exactly as in canonical form."""
        byte, shift, n_bits = np.moveaxis(self.pieces, -1, 0)
        run = byte[:, :1, 0] + np.arange(self.n_field_bytes)
        whole = self.pieces.shape[2] == 1 and bool((shift == 0).all() and (n_bits == 8).all())
        return whole and bool((byte[:, :, 0] == run).all())

    def n_units(self, n_bytes: int) -> int:
        """How many units a tensor of `n_bytes` has."""
        return n_bytes // self.block_bytes * self.units_per_block

    def first_bytes(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where in a tensor's memory the fields of the units at `positions` (n,) begin."""
        block, unit = self._locate(positions)
        first: NDArray[np.int64] = block + self.pieces[unit, 0, 0, 0]
        return first

    def read(self, data: NDArray[np.uint8], positions: NDArray[np.integer]) -> NDArray[np.uint8]:
        """The fields of the units at `positions` (n,), any order: (n, n_field_bytes) uint8."""
        block, unit = self._locate(positions)
        if self.is_contiguous:
            first = block + self.pieces[unit, 0, 0, 0]
            run: NDArray[np.uint8] = data[first[:, None] + np.arange(self.n_field_bytes)]
            return run
        fields = np.zeros((len(block), self.n_field_bytes), np.uint8)
        for i in range(self.n_field_bytes):
            done = np.zeros(len(block), np.uint8)
            for byte, shift, n_bits in self.pieces[unit, i].transpose(1, 2, 0):
                bits = (data[block + byte] >> shift.astype(np.uint8)) & _mask(n_bits)
                fields[:, i] |= bits << done
                done += n_bits.astype(np.uint8)
        return fields

    def write(self, data: NDArray[np.uint8], positions: NDArray[np.integer], fields: NDArray[np.uint8]) -> None:
        """Write `fields` to the units at `positions`, all different. CHANGES `data`; `read` is the inverse."""
        block, unit = self._locate(positions)
        if self.is_contiguous:
            first = block + self.pieces[unit, 0, 0, 0]
            data[first[:, None] + np.arange(self.n_field_bytes)] = fields
            return
        for i in range(self.n_field_bytes):
            left = fields[:, i].copy()
            for byte, shift, n_bits in self.pieces[unit, i].transpose(1, 2, 0):
                place = shift.astype(np.uint8)
                # Several units may share a byte, so plain fancy assignment would lose all but the last.
                np.bitwise_and.at(data, block + byte, ~(_mask(n_bits) << place))
                np.bitwise_or.at(data, block + byte, (left & _mask(n_bits)) << place)
                left >>= n_bits.astype(np.uint8)

    def _locate(self, positions: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        block, unit = np.divmod(positions.astype(np.int64), self.units_per_block)
        return block * self.block_bytes, unit


def _mask(n_bits: NDArray[np.int32]) -> NDArray[np.uint8]:
    return ((1 << n_bits) - 1).astype(np.uint8)


@dataclass(frozen=True)
class CodeFormat:
    """How the code of a single weight becomes its value: `scale * value(code) + min_sign * minimum`.

    `value(code)` is `numbers`' integer, or `codebook[code]`. A group's field holds `n_scales` scales, then as many
    minima when `min_sign` is not 0. `super_scale` and `super_min` are the bytes of the block where an fp16 factor of
    all scales and all minima lies, -1 for none. Where `group_bits` is not 0, a group's 32 codes of that many bits
    follow its scales, and its gate rewrites them; `n_scales` may then be 0.
    """

    numbers: NumberFormat
    n_scales: int = 1
    min_sign: int = 0
    super_scale: int = -1
    super_min: int = -1
    codebook: tuple[int, ...] = ()
    group_bits: int = 0


@dataclass(frozen=True, eq=False)
class WeightLayout:
    """One GGML type: geometry, field maps, and the arithmetic of a group's numbers and of a weight's code.

    `codes` is None where the weight is itself a number (F32, F16, BF16).
    """

    name: str
    ggml_type: int
    block_weights: int
    block_bytes: int
    group: FieldMap
    weight: FieldMap
    numbers: NumberFormat
    codes: CodeFormat | None = None

    def fields(self, granularity: Granularity) -> FieldMap:
        """Where the fields of groups (32) or single weights (1) lie."""
        return self.weight if granularity == 1 else self.group

    def allows_negative(self, granularity: Granularity) -> bool:
        """Whether a unit can take a negative gate: a single weight always, a group if its scale has a sign."""
        return granularity == 1 or self.numbers.is_signed or self.has_group_codes

    @property
    def has_group_codes(self) -> bool:
        """Whether a group's gate rewrites its codes, not its scales alone."""
        return self.codes is not None and self.codes.group_bits > 0

    def n_bytes(self, n_weights: int) -> int:
        """Bytes that `n_weights` take; they must fill whole blocks."""
        return n_weights // self.block_weights * self.block_bytes


@dataclass(frozen=True, eq=False)
class Units:
    """Units of one tensor: those at `positions` (n,) uint32, all different, of its memory `data` (flat uint8)."""

    layout: WeightLayout
    granularity: Granularity
    data: NDArray[np.uint8]
    positions: NDArray[np.uint32]

    @property
    def map(self) -> FieldMap:
        """Where their fields lie."""
        return self.layout.fields(self.granularity)


def layout_of(ggml_type: int) -> WeightLayout:
    """The layout of a GGML type id; UnsupportedModelError when masks cannot be applied to that type."""
    try:
        return LAYOUTS[ggml_type]
    except KeyError:
        known = ", ".join(layout.name for layout in LAYOUTS.values())
        raise UnsupportedModelError(
            f"weights of type {type_name(ggml_type)} cannot be edited; use a model quantized with one of {known}"
        ) from None


_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip


def type_name(ggml_type: int) -> str:
    """GGML's name of a type id, for messages."""
    if ggml_type in LAYOUTS:
        return LAYOUTS[ggml_type].name
    return _OTHER_TYPES.get(ggml_type, f"number {ggml_type}")


def _map(block_bytes: int, units: Iterable[Iterable[Iterable[Piece]]]) -> FieldMap:
    """A FieldMap from nested pieces [unit][field byte][piece]."""
    pieces = np.array([[list(byte) for byte in unit] for unit in units], np.int32)
    pieces.flags.writeable = False
    return FieldMap(block_bytes, pieces)


def _bytes(start: int, n: int) -> list[list[Piece]]:
    """A field that lies in memory as it is: `n` whole bytes from `start`."""
    return [[(start + i, 0, 8)] for i in range(n)]


def _float_layout(name: str, ggml_type: int, numbers: NumberFormat) -> WeightLayout:
    """Weights that are plain floats: a group's field is its 32 numbers."""
    n = numbers.n_bytes
    group, weight = _map(32 * n, [_bytes(0, 32 * n)]), _map(n, [_bytes(0, n)])
    return WeightLayout(name, ggml_type, 1, n, group, weight, numbers)


def _legacy_layout(
    name: str, ggml_type: int, bits: int, *, has_min: bool, codebook: tuple[int, ...] = ()
) -> WeightLayout:
    """32-weight blocks: fp16 scale, fp16 minimum if any, fifth bits if any, then the codes: low nibbles or bytes."""
    start = 4 if has_min else 2
    if bits == 8:
        weight_pieces = [_bytes(start + j, 1) for j in range(32)]
        numbers = integer(255, zero=128, flip=0x80)
    else:
        low = start + (4 if bits == 5 else 0)
        high: list[list[Piece]] = [[(start + j // 8, j % 8, 1)] if bits == 5 else [] for j in range(32)]
        weight_pieces = [[[(low + j % 16, j // 16 * 4, 4), *high[j]]] for j in range(32)]
        numbers = integer(2**bits - 1, zero=0 if has_min or codebook else 2 ** (bits - 1))
    block_bytes = start + 4 * bits
    group = _map(block_bytes, [_bytes(0, start)])
    codes = CodeFormat(numbers, min_sign=int(has_min), codebook=codebook)
    return WeightLayout(name, ggml_type, 32, block_bytes, group, _map(block_bytes, weight_pieces), F16, codes)


def _q4_k_scales(group: int) -> list[list[Piece]]:
    """Six-bit scale and minimum of a group of Q4_K or Q5_K: twelve bytes at 4 hold eight of each."""
    i = group % 4
    if group < 4:
        return [[(4 + i, 0, 4), (4 + i, 4, 2)], [(8 + i, 0, 4), (8 + i, 4, 2)]]
    return [[(12 + i, 0, 4), (4 + i, 6, 2)], [(12 + i, 4, 4), (8 + i, 6, 2)]]


def _q4_k_layout(name: str, ggml_type: int, bits: int) -> WeightLayout:
    """d, dmin, 12 bytes of scales, for Q5_K 32 of fifth bits, 128 of nibbles: 32 bytes hold 64 weights, low first."""
    low, block_bytes = (16, 144) if bits == 4 else (48, 176)
    high: list[list[Piece]] = [[(16 + j % 32, j // 32, 1)] if bits == 5 else [] for j in range(256)]
    weight = [[[(low + j // 64 * 32 + j % 32, j % 64 // 32 * 4, 4), *high[j]]] for j in range(256)]
    codes = CodeFormat(integer(2**bits - 1), min_sign=-1, super_scale=0, super_min=2)
    group_map = _map(block_bytes, [_q4_k_scales(g) for g in range(8)])
    return WeightLayout(name, ggml_type, 256, block_bytes, group_map, _map(block_bytes, weight), integer(63), codes)


def _crumb(start: int, j: int) -> Piece:
    """Two bits of weight j of 256: 32 bytes hold four rows of 32 weights, at shifts 0, 2, 4, 6."""
    return (start + j // 128 * 32 + j % 32, j % 128 // 32 * 2, 2)


def _q6_k_layout() -> WeightLayout:
    """128 bytes of low nibbles, 64 of high crumbs, sixteen int8 scales of 16 weights each, d."""
    weight = [[[(j // 128 * 64 + j % 64, j % 128 // 64 * 4, 4), _crumb(128, j)]] for j in range(256)]
    codes = CodeFormat(integer(63, zero=32), n_scales=2, super_scale=208)
    group = _map(210, [_bytes(192 + 2 * g, 2) for g in range(8)])
    return WeightLayout("Q6_K", 14, 256, 210, group, _map(210, weight), integer(255, zero=128, flip=0x80), codes)


def _q2_k_layout() -> WeightLayout:
    """Sixteen bytes of 4-bit scale (low) and minimum (high) for 16 weights each, 64 of crumbs, d, dmin."""
    weight = [[[_crumb(16, j)]] for j in range(256)]
    group = [[[(2 * g + i, shift, 4)] for shift in (0, 4) for i in (0, 1)] for g in range(8)]
    codes = CodeFormat(integer(3), n_scales=2, min_sign=-1, super_scale=80, super_min=82)
    return WeightLayout("Q2_K", 10, 256, 84, _map(84, group), _map(84, weight), integer(15), codes)


def _q3_k_layout() -> WeightLayout:
    """32 bytes of third bits, 64 of crumbs, twelve bytes of sixteen 6-bit scales (offset 32) for 16 weights each, d."""
    weight = [[[_crumb(32, j), (j % 32, j // 32, 1)]] for j in range(256)]
    scale: list[list[Piece]] = [[(96 + s % 8, s // 8 * 4, 4), (104 + s % 4, s // 4 * 2, 2)] for s in range(16)]
    codes = CodeFormat(integer(7, zero=4), n_scales=2, super_scale=108)
    group = _map(110, [scale[2 * g : 2 * g + 2] for g in range(8)])
    return WeightLayout("Q3_K", 11, 256, 110, group, _map(110, weight), integer(63, zero=32), codes)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_xs_layout() -> WeightLayout:
    """d, then eight 6-bit scales (offset 32), two bytes of high bits and four of low; then 128 bytes of nibbles."""
    weight = [[[(8 + j // 32 * 16 + j % 16, j % 32 // 16 * 4, 4)]] for j in range(256)]
    group = [[[(4 + g // 2, g % 2 * 4, 4), (2 + g // 4, g % 4 * 2, 2)]] for g in range(8)]
    codes = CodeFormat(integer(15), super_scale=0, codebook=_IQ4_VALUES)
    return WeightLayout("IQ4_XS", 23, 256, 136, _map(136, group), _map(136, weight), integer(63, zero=32), codes)


_E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, as their scales are halved


def _mxfp4_layout() -> WeightLayout:
    """A power of two for 32 weights, then sixteen bytes of nibbles, low ones first. A group is the whole block."""
    weight = [[[(1 + j % 16, j // 16 * 4, 4)]] for j in range(32)]
    codes = CodeFormat(integer(15), codebook=_E2M1_VALUES, group_bits=4)
    return WeightLayout("MXFP4", 39, 32, 17, _map(17, [_bytes(0, 17)]), _map(17, weight), E8M0, codes)


def _nvfp4_layout() -> WeightLayout:
    """Four 8-bit float scales of 16 weights each, then eight bytes of nibbles for each, low ones first."""
    weight = [[[(4 + j // 16 * 8 + j % 8, j % 16 // 8 * 4, 4)]] for j in range(64)]
    codes = CodeFormat(integer(15), n_scales=2, codebook=_E2M1_VALUES)
    group = _map(36, [_bytes(2 * g, 2) for g in range(2)])
    return WeightLayout("NVFP4", 40, 64, 36, group, _map(36, weight), UE4M3, codes)


def _tq2_0_layout() -> WeightLayout:
    """64 bytes of crumbs that stand for -1, 0, 1, then d. A group's field is its crumbs, four to a byte."""
    weight = [[[_crumb(0, j)]] for j in range(256)]
    group = [[[_crumb(0, 32 * g + 4 * b + i) for i in range(4)] for b in range(8)] for g in range(8)]
    ternary = integer(2, zero=1)
    codes = CodeFormat(ternary, n_scales=0, super_scale=64, group_bits=2)
    return WeightLayout("TQ2_0", 35, 256, 66, _map(66, group), _map(66, weight), ternary, codes)


LAYOUTS: dict[int, WeightLayout] = {
    layout.ggml_type: layout
    for layout in (
        _float_layout("F32", 0, F32),
        _float_layout("F16", 1, F16),
        _float_layout("BF16", 30, BF16),
        _legacy_layout("Q4_0", 2, 4, has_min=False),
        _legacy_layout("Q4_1", 3, 4, has_min=True),
        _legacy_layout("Q5_0", 6, 5, has_min=False),
        _legacy_layout("Q5_1", 7, 5, has_min=True),
        _legacy_layout("Q8_0", 8, 8, has_min=False),
        _legacy_layout("IQ4_NL", 20, 4, has_min=False, codebook=_IQ4_VALUES),
        _q2_k_layout(),
        _q3_k_layout(),
        _q4_k_layout("Q4_K", 12, 4),
        _q4_k_layout("Q5_K", 13, 5),
        _q6_k_layout(),
        _iq4_xs_layout(),
        _mxfp4_layout(),
        _nvfp4_layout(),
        _tq2_0_layout(),
    )
}
"""Every type whose weights can be edited, by GGML type id."""
