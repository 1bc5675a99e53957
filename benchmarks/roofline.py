"""How near a switch comes to what memory allows: the time to touch its units, and the time to switch them.

A switch reads and writes a few bytes in each of many cache lines. The roofline is the time to read and write back one
byte of every unit, in the same order, with the same threads: nothing that edits those units can be faster. Bandwidth
counts each distinct 64-byte line twice, read and written back. Two subjects: a real model with a real persona, and the
tensor list of an 8B model in plain memory with a random mask, neither of them in llama.cpp. Before each step the caches
are filled with something else, as a generation between two switches does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import Result, Spread, Table
from persona_edge.errors import InputError
from persona_edge.machine import available_memory
from persona_edge.maskpack import MaskPack
from persona_edge.masks import Plane, Pole
from persona_edge.runtime.kernels import CKernels
from persona_edge.runtime.layouts import layout_of
from persona_edge.runtime.programs import PersonaProgram, compile_program
from persona_edge.runtime.switcher import Switcher, WeightTensor

__all__ = ["measure"]

_LINE = 64  # bytes
_EVICTION = 128 << 20  # bytes written to fill the caches: more than any last level that this has met
_WAYS = ("touch", "base to persona", "persona to persona", "persona to base")
_Q4_K, _Q6_K = 12, 14
_N_LAYERS, _HIDDEN, _FEED_FORWARD, _KEY = 32, 4096, 14336, 1024  # Llama 3 8B
_SHAPES = {
    "attn_q": (_HIDDEN, _HIDDEN), "attn_k": (_KEY, _HIDDEN), "attn_v": (_KEY, _HIDDEN),
    "attn_output": (_HIDDEN, _HIDDEN), "ffn_gate": (_FEED_FORWARD, _HIDDEN), "ffn_up": (_FEED_FORWARD, _HIDDEN),
    "ffn_down": (_HIDDEN, _FEED_FORWARD),
}  # fmt: skip
_FINER = ("attn_v", "ffn_down")  # Q6_K in half of the layers, as Q4_K_M mixes


@dataclass(frozen=True)
class _Subject:
    """Weights in plain memory and two programs over them; `second` is for the switch from persona to persona."""

    name: str
    tensors: Mapping[str, WeightTensor]
    first: PersonaProgram
    second: PersonaProgram


@dataclass(frozen=True)
class _Share:
    """One way of one subject: milliseconds, and how many times as long as touching the first program's units."""

    subject: str
    way: str
    n_threads: int
    n_units: int
    milliseconds: Spread
    times_roofline: Spread | None


def measure(
    model: Path, pack: MaskPack, *, n_rounds: int = 30, n_threads: int = 2, n_layers: int = _N_LAYERS
) -> Result:
    """Compare `pack`'s INFP and ENTJ on `model`, and random 1 % masks on the 8B shape of `n_layers` layers.

    Each with one thread and with `n_threads`. Raises MissingDependencyError without the C kernels, InputError when the
    8B shape does not fit into memory.
    """
    shares: list[_Share] = []
    bandwidths = {}
    for subject in _subjects(model, pack, n_layers):
        for threads in sorted({1, n_threads}):
            shares += _shares(subject, threads, n_rounds)
        lines = _n_lines(subject.tensors, subject.first)
        best = min(s.milliseconds.p50 for s in shares if s.subject == subject.name and s.way == "touch")
        bandwidths[subject.name] = {"lines": lines, "gigabytes_per_second": 2 * _LINE * lines / best / 1e6}
    values = {"shares": [asdict(share) for share in shares], "touched": bandwidths, "n_layers": n_layers}
    notes = tuple(
        f"{name}: {found['lines']:,} distinct cache lines, touched at {found['gigabytes_per_second']:.1f} GB/s."
        for name, found in bandwidths.items()
    )
    return Result("The switch against the roofline", (_table(shares, n_rounds),), values, notes)


def _subjects(model: Path, pack: MaskPack, n_layers: int) -> Iterator[_Subject]:
    """One at a time, so that only one is in memory."""
    yield _real(model, pack)
    yield _synthetic(n_layers)


def _shares(subject: _Subject, n_threads: int, n_rounds: int) -> list[_Share]:
    times = _times(Switcher(subject.tensors, CKernels(n_threads)), subject, n_rounds)
    n_first, n_second = subject.first.n_units, subject.second.n_units
    n_units = dict(zip(_WAYS, (n_first, n_first, n_first + n_second, n_second), strict=True))
    per_unit = [seconds / n_first for seconds in times["touch"]]
    return [
        _Share(
            subject.name,
            way,
            n_threads,
            n_units[way],
            Spread.of([1e3 * seconds for seconds in times[way]]),
            None
            if way == "touch"
            else Spread.of([s / n_units[way] / touch for s, touch in zip(times[way], per_unit, strict=True)]),
        )
        for way in _WAYS
    ]


