"""The codec of positions: fast code against a slow reading of the specification, sizes against the entropy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge.bits import CodecError, decode_positions, encode_positions, entropy_bits
from tests.slow_reader import SlowReader

Positions = NDArray[np.uint32]
# Units of one block of a 135M model at granularity 32: q, k, v, o, gate, up, down.
BLOCK_135M = [10368, 3456, 3456, 10368, 27648, 27648, 27648]


def uint32(*values: int) -> Positions:
    return np.array(values, dtype=np.uint32)


def random_sets(units: list[int], densities: list[float], seed: int = 0) -> list[Positions]:
    rng = np.random.default_rng(seed)
    return [np.flatnonzero(rng.random(n) < p).astype(np.uint32) for n, p in zip(units, densities, strict=True)]


def slow_code(n: int, k: int) -> tuple[str, int, int]:
    """How a tensor of n units and k positions is stored: kind, number of Rice codes, width of their remainders."""
    if k == 0:
        return "empty", 0, 0
    m = n - k if 2 * k > n else k
    width, power = 0, (n - m) * 2**32 // n
    while m and power + power * power // 2**32 > 2**32:
        width, power = width + 1, power * power // 2**32
    if width == 0 or (2 * k > n and 8 * m * (width + 1) < n):
        return "bitmap", 0, 0
    return ("complement" if 2 * k > n else "gaps"), m, width


def slow_decode(data: bytes, units: list[int], n_positions: int) -> list[list[int]]:
    reader = SlowReader(data)
    bases = [(n_positions * n // max(1, sum(units))).bit_length() for n in units]
    exponents = [reader.unary() for _ in units]
    reader.align()
    counts = [2 ** (c + e) + reader.field(c + e) - 2**c for c, e in zip(bases, exponents, strict=True)]
    reader.align()
    codes = [slow_code(n, k) for n, k in zip(units, counts, strict=True)]
    remainders = [[reader.field(width) for _ in range(m)] for _, m, width in codes]
    reader.align()
    bitmaps = []
    for n, (kind, _, _) in zip(units, codes, strict=True):
        bitmaps.append([i for i in range(n) if reader.field(1)] if kind == "bitmap" else [])
        reader.align()
    decoded = []
    for i, (kind, _, width) in enumerate(codes):
        position, found = -1, []
        for remainder in remainders[i]:
            position += 1 + (reader.unary() << width) + remainder
            found.append(position)
        outside = set(found)
        complement = [p for p in range(units[i]) if p not in outside]
        decoded.append(complement if kind == "complement" else bitmaps[i] + found)
    reader.align()
    assert reader.at == len(reader.bits)
    return decoded


@st.composite
def sets_of_positions(draw: st.DrawFn) -> tuple[list[int], list[Positions]]:
    units = draw(st.lists(st.integers(0, 400), min_size=1, max_size=6))
    densities = [draw(st.sampled_from([0.0, 0.005, 0.03, 0.2, 0.4, 0.5, 0.7, 0.9, 0.99, 1.0])) for _ in units]
    return units, random_sets(units, densities, seed=draw(st.integers(0, 2**32)))


@settings(max_examples=300, deadline=None)
@given(sets_of_positions())
def test_decodes_what_was_encoded_and_agrees_with_the_slow_reading(sets: tuple[list[int], list[Positions]]) -> None:
    units, positions = sets
    n_positions = sum(map(len, positions))
    data = encode_positions(units, positions)
    decoded = decode_positions(data, units, n_positions)
    assert [p.tolist() for p in decoded] == [p.tolist() for p in positions]
    assert all(p.dtype == np.uint32 for p in decoded)
    assert slow_decode(data, units, n_positions) == [p.tolist() for p in positions]


@settings(max_examples=400, deadline=None)
@given(sets_of_positions(), st.data())
def test_any_other_bytes_are_refused_or_are_the_one_encoding_of_other_sets(
    sets: tuple[list[int], list[Positions]], data: st.DataObject
) -> None:
    units, positions = sets
    changed = bytearray(encode_positions(units, positions))
    for _ in range(data.draw(st.integers(1, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    changed += data.draw(st.binary(max_size=2))
    n_positions = sum(map(len, positions)) + data.draw(st.integers(0, 1))
    try:
        decoded = decode_positions(bytes(changed), units, n_positions)
    except CodecError:
        return
    assert encode_positions(units, decoded) == bytes(changed)
    assert sum(map(len, decoded)) == n_positions


@pytest.mark.parametrize("density", [0.002, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_a_sparse_plane_of_a_135m_model_is_within_5_percent_of_its_entropy(density: float, spread: float) -> None:
    units = BLOCK_135M * 30
    densities = density * np.exp(spread * np.random.default_rng(1).normal(size=len(units)))
    positions = random_sets(units, densities.tolist())
    n_bytes = len(encode_positions(units, positions))
    bound = sum(entropy_bits(n, len(p)) for n, p in zip(units, positions, strict=True)) / 8
    assert bound < n_bytes <= 1.05 * bound


@pytest.mark.parametrize("density", [0.03, 0.1, 0.2, 0.3, 0.35, 0.38, 0.4, 0.5, 0.62, 0.7, 0.8, 0.95])
def test_a_dense_plane_of_single_weights_is_within_5_percent_of_its_entropy(density: float) -> None:
    units = [192 * 576, 576 * 576]
    positions = random_sets(units, [density] * 2)
    n_bytes = len(encode_positions(units, positions))
    bound = sum(entropy_bits(n, len(p)) for n, p in zip(units, positions, strict=True)) / 8
    assert bound < n_bytes <= 1.05 * bound


def test_the_last_positions_of_the_largest_tensor_survive() -> None:
    positions = [uint32(0, 2**31, 2**32 - 1)]
    assert decode_positions(encode_positions([2**32], positions), [2**32], 3)[0].tolist() == positions[0].tolist()


def test_every_tensor_empty_costs_one_bit_each() -> None:
    assert encode_positions([100] * 16, [uint32()] * 16) == b"\xff\xff"
    assert [len(p) for p in decode_positions(b"\xff\xff", [100] * 16, 0)] == [0] * 16


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (uint32(3, 3), "not strictly ascending"),
        (uint32(5, 4), "not strictly ascending"),
        (uint32(100), "position 100 of 100 units"),
        (np.array([1], dtype=np.int64), "int64"),
        (np.zeros((1, 1), dtype=np.uint32), r"uint32\[1, 1\]"),
    ],
)
def test_refuses_to_encode(positions: Positions, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        encode_positions([100], [positions])


def handmade(bits: str) -> bytes:
    """Streams of bits, first bit first, each padded to whole bytes; spaces end a stream."""
    streams = [np.array([int(b) for b in stream], dtype=np.uint8) for stream in bits.split()]
    return b"".join(np.packbits(stream, bitorder="little").tobytes() for stream in streams)


# One tensor of 100 units with one position, 70: base 1, exponent 0, field 1; width 6; 70 = 1 * 64 + 6.
ONE_POSITION = "1 1 011000 01"


def test_the_handmade_bytes_are_valid() -> None:
    assert encode_positions([100], [uint32(70)]) == handmade(ONE_POSITION)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("", "0 of 1 unary codes"),
        ("1", "1 bytes end within the counts"),
        ("11 1 011000 01", "after the counts"),
        ("1 11 011000 01", "after the counts"),
        ("1 0 011000 01", "do not add up to 1"),
        ("01 11 011000 01", "do not add up to 1"),
        ("0000000000000000000000000000000001 1", "a count that no tensor can hold"),
        ("1 1 011000", "too few for 1 positions"),
        ("1 1 0110001 01", "after the remainders"),
        ("1 1 011000 011", "after the quotients"),
        ("1 1 011000 01 0", "after the quotients"),
        ("1 1 011000 00", "0 of 1 unary codes"),
        ("1 1 111111 01", "position 127 of 100"),
    ],
)
def test_refuses_to_decode(bits: str, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode_positions(handmade(bits), [100], 1)


# One tensor of 12 units, of which every second is taken: base 3, exponent 0, field 6; a bitmap.
BITMAP = "1 011 101010101010"


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("1 011 1010101010101", "padding of a bitmap"),
        ("1 011 101010101011", "7 positions where 6 were announced"),
        ("1 011 101010101010 0", "after the quotients"),
        ("1 011 1010", "too few for 6 positions"),
    ],
)
def test_refuses_a_damaged_bitmap(bits: str, message: str) -> None:
    assert encode_positions([12], [uint32(*range(0, 12, 2))]) == handmade(BITMAP)
    with pytest.raises(CodecError, match=message):
        decode_positions(handmade(bits), [12], 6)


def test_a_few_bytes_cannot_announce_gigabytes() -> None:
    units = [2**32] * 1000
    for n_positions in (2**32, 1000 * 2**32):
        with pytest.raises(CodecError):
            decode_positions(b"\xff" * 200 + b"\x00" * 200, units, n_positions)


def test_a_full_tensor_pays_for_each_unit() -> None:
    """Otherwise one byte could stand for 2**32 positions."""
    everything = np.arange(8000, dtype=np.uint32)
    data = encode_positions([8000], [everything])
    assert len(data) >= 1000
    assert np.array_equal(decode_positions(data, [8000], 8000)[0], everything)
