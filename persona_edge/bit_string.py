"""A string of bits, written and read part by part: what the row code of a mask pack is made of. NumPy only.

Bit i of the string is bit i mod 8, least significant first, of byte i // 8. Parts follow each other without alignment;
zeros fill the last byte. A number of w bits is stored least significant bit first; unary q is q zeros, then a one.

Nothing here allocates from a number before the bits that stand for it are known to be there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from persona_edge.bits import CodecError

__all__ = ["BitReader", "BitWriter", "binomials", "block_of"]

Bits = NDArray[np.uint8]  # one bit per byte, 0 or 1
Integers = NDArray[np.int64]

MAX_FIELD = 63  # bits; numbers are int64


class BitWriter:
    """Collects parts; `close` returns the bytes."""

    def __init__(self) -> None:
        self._parts: list[Bits] = [np.zeros(0, dtype=np.uint8)]

    def bits(self, bits: Bits) -> None:
        """The bits themselves, shape (n,)."""
        self._parts.append(bits)

    def fields(self, values: Integers, width: int) -> None:
        """Each of `values`, which are below 2**width, in `width` bits."""
        bits = np.empty((len(values), width), dtype=np.uint8)
        for bit in range(width):
            bits[:, bit] = (values >> bit) & 1
        self._parts.append(bits.ravel())

    def unary(self, values: Integers) -> None:
        """Each of `values` as that many zeros and a one."""
        ends = np.cumsum(values + 1)
        bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        bits[ends - 1] = 1
        self._parts.append(bits)

    def bounded(self, value: int, limit: int) -> None:
        """A number from 0 to `limit`, in as many bits as `limit` has."""
        self.fields(np.array([value], dtype=np.int64), limit.bit_length())

    def close(self) -> bytes:
        """All parts, the last byte filled with zeros."""
        return np.packbits(np.concatenate(self._parts), bitorder="little").tobytes()


class BitReader:
    """Reads the parts of `data` in the order in which they were written; CodecError when they are not there."""

    def __init__(self, data: bytes) -> None:
        self._bits: Bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        self._at = 0

    def require(self, n_bits: int) -> None:
        """CodecError unless `n_bits` more bits are there."""
        left = len(self._bits) - self._at
        if n_bits > left:
            raise CodecError(f"{n_bits} more bits are needed, {left} of {len(self._bits)} are left")

    def bits(self, n: int) -> Bits:
        """The next `n` bits."""
        self.require(n)
        self._at += n
        return self._bits[self._at - n : self._at]

    def fields(self, n: int, width: int) -> Integers:
        """The next `n` numbers of `width` bits each."""
        bits = self.bits(n * width)
        values = np.zeros(n, dtype=np.int64)
        for bit in range(width):
            values |= bits[bit::width].astype(np.int64) << bit
        return values

    def unary(self, n: int, most_zeros: int) -> Integers:
        """The next `n` numbers in unary; more than `most_zeros` zeros in all is an error."""
        self.require(n)
        ones = np.flatnonzero(self._bits[self._at : self._at + n + most_zeros])[:n]
        if len(ones) < n:
            raise CodecError(f"only {len(ones)} of {n} unary numbers end where they must")
        self._at += int(ones[-1]) + 1 if n else 0
        zeros = ones.astype(np.int64)
        zeros[1:] -= ones[:-1] + 1
        return zeros

    def bounded(self, limit: int) -> int:
        """A number from 0 to `limit`."""
        width = limit.bit_length()
        self.require(width)
        value = int(self.fields(1, width)[0])
        if value > limit:
            raise CodecError(f"the number {value} where {limit} is the largest")
        return value

    def finish(self) -> None:
        """CodecError unless all that is left is zeros, fewer than eight."""
        left = self._bits[self._at :]
        if len(left) >= 8 or left.any():
            raise CodecError(f"{len(left)} bits after the last part that are not padding")


def block_of(radix: int) -> tuple[int, int]:
    """How many numbers below `radix` share a block, and the block's width in bits: the least bits per number.

    A block holds the number sum(x[i] * radix**i), at most 63 bits. `radix` is 2 to 2**63. The smaller block on a tie.
    """
    best = (1, (radix - 1).bit_length())
    size = 2
    while radix**size <= 2**MAX_FIELD:
        width = (radix**size - 1).bit_length()
        if width * best[0] < best[1] * size:
            best = (size, width)
        size += 1
    return best


def binomials(n: int, most: int) -> list[Integers]:
    """`table[j][x]` is "x choose j" for x below `n`, j from 0 to `most`; the caller sees to it that they fit."""
    table = [np.ones(n, dtype=np.int64)]
    for _ in range(most):
        table.append(np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(table[-1])[:-1]]))
    return table