def _times(switcher: Switcher, subject: _Subject, n_rounds: int) -> Mapping[str, list[float]]:
    """Seconds of each way, round by round; the first round, which allocates and checks, is left out."""
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    evicting = np.zeros(_EVICTION // 8)
    for _ in range(n_rounds + 1):
        for way, seconds in _one_round(switcher, subject, evicting):
            times[way].append(seconds)
    return {way: found[1:] for way, found in times.items()}


def _one_round(switcher: Switcher, subject: _Subject, evicting: NDArray[np.float64]) -> Iterator[tuple[str, float]]:
    steps: tuple[Callable[[], object], ...] = (
        partial(switcher.touch, subject.first),
        partial(switcher.apply, subject.first),
        partial(switcher.apply, subject.second),
        switcher.restore,
    )
    for way, step in zip(_WAYS, steps, strict=True):
        evicting += 1
        started = perf_counter()
        step()
        yield way, perf_counter() - started


def _real(model: Path, pack: MaskPack) -> _Subject:
    """The tensors that the pack knows, copied out of the file."""
    from gguf import GGUFReader

    names = {shape.name for shape in pack.identity.tensors}
    tensors = {
        tensor.name: WeightTensor(
            tensor.name,
            int(tensor.tensor_type),
            int(tensor.shape[1]),
            int(tensor.shape[0]),
            np.array(tensor.data).view(np.uint8).reshape(-1),
        )
        for tensor in GGUFReader(model).tensors
        if tensor.name in names
    }
    programs = [compile_program([pack.pole(pole) for pole in pack.personas[name]]) for name in ("INFP", "ENTJ")]
    return _Subject(model.stem, tensors, *programs)


def _synthetic(n_layers: int) -> _Subject:
    """Llama 3 8B's shapes in Q4_K and Q6_K, filled with ones; 1 % of the groups, anywhere, silenced."""
    types = {
        f"blk.{layer}.{name}.weight": (_Q6_K if name in _FINER and layer % 2 else _Q4_K, shape)
        for layer in range(n_layers)
        for name, shape in _SHAPES.items()
    }
    sizes = {name: shape[0] * layout_of(kind).n_bytes(shape[1]) for name, (kind, shape) in types.items()}
    _check_room(sum(sizes.values()))
    tensors = {
        name: WeightTensor(name, kind, *shape, np.full(sizes[name], 1, np.uint8))
        for name, (kind, shape) in types.items()
    }
    return _Subject(f"8B shape, {n_layers} layers", tensors, _random(tensors, 0), _random(tensors, 1))


def _check_room(n_bytes: int) -> None:
    free = available_memory()
    needed = n_bytes + _EVICTION + (1 << 30)
    if free is not None and free < needed:
        raise InputError(f"the 8B shape takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; close something")


def _random(tensors: Mapping[str, WeightTensor], seed: int) -> PersonaProgram:
    rng = np.random.default_rng(seed)
    positions = {}
    for name, tensor in tensors.items():
        n = tensor.n_rows * tensor.n_columns // 32
        positions[name] = np.unique(rng.integers(0, n, n // 100).astype(np.uint32))
    return compile_program([Pole("random", "", (Plane(0.0, positions),))])


def _n_lines(tensors: Mapping[str, WeightTensor], program: PersonaProgram) -> int:
    """How many distinct cache lines the program's units begin in."""
    total = 0
    for name in program.names:
        granularity, positions = program.positions_of(name)
        units = layout_of(tensors[name].ggml_type).fields(granularity)
        start = tensors[name].data.ctypes.data
        total += len(np.unique((start + units.first_bytes(positions)) // _LINE))
    return total


def _table(shares: list[_Share], n_rounds: int) -> Table:
    headers = ("way", "threads", "units", "p50 ms", "p95 ms", "ns per unit", "times the roofline")
    rows = tuple(
        (
            f"{share.subject}: {share.way}",
            str(share.n_threads),
            f"{share.n_units:,}",
            f"{share.milliseconds.p50:.2f}",
            f"{share.milliseconds.p95:.2f}",
            f"{1e6 * share.milliseconds.p50 / share.n_units:.1f}",
            "1" if share.times_roofline is None else f"{share.times_roofline.p50:.2f}",
        )
        for share in shares
    )
    caption = f"Caches cold, {n_rounds} interleaved rounds; the ratio is per unit, paired within the round:"
    return Table(headers, rows, caption)
