"""What planes cost beside their entropy, and how fast they are decoded: one line per plane.

    python -m benchmarks.pack_size                  random masks on the shapes of a 135M model
    python -m benchmarks.pack_size --large          and one of an 8B model (218 million groups)
    python -m benchmarks.pack_size --pack FILE      the planes of real packs

`bound` is the sum of n H(k / n) over the tensors: what a code needs at least that takes the units of a tensor for
independent and gets the counts for nothing. `flat` and `rows` are the two codes of the format, in bytes; version 2
stores groups in rows and single weights flat, and the speed is that of the code that it stores. Random masks are of
three kinds: single weights that are independent; groups that are independent; groups that come in rows, where each row
draws its own density (log-normal, sigma 1.5). In all of them each tensor draws its own around the mean (sigma 0.8).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona_edge.bits import decode_positions, encode_positions, entropy_bits
from persona_edge.maskpack import MaskPack
from persona_edge.row_code import decode_rows, encode_rows

Positions = NDArray[np.uint32]
Shapes = list[tuple[int, int]]  # rows, units per row

KINDS_135M = [(576, 1536), (1536, 576), (1536, 576), (192, 576), (576, 576), (576, 576), (192, 576)]
KINDS_8B = [(4096, 14336), (14336, 4096), (14336, 4096), (1024, 4096), (4096, 4096), (4096, 4096), (1024, 4096)]
TENSOR_SPREAD = 0.8
ROW_SPREAD = 1.5
REPEATS = 5
HEADINGS = (
    f"{'plane':24s} {'density':>8s} {'positions':>10s} {'bound':>10s} {'flat':>10s} {'/bound':>6s} "
    f"{'rows':>9s} {'/bound':>6s} {'/flat':>9s} {'ms':>8s} {'Munits/s':>8s}"
)


def shapes_of(kinds: Sequence[tuple[int, int]], n_blocks: int, granularity: int) -> Shapes:
    """The tensors of so many blocks."""
    return [(n_rows, n_columns // granularity) for n_rows, n_columns in kinds] * n_blocks


def random_plane(shapes: Shapes, density: float, row_spread: float, seed: int) -> list[Positions]:
    """Each tensor with its own density around `density`, and each row with its own around that."""
    rng = np.random.default_rng(seed)
    positions = []
    for n_rows, n_units in shapes:
        share = density * np.exp(TENSOR_SPREAD * rng.normal() - TENSOR_SPREAD**2 / 2)
        shares = share * np.exp(row_spread * rng.normal(size=(n_rows, 1)) - row_spread**2 / 2)
        taken = rng.random((n_rows, n_units), dtype=np.float32) < np.minimum(shares, 0.97)
        positions.append(np.flatnonzero(taken).astype(np.uint32))
    return positions


def report(name: str, shapes: Shapes, positions: list[Positions], stored_in_rows: bool) -> None:
    """Print one line about a plane."""
    units = [n_rows * n_units for n_rows, n_units in shapes]
    n = sum(map(len, positions))
    bound = sum(entropy_bits(u, len(p)) for u, p in zip(units, positions, strict=True)) / 8
    flat = encode_positions(units, positions)
    if stored_in_rows:
        data = encode_rows(shapes, positions)
        seconds = _least(lambda: decode_rows(data, shapes, n))
    else:
        data = flat
        seconds = _least(lambda: decode_positions(data, units, n))
    rows = f"{len(data):9,d} {_ratio(data, bound)} {len(data) / len(flat):9.3f}" if stored_in_rows else " " * 26
    print(
        f"{name:24s} {n / sum(units):8.3%} {n:10,d} {bound:10,.0f} {len(flat):10,d} {_ratio(flat, bound)} {rows} "
        f"{seconds * 1e3:8.1f} {sum(units) / seconds / 1e6:8.0f}"
    )


def report_pack(path: Path) -> None:
    """One line per plane of the pack, and their sum."""
    pack = MaskPack.open(path)
    tensors = pack.identity.tensors
    none = np.zeros(0, dtype=np.uint32)
    for pole in pack.load().poles:
        for index, plane in enumerate(pole.planes):
            g = plane.granularity
            shapes = [(t.n_rows, 0 if t.n_columns % g else t.n_columns // g) for t in tensors]
            sets = [plane.positions.get(t.name, none) for t in tensors]
            report(f"{pole.name}/{index}", shapes, sets, stored_in_rows=g > 1)
    summary = pack.summary()
    stored = sum(plane.n_bytes for plane in summary.planes)
    bound = sum(plane.entropy_bound_bytes for plane in summary.planes)
    print(
        f"{path.name}: version {pack.version}; as stored, planes have {stored:,} bytes, {stored / bound:.3f} of their "
        f"bound; sketch {summary.n_sketch_bytes:,}, header {summary.n_header_bytes:,}, all {summary.n_bytes:,}"
    )


def _ratio(data: bytes, bound: float) -> str:
    """Bytes over the bound; a plane that gates tensors as a whole has none."""
    return f"{len(data) / bound:6.3f}" if bound else f"{'-':>6s}"


def _least(run: Callable[[], object]) -> float:
    """Seconds of the quickest of a few runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(large: bool = False) -> None:
    """Random masks of all densities that masks have: groups sparse, the paper's single weights dense."""
    print(HEADINGS)
    groups = shapes_of(KINDS_135M, 30, 32)
    for name, spread in (("independent groups", 0.0), ("groups in rows", ROW_SPREAD)):
        for density in (0.001, 0.003, 0.01, 0.03, 0.1):
            report(name, groups, random_plane(groups, density, spread, seed=1), stored_in_rows=True)
    weights = shapes_of(KINDS_135M, 4, 1)
    for density in (0.02, 0.1, 0.3, 0.5):
        report("independent weights", weights, random_plane(weights, density, 0.0, seed=1), stored_in_rows=False)
    if large:
        groups = shapes_of(KINDS_8B, 32, 32)
        for name, spread in (("8B, independent groups", 0.0), ("8B, groups in rows", ROW_SPREAD)):
            report(name, groups, random_plane(groups, 0.01, spread, seed=1), stored_in_rows=True)


def command_line() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Bytes of planes beside their entropy, and how fast they are decoded.")
    parser.add_argument("--pack", type=Path, action="append", help="a mask pack; may be given several times")
    parser.add_argument("--large", action="store_true", help="also random masks of an 8B model")
    arguments = parser.parse_args()
    if not arguments.pack:
        main(arguments.large)
        return
    print(HEADINGS)
    for path in arguments.pack:
        report_pack(path)


if __name__ == "__main__":
    command_line()
