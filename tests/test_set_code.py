"""Sets and choices as bits: what was written is read, at the length that was promised."""

from __future__ import annotations

from collections.abc import Callable
from math import comb, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_edge.bit_string import BitReader, BitWriter, binomials, block_of
from persona_edge.bits import CodecError, entropy_bits
from persona_edge.set_code import read_choices, read_set, write_choices, write_set


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1), st.booleans(), st.integers(0, 2**32))
def test_sets_come_back_wherever_they_begin(n: int, share: float, paid: bool, seed: int) -> None:
    members = np.flatnonzero(np.random.default_rng(seed).random(n) < share)
    writer = BitWriter()
    writer.bounded(5, 7)
    write_set(writer, n, members, paid)
    writer.bounded(n, n)
    reader = BitReader(writer.close())
    assert reader.bounded(7) == 5
    assert read_set(reader, n, len(members), paid).tolist() == members.tolist()
    assert reader.bounded(n) == n
    reader.finish()


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.38, 0.5, 0.7, 0.9, 0.99])
def test_a_set_costs_its_entropy_plus_5_percent_at_most(share: float) -> None:
    n = 200_000
    members = np.flatnonzero(np.random.default_rng(0).random(n) < share)
    writer = BitWriter()
    write_set(writer, n, members, paid=True)
    assert 8 * len(writer.close()) <= 1.05 * entropy_bits(n, len(members)) + 8


@pytest.mark.parametrize("share", [0.999, 0.9999, 1.0])
def test_only_a_paid_set_may_name_many_for_next_to_nothing(share: float) -> None:
    n = 80_000
    members = np.flatnonzero(np.random.default_rng(0).random(n) < share)
    sizes = {}
    for paid in (False, True):
        writer = BitWriter()
        write_set(writer, n, members, paid)
        sizes[paid] = len(writer.close())
    assert sizes[False] >= n / 64 > sizes[True]


# 1600 choose 7 is 0.56 of 2**63, the largest number a choice may have.
@pytest.mark.parametrize(
    ("n", "c"), [(1, 1), (2, 1), (7, 7), (18, 1), (18, 3), (448, 7), (4096, 5), (1600, 7), (2**27, 1)]
)
@pytest.mark.parametrize("n_rows", [1, 10, 333])
def test_choices_come_back_at_the_price_of_their_number(n: int, c: int, n_rows: int) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.choice(n, c, replace=False) if n < 5000 else rng.integers(0, n, c) for _ in range(n_rows)]
    rows[-1] = np.arange(n - c, n)
    choices = np.sort(np.array(rows, dtype=np.int64), axis=1)
    writer = BitWriter()
    write_choices(writer, n, choices)
    data = writer.close()
    assert 8 * len(data) <= 1.03 * n_rows * log2(comb(n, c)) + 8
    reader = BitReader(data)
    assert np.array_equal(read_choices(reader, n, c, n_rows), choices)
    reader.finish()


@pytest.mark.parametrize("radix", [2, 3, 5, 18, 153, 816, 3060, 10**9, 2**62 + 1, 2**63])
def test_no_block_is_better(radix: int) -> None:
    size, width = block_of(radix)
    assert 2 ** (width - 1) < radix**size <= 2**width
    assert width <= 63
    for other in range(1, 64):
        if radix**other <= 2**63:
            assert (radix**other - 1).bit_length() / other >= width / size


def test_binomials() -> None:
    table = binomials(1600, 7)
    assert all(int(table[j][x]) == comb(x, j) for j in range(8) for x in (0, 1, 6, 7, 8, 100, 1599))


@pytest.mark.parametrize(
    ("data", "read", "message"),
    [
        (b"\x06", lambda reader: reader.bounded(5), "the number 6 where 5 is the largest"),
        (b"\x06", lambda reader: reader.fields(3, 3), "9 more bits are needed, 8 of 8 are left"),
        (b"\x01", lambda reader: reader.unary(2, 100), "only 1 of 2 unary numbers"),
        (b"\x10", lambda reader: reader.unary(1, 3), "only 0 of 1 unary numbers"),
        (b"\x01", lambda reader: reader.finish(), "8 bits after the last part"),
        (b"\x00", lambda reader: reader.finish(), "8 bits after the last part"),
        (b"\xff", lambda reader: read_choices(reader, 5, 2, 2), "a block of 2 numbers has one beyond 9"),
        (b"\x03", lambda reader: read_set(reader, 8, 4), "a bitmap has 2 members where 4 were announced"),
        (b"", lambda reader: read_set(reader, 2**48, 2**40), "more bits are needed"),
    ],
)
def test_refuses(data: bytes, read: Callable[[BitReader], object], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        read(BitReader(data))
