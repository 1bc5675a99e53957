"""The row code: a plane's positions as rows that have any, how many they have, and which. NumPy only, no files.

Gated groups come in rows: a neuron matters or it does not, so few rows hold most of the groups of a tensor. A plane is
therefore told in four steps, each for all tensors together (persona_edge.set_code has the codes of sets and choices):

1. the *density class* of each tensor: in powers of two, which share of its rows has any group; as sets of tensors;
2. for each class, which of the rows of its tensors have any, as one set;
3. the *level* of each such row: how many groups it has, exactly while they are few, then in doublings;
4. the groups. Those of a row with few are a choice among all it could have; rows of the same higher level are laid end
   to end, and their groups are one set.

A tensor costs its class and nothing else. Classes, levels and all numbers follow from the positions, so that there is
exactly one string for given positions. docs/pack-format.md has every bit, and what other models would save.

Bounded allocation: every row costs at least 1/8 bit, and so does every position of a row that is not of an exact level
(those have at most 7). Readers find the bits before they make room for what the bits stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from persona_edge.bit_string import BitReader, BitWriter
from persona_edge.bits import CodecError, check_positions
from persona_edge.set_code import read_choices, read_set, write_choices, write_set

__all__ = ["decode_rows", "encode_rows"]

Positions = NDArray[np.uint32]
Integers = NDArray[np.int64]
Shapes = Sequence[tuple[int, int]]  # of each tensor: rows, groups per row

FULLEST_SPARSE = 32  # the class of tensors of whose rows a third to a half have groups
CLASS_BITS = 6
MAX_EXACT = 7  # groups of a row whose level is their number
LARGEST_CHOICE = 2**63
WIDEST_CHOICE = 4096  # groups: a choice of several among more than these is not worth its table
LEVELS = 64


@dataclass(frozen=True)
class _Rows:
    """The rows that have groups, by class of their tensor, then tensor, then row: arrays of shape (n,)."""

    tensor: Integers
    row: Integers
    n_groups: Integers  # how many the row could have
    shares: Integers  # rows of equal number tell their levels together; ascending

    @classmethod
    def of(cls, tensor: Integers, row: Integers, classes: Integers, shapes: Shapes) -> _Rows:
        n_groups = np.array([shape[1] for shape in shapes], dtype=np.int64)
        return cls(tensor, row, n_groups[tensor], np.maximum(classes[tensor], FULLEST_SPARSE))

    def parts(self) -> list[slice]:
        """The rows that tell their levels together: those of all sparse classes, then those of each other class."""
        ends = [*np.flatnonzero(np.diff(self.shares)) + 1, len(self.row)]
        return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def by_level(self, levels: Integers) -> Iterator[tuple[int, int, Integers]]:
        """(groups that a row could have, level, indices of the rows of both), in ascending order."""
        keys = self.n_groups * LEVELS + levels
        order = np.argsort(keys, kind="stable")
        for found in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            n_groups, level = divmod(int(keys[found[0]]), LEVELS)
            yield n_groups, level, found


def encode_rows(shapes: Shapes, positions: Sequence[Positions]) -> bytes:
    """Encode one set of positions per tensor, at least one of them not empty.

    `shapes[i]` is (rows, groups per row); a position is row * (groups per row) + group, strictly ascending uint32.
    Raises CodecError naming the tensor's index when a set breaks that rule, and when there are no positions.
    """
    if not any(map(len, positions)):
        raise CodecError("no positions")
    for index, ((n_rows, n_groups), ascending) in enumerate(zip(shapes, positions, strict=True)):
        check_positions(index, n_rows * n_groups, ascending)
    found = [_rows_with_groups(p, shape[1]) for p, shape in zip(positions, shapes, strict=True)]
    classes = np.array([_density_class(s[0], len(n), int(n.sum())) for s, (_, n) in zip(shapes, found, strict=True)])
    order = _by_class(classes)
    tensor = np.repeat(order, [len(found[i][0]) for i in order])
    rows = _Rows.of(tensor, np.concatenate([found[i][0] for i in order]), classes, shapes)
    counts = np.concatenate([found[i][1] for i in order])
    groups = np.concatenate([positions[i] % shapes[i][1] for i in order]).astype(np.int64)
    writer = BitWriter()
    _write_classes(writer, classes[_with_units(shapes)])
    _write_rows(writer, rows, classes, shapes)
    levels = _levels(counts, rows.n_groups)
    for part in rows.parts():
        _write_levels(writer, levels[part])
    starts = np.cumsum(counts) - counts
    for n_groups, level, at in rows.by_level(levels):
        _write_groups(writer, n_groups, level, counts[at], groups[_spread(starts[at], counts[at])])
    return writer.close()


def decode_rows(data: bytes, shapes: Shapes, n_positions: int) -> list[Positions]:
    """The sets that `encode_rows` encoded; `n_positions` is the sum of their lengths.

    Returns one strictly ascending uint32 array per tensor. Raises CodecError when `data` is anything but the one
    encoding of such sets.
    """
    reader = BitReader(data)
    classes = np.zeros(len(shapes), dtype=np.int64)
    classes[_with_units(shapes)] = _read_classes(reader, len(_with_units(shapes)))
    rows = _read_rows(reader, classes, shapes)
    levels = np.concatenate([_read_levels(reader, part.stop - part.start) for part in rows.parts()])
    parts = [(at, *_read_groups(reader, n, level, len(at))) for n, level, at in rows.by_level(levels)]
    reader.finish()
    counts = np.empty(len(levels), dtype=np.int64)
    for at, n, _ in parts:
        counts[at] = n
    starts = np.cumsum(counts) - counts
    groups = np.empty(int(counts.sum()), dtype=np.int64)
    for at, n, found in parts:
        groups[_spread(starts[at], n)] = found
    if len(groups) != n_positions:
        raise CodecError(f"{len(groups)} positions where {n_positions} were announced")
    return _positions(rows, counts, groups, classes, shapes)


def _positions(rows: _Rows, counts: Integers, groups: Integers, classes: Integers, shapes: Shapes) -> list[Positions]:
    """One array per tensor, and the check that each tensor is of the class that it was told among."""
    flat = (np.repeat(rows.row * rows.n_groups, counts) + groups).astype(np.uint32)
    order = _by_class(classes)
    n_rows = np.bincount(rows.tensor, minlength=len(shapes))[order]
    row_ends = np.cumsum(n_rows)
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])[row_ends]
    positions = [np.zeros(0, dtype=np.uint32)] * len(shapes)
    for i, n, found in zip(order, n_rows, np.split(flat, ends[:-1]), strict=True):
        if _density_class(shapes[i][0], int(n), len(found)) != classes[i]:
            raise CodecError(f"{n} rows with {len(found)} positions are not of class {classes[i]}", int(i))
        positions[i] = found
    return positions


def _rows_with_groups(ascending: Positions, n_groups: int) -> tuple[Integers, Integers]:
    """The rows that have positions, ascending, and how many each has."""
    if not len(ascending):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    row = (ascending // n_groups).astype(np.int64)
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    return row[starts], np.diff(starts, append=len(row))


def _density_class(n_rows: int, n_found: int, n_positions: int) -> int:
    """0 when no row is found. Else from the power of two below the spacing of the rows, or, when more than half of
    them are found, from the one below the positions per row.
    """
    if not n_found:
        return 0
    if n_rows // n_found >= 2:
        return FULLEST_SPARSE + 2 - (n_rows // n_found).bit_length()
    return FULLEST_SPARSE + 1 + (n_positions // n_rows).bit_length()


def _row_limits(density_class: int, n_rows: int) -> tuple[int, int]:
    """The fewest and the most rows with groups that tensors of the class can have, of `n_rows` rows altogether."""
    halvings = max(1, FULLEST_SPARSE + 2 - density_class)
    return n_rows >> halvings, n_rows >> (halvings - 1)


def _with_units(shapes: Shapes) -> Integers:
    return np.flatnonzero([n_rows * n_groups > 0 for n_rows, n_groups in shapes])


def _by_class(classes: Integers) -> Integers:
    """The tensors that have positions, in the order in which they are told."""
    return np.argsort(classes, kind="stable")[int((classes == 0).sum()) :]


def _write_classes(writer: BitWriter, classes: Integers) -> None:
    """The classes of the tensors that have units: which have class 0; then the lowest other class, which have it..."""
    left = classes
    density_class = 0
    while len(left):
        members = np.flatnonzero(left == density_class)
        writer.bounded(len(members), len(left))
        write_set(writer, len(left), members, paid=True)
        left = left[left != density_class]
        if not density_class and len(left):
            density_class = int(left.min())
            writer.fields(np.array([density_class], dtype=np.int64), CLASS_BITS)
        else:
            density_class += 1


def _read_classes(reader: BitReader, n_tensors: int) -> Integers:
    classes = np.zeros(n_tensors, dtype=np.int64)
    left = np.arange(n_tensors)
    left = np.delete(left, read_set(reader, n_tensors, reader.bounded(n_tensors), paid=True))
    density_class = lowest = int(reader.fields(1, CLASS_BITS)[0])
    while len(left):
        n = reader.bounded(len(left))
        if not lowest or density_class >= 1 << CLASS_BITS or (density_class == lowest and not n):
            raise CodecError(f"{n} tensors of density class {density_class}")
        members = read_set(reader, len(left), n, paid=True)
        classes[left[members]] = density_class
        left = np.delete(left, members)
        density_class += 1
    if not classes.any():
        raise CodecError("no tensor has positions")
    return classes


def _write_rows(writer: BitWriter, rows: _Rows, classes: Integers, shapes: Shapes) -> None:
    for density_class, tensors, starts, n_rows in _laid_end_to_end(classes, shapes):
        at = classes[rows.tensor] == density_class
        members = starts[np.searchsorted(tensors, rows.tensor[at])] + rows.row[at]
        fewest, most = _row_limits(density_class, n_rows)
        writer.bounded(len(members) - fewest, most - fewest)
        write_set(writer, n_rows, members)


def _read_rows(reader: BitReader, classes: Integers, shapes: Shapes) -> _Rows:
    tensor, row = [], []
    for density_class, tensors, starts, n_rows in _laid_end_to_end(classes, shapes):
        fewest, most = _row_limits(density_class, n_rows)
        members = read_set(reader, n_rows, fewest + reader.bounded(most - fewest))
        if not len(members):
            raise CodecError(f"no rows in {len(tensors)} tensors of density class {density_class}")
        among = np.searchsorted(starts, members, side="right") - 1
        tensor.append(tensors[among])
        row.append(members - starts[among])
    return _Rows.of(np.concatenate(tensor), np.concatenate(row), classes, shapes)


def _laid_end_to_end(classes: Integers, shapes: Shapes) -> Iterator[tuple[int, Integers, Integers, int]]:
    """For each class but 0: the class, its tensors, where the rows of each begin, and all their rows."""
    for density_class in np.unique(classes[classes > 0]):
        tensors = np.flatnonzero(classes == density_class)
        n_rows = np.array([shapes[int(i)][0] for i in tensors], dtype=np.int64)
        ends = np.cumsum(n_rows)
        yield int(density_class), tensors, ends - n_rows, int(ends[-1])


@lru_cache(maxsize=256)
def _most_exact(n_groups: int) -> int:
    """Rows with so many of `n_groups` groups, or fewer, have a level for each number."""
    if n_groups > WIDEST_CHOICE:
        return 1
    return max(c for c in range(1, min(MAX_EXACT, n_groups) + 1) if comb(n_groups, c) <= LARGEST_CHOICE)


def _levels(counts: Integers, n_groups: Integers) -> Integers:
    widths, inverse = np.unique(n_groups, return_inverse=True)
    exact = np.array([_most_exact(int(n)) for n in widths], dtype=np.int64)[inverse]
    doublings = np.frexp((counts // (exact + 1)).astype(np.float64))[1]  # the bit length
    return np.where(counts <= exact, counts, exact + doublings)


def _count_limits(n_groups: int, level: int) -> tuple[int, int]:
    """The fewest and the most groups of a row of the level; CodecError when the row has not so many."""
    exact = _most_exact(n_groups)
    fewest = level if level <= exact else (exact + 1) << (level - exact - 1)
    if fewest > n_groups:
        raise CodecError(f"a row of {n_groups} groups of which {fewest} or more are in the plane")
    return fewest, level if level <= exact else min(2 * fewest - 1, n_groups)


def _write_levels(writer: BitWriter, levels: Integers) -> None:
    """How many of the rows are of a level above the first, and which; of these, above the second; until none is."""
    left, level = levels, 1
    while len(left):
        higher = np.flatnonzero(left > level)
        writer.bounded(len(higher), len(left))
        write_set(writer, len(left), higher, paid=True)
        left, level = left[higher], level + 1


def _read_levels(reader: BitReader, n_rows: int) -> Integers:
    levels = np.ones(n_rows, dtype=np.int64)
    left = np.arange(n_rows)
    while len(left):
        left = left[read_set(reader, len(left), reader.bounded(len(left)), paid=True)]
        levels[left] += 1
        if len(left) and levels[left[0]] >= LEVELS:
            raise CodecError(f"a row of level {LEVELS}")
    return levels


def _write_groups(writer: BitWriter, n_groups: int, level: int, counts: Integers, groups: Integers) -> None:
    """The groups of all rows of one level and one `n_groups`."""
    if level <= _most_exact(n_groups):
        write_choices(writer, n_groups, groups.reshape(-1, level))
        return
    fewest, most = _count_limits(n_groups, level)
    writer.bounded(len(groups) - len(counts) * fewest, len(counts) * (most - fewest))
    row = np.arange(len(counts), dtype=np.int64)
    write_set(writer, len(counts) * n_groups, np.repeat(row * n_groups, counts) + groups)


def _read_groups(reader: BitReader, n_groups: int, level: int, n_rows: int) -> tuple[Integers, Integers]:
    """The number of groups in each of the rows, shape (n_rows,), and the groups."""
    fewest, most = _count_limits(n_groups, level)
    if level <= _most_exact(n_groups):
        return np.full(n_rows, level, dtype=np.int64), read_choices(reader, n_groups, level, n_rows).ravel()
    n_found = n_rows * fewest + reader.bounded(n_rows * (most - fewest))
    row, groups = np.divmod(read_set(reader, n_rows * n_groups, n_found), n_groups)
    counts = np.bincount(row, minlength=n_rows)
    if counts.min() < fewest or counts.max() > most:
        raise CodecError(f"a row of level {level} has {counts.min()} groups or {counts.max()}, not {fewest} to {most}")
    return counts, groups


def _spread(starts: Integers, counts: Integers) -> Integers:
    """start, start + 1, ... for each row, as many as its count."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(int(ends[-1]), dtype=np.int64)
