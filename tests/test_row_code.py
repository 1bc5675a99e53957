"""The row code of planes: fast code against a slow reading of docs/pack-format.md, sizes against the entropy."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge.bits import CodecError, encode_positions, entropy_bits
from persona_edge.row_code import decode_rows, encode_rows
from tests.slow_reader import SlowReader

Positions = NDArray[np.uint32]
Shapes = list[tuple[int, int]]
# Rows and groups per row of a block of a 135M model and of an 8B model.
BLOCK_135M = [(576, 48), (1536, 18), (1536, 18), (192, 18), (576, 18), (576, 18), (192, 18)]
BLOCK_8B = [(4096, 448), (14336, 128), (1024, 128), (4096, 128)]


def uint32(*values: int) -> Positions:
    return np.array(values, dtype=np.uint32)


def random_sets(shapes: Shapes, rows: list[float], in_row: list[float], seed: int = 0) -> list[Positions]:
    """For each tensor the share of rows that may have groups, and the share of groups in such a row."""
    rng = np.random.default_rng(seed)
    sets = []
    for (n_rows, n_groups), p, q in zip(shapes, rows, in_row, strict=True):
        taken = (rng.random((n_rows, 1)) < p) & (rng.random((n_rows, n_groups)) < q)
        sets.append(np.flatnonzero(taken).astype(np.uint32))
    return sets


def bound(shapes: Shapes, positions: list[Positions]) -> float:
    """Bytes that a memoryless code needs at least."""
    return sum(entropy_bits(r * g, len(p)) for (r, g), p in zip(shapes, positions, strict=True)) / 8


class SlowRowReader(SlowReader):
    """The parts of a row code too: bounded numbers, sets, and choices."""

    def bounded(self, limit: int) -> int:
        value = self.field(limit.bit_length())
        assert value <= limit
        return value

    def set(self, n: int, m: int, paid: bool) -> list[int]:
        inverted = 2 * m > n
        c = n - m if inverted else m
        if c == 0 and (paid or m == 0):
            return list(range(n)) if inverted else []
        width, power = 0, (n - max(c, 1)) * 2**32 // n
        while power + power * power // 2**32 > 2**32 and width < 47:
            width, power = width + 1, power * power // 2**32
        if width == 0 or (inverted and not paid and 8 * c * (width + 1) < n):
            members = [i for i in range(n) if self.field(1)]
            assert len(members) == m
            return members
        low = [self.field(width) for _ in range(c)]
        position, coded = -1, []
        for remainder in low:
            position += 1 + (self.unary() << width) + remainder
            coded.append(position)
        assert not coded or coded[-1] < n
        return sorted({*range(n)} - {*coded}) if inverted else coded

    def choices(self, n: int, c: int, n_rows: int) -> list[list[int]]:
        radix = comb(n, c)
        sizes = [s for s in range(1, 64) if radix**s <= 2**63] if radix > 1 else [n_rows]
        size = min(sizes, key=lambda s: ((radix**s - 1).bit_length() / s, s))
        rows: list[list[int]] = []
        while len(rows) < n_rows:
            here = min(size, n_rows - len(rows))
            block = self.field((radix**here - 1).bit_length())
            assert block < radix**here
            for _ in range(here):
                rows.append(slow_choice(n, c, block % radix))
                block //= radix
        return rows


def slow_choice(n: int, c: int, number: int) -> list[int]:
    """The `number`-th of the choices of c among n when they are sorted by their largest, then next largest..."""
    members = []
    for j in range(c, 0, -1):
        members.append(max(x for x in range(n) if comb(x, j) <= number))
        number -= comb(members[-1], j)
    return members[::-1]


def slow_most_exact(n_groups: int) -> int:
    return 1 if n_groups > 4096 else max(c for c in range(1, min(7, n_groups) + 1) if comb(n_groups, c) <= 2**63)


def slow_limits(n_groups: int, level: int) -> tuple[int, int]:
    exact = slow_most_exact(n_groups)
    if level <= exact:
        return level, level
    fewest = (exact + 1) * 2 ** (level - exact - 1)
    return fewest, min(n_groups, 2 * fewest - 1)


def slow_decode(data: bytes, shapes: Shapes) -> list[list[int]]:
    reader = SlowRowReader(data)
    left = [i for i, (n_rows, n_groups) in enumerate(shapes) if n_rows * n_groups]
    empty = {left[j] for j in reader.set(len(left), reader.bounded(len(left)), True)}
    left = [i for i in left if i not in empty]
    classes: dict[int, list[int]] = {}
    density_class = reader.field(6)
    while left:
        classes[density_class] = [left[j] for j in reader.set(len(left), reader.bounded(len(left)), True)]
        left = [i for i in left if i not in classes[density_class]]
        density_class += 1
    rows: list[
        tuple[int, int, int]
    ] = []  # (1 when its levels are told with those of all sparse classes..., tensor, row)
    for density_class, tensors in classes.items():
        told = [(max(32, density_class), i, row) for i in tensors for row in range(shapes[i][0])]
        halvings = max(1, 34 - density_class)
        fewest, most = len(told) >> halvings, len(told) >> (halvings - 1)
        if told:
            rows += [told[j] for j in reader.set(len(told), fewest + reader.bounded(most - fewest), False)]
    levels = dict.fromkeys(rows, 1)
    for share in sorted({row[0] for row in rows}):
        higher = [row for row in rows if row[0] == share]
        while higher:
            higher = [higher[j] for j in reader.set(len(higher), reader.bounded(len(higher)), True)]
            levels.update({row: levels[row] + 1 for row in higher})
    decoded: list[list[int]] = [[] for _ in shapes]
    for n_groups, level in sorted({(shapes[row[1]][1], level) for row, level in levels.items()}):
        here = [row for row in rows if levels[row] == level and shapes[row[1]][1] == n_groups]
        fewest, most = slow_limits(n_groups, level)
        if level <= slow_most_exact(n_groups):
            groups = reader.choices(n_groups, level, len(here))
        else:
            m = len(here) * fewest + reader.bounded(len(here) * (most - fewest))
            among = reader.set(len(here) * n_groups, m, False)
            groups = [[p % n_groups for p in among if p // n_groups == j] for j in range(len(here))]
        for (_, i, row), found in zip(here, groups, strict=True):
            assert fewest <= len(found) <= most
            decoded[i] += [row * n_groups + group for group in found]
    assert len(reader.bits) - reader.at < 8
    assert not any(reader.bits[reader.at :])
    return [sorted(found) for found in decoded]


@st.composite
def shaped_sets(draw: st.DrawFn) -> tuple[Shapes, list[Positions]]:
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0, 1, 2, 5, 18, 40])), min_size=1, max_size=6)
    )
    shares = [0.0, 0.02, 0.1, 0.3, 0.6, 0.95, 1.0]
    rows = [draw(st.sampled_from(shares)) for _ in shapes]
    in_row = [draw(st.sampled_from(shares)) for _ in shapes]
    sets = random_sets(shapes, rows, in_row, seed=draw(st.integers(0, 2**32)))
    if not any(map(len, sets)):
        shapes[0], sets[0] = (3, 5), uint32(draw(st.integers(0, 14)))
    return shapes, sets


@settings(max_examples=150, deadline=None)
@given(shaped_sets())
def test_decodes_what_was_encoded_and_agrees_with_the_slow_reading(sets: tuple[Shapes, list[Positions]]) -> None:
    shapes, positions = sets
    data = encode_rows(shapes, positions)
    decoded = decode_rows(data, shapes, sum(map(len, positions)))
    assert [p.tolist() for p in decoded] == [p.tolist() for p in positions]
    assert all(p.dtype == np.uint32 for p in decoded)
    assert slow_decode(data, shapes) == [p.tolist() for p in positions]


@settings(max_examples=300, deadline=None)
@given(shaped_sets(), st.data())
def test_any_other_bytes_are_refused_or_are_the_one_encoding_of_other_sets(
    sets: tuple[Shapes, list[Positions]], data: st.DataObject
) -> None:
    shapes, positions = sets
    changed = bytearray(encode_rows(shapes, positions))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed += data.draw(st.sampled_from([b"", b"", b"\0", b"\x81"]))
    n_positions = sum(map(len, positions)) + data.draw(st.sampled_from([0, 0, -1, 1]))
    try:
        decoded = decode_rows(bytes(changed), shapes, n_positions)
    except CodecError:
        return
    assert encode_rows(shapes, decoded) == bytes(changed)
    assert sum(map(len, decoded)) == n_positions


@pytest.mark.parametrize("shapes", [BLOCK_135M * 30, BLOCK_8B])
@pytest.mark.parametrize("density", [0.001, 0.005, 0.02, 0.1])
def test_independent_groups_cost_their_entropy_plus_5_percent_at_most(shapes: Shapes, density: float) -> None:
    densities = density * np.exp(0.8 * np.random.default_rng(1).normal(size=len(shapes)))
    positions = random_sets(shapes, [1.0] * len(shapes), np.minimum(densities, 0.9).tolist())
    assert len(encode_rows(shapes, positions)) <= 1.05 * bound(shapes, positions)


@pytest.mark.parametrize("shapes", [BLOCK_135M * 30, BLOCK_8B])
def test_groups_that_come_in_rows_cost_a_sixth_less_than_by_the_flat_code(shapes: Shapes) -> None:
    positions = random_sets(shapes, [0.02] * len(shapes), [0.08] * len(shapes))
    flat = len(encode_positions([r * g for r, g in shapes], positions))
    assert len(encode_rows(shapes, positions)) < 0.83 * flat


def test_a_small_plane_costs_little_beside_its_positions() -> None:
    """A position of 135M in a plane of one costs 22 bits; 210 tensors cost no more than another 8 bytes."""
    shapes = BLOCK_135M * 30
    assert len(encode_rows(shapes, [uint32(5) if i == 100 else uint32() for i in range(210)])) <= 11


def test_the_last_positions_of_the_largest_tensors_survive() -> None:
    shapes = [(2**32, 1), (1, 2**27), (2**16, 2**16)]
    positions = [uint32(0, 2**32 - 1), uint32(0, 3, 2**27 - 1), uint32(7, 2**32 - 2**16, 2**32 - 1)]
    decoded = decode_rows(encode_rows(shapes, positions), shapes, 8)
    assert [p.tolist() for p in decoded] == [p.tolist() for p in positions]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (uint32(3, 3), "not strictly ascending"),
        (uint32(100), "position 100 of 100 units"),
        (np.array([1], dtype=np.int64), "int64"),
        (uint32(), "no positions"),
    ],
)
def test_refuses_to_encode(positions: Positions, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        encode_rows([(10, 10)], [positions])


def handmade(bits: str) -> bytes:
    return np.packbits(np.array([*map(int, bits.replace(" ", ""))], dtype=np.uint8), bitorder="little").tobytes()


# One tensor of 40 rows of 3 groups; position 16 is group 1 of row 5. No tensor of class 0; the lowest class is
# 34 - 6 = 28, and one tensor has it; one row more than 40 >> 6; row 5 in 5 bits, quotient 0; no row of level 2; choice
# 1 of 3.
ONE_POSITION = "0 001110 1 1 10100 1 0 10"


def test_the_handmade_bits_are_valid() -> None:
    assert encode_rows([(40, 3)], [uint32(16)]) == handmade(ONE_POSITION)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("", "1 more bits are needed, 0 of 0 are left"),
        ("1", "no tensor has positions"),
        ("0 000000 1", "1 tensors of density class 0"),
        ("0 001110 0 1", "0 tensors of density class 28"),
        ("0 101110 1 0 10100 1 0 10", "1 rows with 1 positions are not of class 29"),
        ("0 001110 1 0", "no rows in 1 tensors of density class 28"),
        ("0 001110 1 1 11111 01", "member 63 of 40"),
        ("0 001110 1 1 10100 00", "0 of 1 unary numbers"),
        ("0 001110 1 1 10100 1 1 1 1 0", "a row of 3 groups of which 4"),
        ("0 001110 1 1 10100 1 0 11", "a block of 1 numbers has one beyond 2"),
        ("0 001110 1 1 10100 1 0 10 1", "6 bits after the last part"),
        ("0 001110 1 1 10100 1 0 10 00000000", "14 bits after the last part"),
        ("0 001110 1 1 10100 1 1 0 10", "2 positions where 1 were announced"),
    ],
)
def test_refuses_to_decode(bits: str, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode_rows(handmade(bits), [(40, 3)], 1)


# One row of 40 groups has 16 of them: class 33 + 5; all of 0 to 1 rows, as a bitmap; of a level above 1, 2 ... 8, but
# not above 9, which is 16 to 31; 0 more groups than 16, of up to 15 more; a bitmap.
MANY = "0 011001 1 1 1" + "1" * 8 + "0 0000" + "10" * 12 + "0" * 12 + "1111"


def test_the_handmade_bits_of_a_full_row_are_valid() -> None:
    positions = uint32(*range(0, 24, 2), 36, 37, 38, 39)
    assert encode_rows([(1, 40)], [positions]) == handmade(MANY)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1" * 8 + "0 0000", "1" * 64 + "0 0000", "a row of level 64"),
        ("1" * 8 + "0 0000", "1" * 10 + "0 0000", "a row of 40 groups of which 64 or more are in the plane"),
        ("1" * 8 + "0 0000", "1" * 8 + "0 1000", "a bitmap has 16 members where 17 were announced"),
        ("1111", "1110", "a bitmap has 15 members where 16 were announced"),
    ],
)
def test_refuses_a_damaged_full_row(old: str, new: str, message: str) -> None:
    changed = new.join(MANY.rsplit(old, 1))
    with pytest.raises(CodecError, match=message):
        decode_rows(handmade(changed), [(1, 40)], 16)


def test_refuses_a_row_that_is_not_of_its_level() -> None:
    """Two rows of 40 groups with 16 each end in a bitmap of 80 bits; one bit is moved from the first to the second."""
    bits = np.unpackbits(
        np.frombuffer(encode_rows([(2, 40)], [np.r_[0:16, 40:56].astype(np.uint32)]), np.uint8), bitorder="little"
    )
    end = int(np.flatnonzero(bits)[-1]) + 1 + 24  # the bitmap's end, behind 24 zeros
    bits[[end - 80, end - 1]] = 0, 1
    with pytest.raises(CodecError, match="a row of level 9 has 15 groups or 17, not 16 to 31"):
        decode_rows(np.packbits(bits, bitorder="little").tobytes(), [(2, 40)], 32)


def test_a_few_bytes_cannot_announce_gigabytes() -> None:
    rng = np.random.default_rng(0)
    shapes = [(2**16, 2**16), (2**32, 1), (1, 2**27), (2**27, 32)] * 3
    for _ in range(300):
        data = rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8) & rng.integers(0, 256, dtype=np.uint8)
        with pytest.raises(CodecError):
            decode_rows(data.tobytes(), shapes, 2**32)


def test_full_tensors_pay_for_each_row_or_position() -> None:
    """Otherwise one byte could stand for 2**32 positions."""
    for shape in [(80000, 1), (1, 80000), (10000, 8), (1000, 80)]:
        everything = np.arange(80000, dtype=np.uint32)
        data = encode_rows([shape], [everything])
        assert len(data) >= 80000 / 8 / 8 / 7
        assert np.array_equal(decode_rows(data, [shape], 80000)[0], everything)
