"""Sets of positions as bits, one tensor after the other: the flat code of a mask pack. NumPy and arithmetic, no files.

The sign sketch and planes of single weights have it; planes of groups have persona_edge.row_code, since version 2.

A section holds, for each of `n_tensors` tensors with `n_units[i]` units, a strictly ascending set of `counts[i]`
positions. What is stored per tensor follows from (n_units[i], counts[i]) alone, so no parameter is spent on it:

- nothing when the set is empty;
- a bitmap, one bit per unit, when the set is dense;
- otherwise Rice-coded gaps: with g the number of units skipped before a position, the low `width` bits of g go to one
  stream ("remainders"), g >> width in unary to another ("quotients"). The split makes both directions vectorise. When
  more than half of the units are in the set, the units that are *not* in it are coded.

The counts come first, as exponential-Golomb codes around the count that the plane's mean density predicts. Streams
are padded with zero bits to whole bytes, once per section and not per tensor. docs/pack-format.md has every bit; for
given sets there is exactly one valid string of bytes.

Decoding allocates in proportion to the length of the data, never to a number read from it: every position costs at
least 1/8 bit, which is checked before the first position is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_UNITS", "CodecError", "check_positions", "decode_positions", "encode_positions", "entropy_bits"]

MAX_UNITS = 2**32  # positions are uint32
MAX_WIDTH = 31
MAX_COUNT_BITS = 33  # of the field of a count: counts end at 2**32 and are coded on top of at most 2**33
LEAST_BITS_SHARE = 8  # a complement is coded only where it costs at least one bit per 8 units

Bits = NDArray[np.uint8]  # one bit per byte, 0 or 1
Positions = NDArray[np.uint32]
Integers = NDArray[np.int64]


class CodecError(ValueError):
    """The data is not what `encode_positions` writes for any sets of positions, or the sets cannot be encoded.

    `tensor` is the index of the tensor that is at fault, where it is one.
    """

    def __init__(self, reason: str, tensor: int | None = None) -> None:
        super().__init__(reason if tensor is None else f"tensor {tensor}: {reason}")
        self.reason = reason
        self.tensor = tensor


def encode_positions(n_units: Sequence[int], positions: Sequence[Positions]) -> bytes:
    """Encode one set of positions per tensor; `positions[i]` is strictly ascending, below `n_units[i]`, shape (n,).

    Raises CodecError naming the tensor's index when a set breaks that rule.
    """
    for index, (units, ascending) in enumerate(zip(n_units, positions, strict=True)):
        check_positions(index, units, ascending)
    counts = np.array([len(p) for p in positions], dtype=np.int64)
    plan = _Plan.of(n_units, counts)
    exponents, fields = _encode_counts(n_units, counts)
    remainders, quotients, bitmaps = _BitSink(), _BitSink(), []
    for index, ascending in enumerate(positions):
        units = n_units[index]
        if plan.is_bitmap[index]:
            bitmaps.append(_pack(_membership(units, ascending)))
        elif plan.n_coded[index]:
            coded = np.flatnonzero(_membership(units, ascending) == 0) if plan.inverted[index] else ascending
            gaps = _gaps(coded.astype(np.int64))
            width = int(plan.width[index])
            remainders.put(_bits_of_fields(gaps, width))
            quotients.put(_unary(gaps >> width))
    return b"".join([exponents, fields, remainders.close(), *bitmaps, quotients.close()])


def decode_positions(data: bytes, n_units: Sequence[int], n_positions: int) -> list[Positions]:
    """The sets that `encode_positions` encoded; `n_positions` is the sum of their lengths.

    Returns one uint32 array per tensor, strictly ascending and below `n_units[i]`. Raises CodecError when `data` is
    anything but the one encoding of such sets: too short, too long, padded with ones, or out of range.
    """
    stream = np.frombuffer(data, dtype=np.uint8)
    counts, start = _decode_counts(stream, n_units, n_positions)
    plan = _Plan.of(n_units, counts)
    bitmaps_at = start + _n_bytes(plan.n_remainder_bits)
    quotients_at = bitmaps_at + plan.n_bitmap_bytes
    if quotients_at + _n_bytes(plan.n_rice) > len(stream):
        raise CodecError(f"{len(stream)} bytes are too few for {n_positions} positions")
    remainders = _BitSource(stream[start:bitmaps_at])
    bitmaps = stream[bitmaps_at:quotients_at]
    quotients = _BitSource(stream[quotients_at:])
    decoded = []
    for index, units in enumerate(n_units):
        n_coded, width = int(plan.n_coded[index]), int(plan.width[index])
        if plan.is_bitmap[index]:
            found, bitmaps = _decode_bitmap(bitmaps, units)
        else:
            gaps = quotients.unary(n_coded, (units - n_coded) >> width) << width
            gaps |= remainders.fields(n_coded, width)
            found = np.cumsum(gaps + 1) - 1
            if n_coded and found[-1] >= units:
                raise CodecError(f"position {found[-1]} of {units} units", index)
            if plan.inverted[index]:
                found = np.flatnonzero(_membership(units, found) == 0)
        if len(found) != counts[index]:
            raise CodecError(f"{len(found)} positions where {counts[index]} were announced", index)
        decoded.append(found.astype(np.uint32))
    remainders.finish("remainders")
    quotients.finish("quotients")
    return decoded


def entropy_bits(n_units: int, n_positions: int) -> float:
    """n H(k / n): the bits that a memoryless code needs at least for k positions among n units."""
    if not 0 < n_positions < n_units:
        return 0.0
    share = n_positions / n_units
    return float(-n_units * (share * np.log2(share) + (1 - share) * np.log2(1 - share)))


@dataclass(frozen=True)
class _Plan:
    """How each tensor is stored: arrays of shape (n_tensors,), derived from the units and the counts."""

    n_coded: Integers  # positions that are Rice-coded: those in the set or, when inverted, those outside
    width: Integers  # bits of a remainder
    inverted: NDArray[np.bool_]
    is_bitmap: NDArray[np.bool_]
    n_bitmap_bytes: int

    @property
    def n_rice(self) -> int:
        return int(self.n_coded.sum())

    @property
    def n_remainder_bits(self) -> int:
        return int((self.n_coded * self.width).sum())

    @classmethod
    def of(cls, n_units: Sequence[int], counts: Integers) -> _Plan:
        units = np.array(n_units, dtype=np.int64)
        inverted = 2 * counts > units
        n_coded = np.where(inverted, units - counts, counts)
        width = _rice_widths(units, n_coded)
        is_bitmap = (counts > 0) & (width == 0)  # Rice codes of width 0 take one bit per unit at least
        is_bitmap |= inverted & (LEAST_BITS_SHARE * n_coded * (width + 1) < units)
        n_coded[is_bitmap] = 0
        return cls(n_coded, width, inverted & ~is_bitmap, is_bitmap, int(((units[is_bitmap] + 7) // 8).sum()))


def _rice_widths(n_units: Integers, n_coded: Integers) -> Integers:
    """The best width for gaps of geometric distribution: the least w with t + t**2 <= 1, t = (1 - density)**(2**w).

    (Where t is larger, one more bit of remainder saves more than one bit of quotient.) In 32-bit fixed point, rounded
    down, so that every reader finds the same width.
    """
    one = np.uint64(2**32)
    units = np.maximum(n_units, 1).astype(np.uint64)
    power = (units - np.maximum(n_coded, 1).astype(np.uint64)) * one // units
    width = np.zeros(len(units), dtype=np.int64)
    for _ in range(MAX_WIDTH):
        square = power * power // one
        larger = power + square > one
        width += larger
        power = np.where(larger, square, power)
    return width


def check_positions(index: int, n_units: int, ascending: Positions) -> None:
    """CodecError naming tensor `index` unless `ascending` is a set of positions below `n_units`."""
    if not 0 <= n_units <= MAX_UNITS:
        raise CodecError(f"{n_units} units, the format ends at {MAX_UNITS}", index)
    if ascending.dtype != np.uint32 or ascending.ndim != 1:
        raise CodecError(f"positions are {ascending.dtype}{list(ascending.shape)}, not uint32[n]", index)
    if len(ascending) and int(ascending[-1]) >= n_units:
        raise CodecError(f"position {ascending[-1]} of {n_units} units", index)
    if not np.all(ascending[1:] > ascending[:-1]):
        raise CodecError("positions are not strictly ascending", index)


def _count_bases(n_units: Sequence[int], n_positions: int) -> Integers:
    """log2 of the power of two above each tensor's share of the positions, were they spread evenly."""
    total = max(1, sum(n_units))
    return np.array([(n_positions * units // total).bit_length() for units in n_units], dtype=np.int64)


def _encode_counts(n_units: Sequence[int], counts: Integers) -> tuple[bytes, bytes]:
    bases = _count_bases(n_units, int(counts.sum()))
    values = counts + (1 << bases)
    lengths = np.array([int(value).bit_length() - 1 for value in values], dtype=np.int64)
    fields = [_bits_of_fields(np.array([v]), int(n)) for v, n in zip(values, lengths, strict=True)]
    return _pack(_unary(lengths - bases)), _pack(np.concatenate([np.zeros(0, np.uint8), *fields]))


def _decode_counts(stream: Bits, n_units: Sequence[int], n_positions: int) -> tuple[Integers, int]:
    """The counts, and the offset in bytes at which they end."""
    bases = _count_bases(n_units, n_positions)
    window = stream[: _n_bytes(len(bases) * (MAX_COUNT_BITS + 1))]
    source = _BitSource(window)
    widths = bases + source.unary(len(bases), len(bases) * MAX_COUNT_BITS)
    if np.any(widths > MAX_COUNT_BITS):
        raise CodecError("a count that no tensor can hold")
    middle = _n_bytes(source.cursor)
    _BitSource(window[:middle], source.cursor).finish("counts")
    end = middle + _n_bytes(int(widths.sum()))
    if end > len(stream):
        raise CodecError(f"{len(stream)} bytes end within the counts")
    fields = _BitSource(stream[middle:end])
    low = np.array([int(fields.fields(1, int(width))[0]) for width in widths], dtype=np.int64)
    fields.finish("counts")
    counts = (1 << widths) + low - (1 << bases)
    if np.any(counts > np.array(n_units, dtype=np.int64)) or int(counts.sum()) != n_positions:
        raise CodecError(f"the counts do not add up to {n_positions} positions within their tensors")
    return counts, end


def _decode_bitmap(bitmaps: Bits, n_units: int) -> tuple[Integers, Bits]:
    """The positions in the first bitmap, and the bitmaps after it."""
    size = _n_bytes(n_units)
    found = np.flatnonzero(np.unpackbits(bitmaps[:size], bitorder="little"))
    if len(found) and found[-1] >= n_units:
        raise CodecError("the padding of a bitmap is not zero")
    return found, bitmaps[size:]


class _BitSink:
    """Collects bits, least significant first, into bytes."""

    def __init__(self) -> None:
        self._whole: list[bytes] = []
        self._rest: Bits = np.zeros(0, dtype=np.uint8)

    def put(self, bits: Bits) -> None:
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._whole.append(_pack(bits[:whole]))
        self._rest = bits[whole:]

    def close(self) -> bytes:
        return b"".join([*self._whole, _pack(self._rest)])


class _BitSource:
    """Reads bits, least significant first, from bytes; `cursor` counts the bits read."""

    def __init__(self, data: Bits, cursor: int = 0) -> None:
        self.data = data
        self.cursor = cursor

    def fields(self, n: int, width: int) -> Integers:
        """The next `n` numbers of `width` bits each; the caller knows that they are there."""
        bits = self._peek(n * width)
        values = np.zeros(n, dtype=np.int64)
        for bit in range(width):
            values |= bits[bit::width].astype(np.int64) << bit
        self.cursor += n * width
        return values

    def unary(self, n: int, most_zeros: int) -> Integers:
        """The next `n` numbers, each as that many zeros and a one; more than `most_zeros` zeros in all is an error."""
        if not n:
            return np.zeros(0, dtype=np.int64)
        ones = np.flatnonzero(self._peek(n + most_zeros))[:n]
        if len(ones) < n:
            raise CodecError(f"only {len(ones)} of {n} unary codes end where they must")
        self.cursor += int(ones[-1]) + 1
        return _gaps(ones)

    def finish(self, what: str) -> None:
        """Check that only zeros, and fewer than eight, are left."""
        left = len(self.data) * 8 - self.cursor
        if left >= 8 or self._peek(left).any():
            raise CodecError(f"{left} bits after the {what} that are not padding")

    def _peek(self, n: int) -> Bits:
        """Up to `n` bits from the cursor on."""
        first, skipped = divmod(self.cursor, 8)
        window = self.data[first : _n_bytes(self.cursor + n)]
        return np.unpackbits(window, bitorder="little")[skipped : skipped + n]


def _n_bytes(n_bits: int) -> int:
    return (n_bits + 7) // 8


def _pack(bits: Bits) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _membership(n_units: int, positions: NDArray[np.uint32] | Integers) -> Bits:
    bits = np.zeros(n_units, dtype=np.uint8)
    bits[positions] = 1
    return bits


def _gaps(ascending: Integers) -> Integers:
    """How many numbers are skipped before each."""
    gaps = ascending.copy()
    gaps[1:] -= ascending[:-1] + 1
    return gaps


def _unary(values: Integers) -> Bits:
    ends = np.cumsum(values + 1)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    bits[ends - 1] = 1
    return bits


def _bits_of_fields(values: Integers, width: int) -> Bits:
    bits = np.empty((len(values), width), dtype=np.uint8)
    for bit in range(width):
        bits[:, bit] = (values >> bit) & 1
    return bits.ravel()
