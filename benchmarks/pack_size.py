"""What a mask pack costs beside its entropy, and how fast it is coded: prints one line per kind of mask.

    python benchmarks/pack_size.py

Masks are random: each tensor draws its own density around the mean (log-normal, sigma 0.8), each unit is independent.
The shapes are those of a 135M model (30 blocks of 7 tensors) and, for single weights, 4 of its blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from persona_edge.bits import decode_positions, encode_positions
from persona_edge.maskpack import encode_pack
from persona_edge.masks import Granularity, ModelIdentity, PersonaSet, Plane, Pole, SignSample, TensorShape
from persona_edge.pack_header import units_per_tensor

KINDS = {
    "attn_q": (576, 576),
    "attn_k": (192, 576),
    "attn_v": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}
SPREAD = 0.8


def tensors_of(n_blocks: int) -> tuple[TensorShape, ...]:
    """The maskable tensors of the first blocks of a 135M model."""
    return tuple(TensorShape(f"blk.{b}.{kind}.weight", *KINDS[kind]) for b in range(n_blocks) for kind in KINDS)


def random_plane(tensors: Sequence[TensorShape], granularity: Granularity, density: float, seed: int) -> Plane:
    """Independent units; each tensor with its own density around `density`."""
    rng = np.random.default_rng(seed)
    positions = {}
    for tensor in tensors:
        share = min(0.97, density * float(np.exp(SPREAD * rng.normal() - SPREAD**2 / 2)))
        found = np.flatnonzero(rng.random(tensor.n_units(granularity)) < share).astype(np.uint32)
        if len(found):
            positions[tensor.name] = found
    return Plane(0.0, positions, granularity)


def measure(n_blocks: int, granularity: Granularity, density: float) -> None:
    """Write one plane, print its size over its entropy and the coding speed in million units per second."""
    tensors = tensors_of(n_blocks)
    plane = random_plane(tensors, granularity, density, seed=int(density * 1e4))
    sketch = {tensors[0].name: SignSample(np.zeros(1, dtype=np.uint32), np.ones(1, dtype=np.bool_))}
    personas = PersonaSet(ModelIdentity("llama", tensors, sketch), (Pole("I", "EI", (plane,)),), {"I": ("I",)})
    written = encode_pack(personas)[1].planes[0]
    units = units_per_tensor(tensors, granularity)
    sets = [plane.positions.get(tensor.name, np.zeros(0, dtype=np.uint32)) for tensor in tensors]
    start = time.perf_counter()
    data = encode_positions(units, sets)
    middle = time.perf_counter()
    decode_positions(data, units, written.n_positions)
    end = time.perf_counter()
    print(
        f"{granularity:11d} {written.n_positions / sum(units):9.3%} {written.n_positions:11,d} {written.n_bytes:10,d} "
        f"{written.n_bytes / written.entropy_bound_bytes:12.4f} "
        f"{sum(units) / (middle - start) / 1e6:9.0f} {sum(units) / (end - middle) / 1e6:9.0f}"
    )


def main() -> None:
    """All densities that masks have: groups of 32 sparse, the paper's single weights dense."""
    print("granularity   density   positions      bytes  bytes/bound     encode    decode (million units per second)")
    for density in (0.002, 0.004, 0.007, 0.01, 0.02, 0.05):
        measure(30, 32, density)
    for density in (0.02, 0.1, 0.3, 0.4, 0.5):
        measure(4, 1, density)


if __name__ == "__main__":
    main()
