"""Sets and choices as parts of a string of bits: the two codes that the row code of a mask pack is composed of.

- A *set* of m among n numbers, both known: a bitmap when it is dense, otherwise Rice-coded gaps, of the numbers outside
  when more than half are in. As good as the entropy n H(m / n) plus 1 to 4 %.
- *Choices*: for each of several rows, c of n columns, c and n known and small. A choice is numbered (combinatorial
  number system), and numbers below the same radix share blocks of up to 63 bits. log2 "n choose c" bits plus 0 to 2 %.

What a code looks like follows from n, m and c alone, so there is exactly one string for given sets and choices.
docs/pack-format.md has every bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from persona_edge.bit_string import BitReader, BitWriter, binomials, block_of
from persona_edge.bits import CodecError

__all__ = ["read_choices", "read_set", "write_choices", "write_set"]

Bits = NDArray[np.uint8]
Integers = NDArray[np.int64]

MAX_WIDTH = 47  # of a remainder; sets are among at most 2**48 numbers
LEAST_BITS_SHARE = 8  # a complement is coded only where it costs at least one bit per 8 numbers


@dataclass(frozen=True)
class _Form:
    """How a set of m among n is stored: `n_coded` Rice codes of `width`, or, where that is None, a bitmap."""

    n_coded: int
    width: int | None
    inverted: bool

    @classmethod
    def of(cls, n: int, m: int, paid: bool) -> _Form:
        inverted = 2 * m > n
        n_coded = n - m if inverted else m
        if not n_coded and (paid or not inverted):
            return cls(0, 0, inverted)
        width = _rice_width(n, n_coded)
        cheap = inverted and not paid and LEAST_BITS_SHARE * n_coded * (width + 1) < n
        return cls(n_coded, None, inverted) if width == 0 or cheap else cls(n_coded, width, inverted)


def write_set(writer: BitWriter, n: int, members: Integers, paid: bool = False) -> None:
    """The ascending `members` of 0..n-1. `paid`: the n are no more than bits already in the string stand for.

    (Where they are not, a set that holds nearly all of n costs at least a bit per 8, so that no reader can be made to
    allocate more than its data is worth.)
    """
    form = _Form.of(n, len(members), paid)
    if form.width is None:
        writer.bits(_membership(n, members))
        return
    coded = np.flatnonzero(_membership(n, members) == 0) if form.inverted else members
    gaps = np.diff(coded, prepend=-1) - 1
    writer.fields(gaps & ((1 << form.width) - 1), form.width)
    writer.unary(gaps >> form.width)


def read_set(reader: BitReader, n: int, m: int, paid: bool = False) -> Integers:
    """The m ascending members that `write_set` wrote; CodecError when the bits do not stand for m of n."""
    form = _Form.of(n, m, paid)
    if form.width is None:
        found = np.flatnonzero(reader.bits(n))
        if len(found) != m:
            raise CodecError(f"a bitmap has {len(found)} members where {m} were announced")
        return found
    reader.require(form.n_coded * (form.width + 1))
    gaps = reader.fields(form.n_coded, form.width)
    gaps |= reader.unary(form.n_coded, (n - form.n_coded) >> form.width) << form.width
    found = np.cumsum(gaps + 1) - 1
    if form.n_coded and found[-1] >= n:
        raise CodecError(f"a set has the member {found[-1]} of {n}")
    return np.flatnonzero(_membership(n, found) == 0) if form.inverted else found


def write_choices(writer: BitWriter, n: int, choices: Integers) -> None:
    """`choices` of shape (n_rows, c): in each row c ascending numbers below `n`. "n choose c" is at most 2**63."""
    n_rows, c = choices.shape
    radix = comb(n, c)
    if radix == 1:
        return
    numbers = choices[:, 0].copy()
    for j, column in enumerate(binomials(n, c)[2:] if c > 1 else [], start=1):
        numbers += column[choices[:, j]]
    size, width = block_of(radix)
    whole = n_rows // size
    writer.fields(_pack(numbers[: whole * size].reshape(whole, size), radix), width)
    if rest := n_rows - whole * size:
        writer.fields(_pack(numbers[whole * size :].reshape(1, rest), radix), (radix**rest - 1).bit_length())


def read_choices(reader: BitReader, n: int, c: int, n_rows: int) -> Integers:
    """The choices that `write_choices` wrote, shape (n_rows, c); CodecError for a number beyond its radix."""
    radix = comb(n, c)
    if radix == 1:
        return np.tile(np.arange(c, dtype=np.int64), (n_rows, 1))
    size, width = block_of(radix)
    whole, rest = divmod(n_rows, size)
    reader.require(whole * width)
    numbers = _unpack(reader.fields(whole, width), radix, size)
    if rest:
        last = _unpack(reader.fields(1, (radix**rest - 1).bit_length()), radix, rest)
        numbers = np.concatenate([numbers, last])
    choices = np.empty((n_rows, c), dtype=np.int64)
    table = binomials(n, c) if c > 1 else []
    for j in range(c, 1, -1):
        choices[:, j - 1] = np.searchsorted(table[j], numbers, side="right") - 1
        numbers -= table[j][choices[:, j - 1]]
    choices[:, 0] = numbers
    return choices


def _pack(numbers: Integers, radix: int) -> Integers:
    """One block per row of `numbers`, shape (n_blocks, size)."""
    blocks = np.zeros(len(numbers), dtype=np.int64)
    for i in range(numbers.shape[1] - 1, -1, -1):
        blocks = blocks * radix + numbers[:, i]
    return blocks


def _unpack(blocks: Integers, radix: int, size: int) -> Integers:
    """The numbers in `blocks`, shape (n_blocks * size,)."""
    numbers = np.empty((len(blocks), size), dtype=np.int64)
    for i in range(size):
        blocks, numbers[:, i] = np.divmod(blocks, radix)
    if blocks.any():
        raise CodecError(f"a block of {size} numbers has one beyond {radix - 1}")
    return numbers.ravel()


def _rice_width(n: int, n_coded: int) -> int:
    """The best width for gaps of geometric distribution, in integers (persona_edge.bits says which)."""
    power = (n - max(n_coded, 1)) * 2**32 // n
    width = 0
    while width < MAX_WIDTH and power + power * power // 2**32 > 2**32:
        power = power * power // 2**32
        width += 1
    return width


def _membership(n: int, members: Integers) -> Bits:
    bits = np.zeros(n, dtype=np.uint8)
    bits[members] = 1
    return bits
