"""Stages `switch` and `density`: the change itself, for ours, LoRA, control vectors and a reload; ours by density.

Every change is preceded by a token, which fills the caches with other weights as a conversation does, and followed by
one: what llama.cpp puts off until the next evaluation (it plans its graph anew for another adapter) shows there. What a
change costs in all is its own time and what the token after it takes longer than the one before it. All arms work on
the same weights in memory; ours goes back to base before the others have their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.engine import Engine, StockModel, evaluate_anew, opened_model, opened_runtime
from benchmarks.measured import Measured, Recorder, in_rounds
from benchmarks.runtime_job import Job

__all__ = [
    "A_TO_B",
    "DENSITY_A_TO_B",
    "DENSITY_TO_A",
    "DENSITY_UNITS",
    "IN_ALL",
    "LORA",
    "NO_CHANGE",
    "OURS",
    "RELOAD",
    "VECTOR",
    "measure",
    "measure_densities",
]

OURS, LORA, VECTOR = "persona-edge", "LoRA r16", "control vector"
RELOAD, NO_CHANGE = "baked GGUF, reloaded", "no change"
A_TO_B, IN_ALL = "change: A to B", "change in all: A to B"
DENSITY_TO_A, DENSITY_A_TO_B, DENSITY_UNITS = "by density: base to A", "by density: A to B", "units by density: A to B"
_N_CTX = 256
_RELOADS = 8  # at most: a reload of a large model takes seconds
_TOKEN = 5


@dataclass(frozen=True)
class _Arm:
    """Three changes, from base to one persona, to the other, and back; and how its context evaluates a token."""

    name: str
    changes: tuple[tuple[str, Callable[[], object]], ...]
    token: Callable[[], object]


def measure(job: Job) -> list[Measured]:
    """Milliseconds of each change, and what it costs in all."""
    recorder = Recorder()
    with ExitStack() as stack:
        arms = _open(job, stack)
        for number in in_rounds(job.rounds, job.seconds, least=3):
            for arm in arms:
                for what, milliseconds in _one_round(arm):
                    if number:
                        recorder.add(arm.name, what, "ms", milliseconds)
    for number in in_rounds(min(job.rounds, _RELOADS), job.seconds / 4, least=2):
        for what, milliseconds in _reload(job):
            if number:
                recorder.add(RELOAD, what, "ms", milliseconds)
    return recorder.result()


def measure_densities(job: Job) -> list[Measured]:
    """Milliseconds of a switch with each of `packs`, (density, path); a token is evaluated before each."""
    recorder = Recorder()
    with (
        opened_model(job.model) as model,
        opened_runtime(model, n_ctx=_N_CTX, n_threads=job.n_threads) as (runtime, backend),
    ):
        for density, path in job.packs:
            runtime.attach(path)
            names = [name for name in job.personas if name in runtime.personas]
            for number in in_rounds(job.rounds, job.seconds / len(job.packs), least=3):
                for what, change in (
                    ("base to A", partial(runtime.switch, names[0])),
                    ("A to B", partial(runtime.switch, names[1])),
                    ("B to base", runtime.base),
                ):
                    backend.evaluate([_TOKEN])
                    started = perf_counter()
                    report = change()
                    elapsed = perf_counter() - started
                    if number:
                        arm = f"{density:g}"
                        recorder.add(arm, f"by density: {what}", "ms", 1e3 * elapsed)
                        recorder.add(arm, f"units by density: {what}", "units", report.n_units_written)
    return recorder.result()


def _open(job: Job, stack: ExitStack) -> list[_Arm]:
    model = stack.enter_context(opened_model(job.model))
    runtime, backend = stack.enter_context(opened_runtime(model, n_ctx=_N_CTX, n_threads=job.n_threads))
    runtime.attach(job.pack)
    first, second = job.personas
    lora, vector = (stack.enter_context(Engine(model, n_ctx=_N_CTX, n_threads=job.n_threads)) for _ in range(2))
    a, b = (lora.load_lora(Path(path)) for path in job.loras)
    v, w = (np.load(path) for path in job.vectors)
    names = ("base to A", "A to B", "B to base")
    ours = (partial(runtime.switch, first), partial(runtime.switch, second), runtime.base)
    loras = (partial(lora.set_lora, a), partial(lora.set_lora, b), partial(lora.set_lora, None))
    vectors = (partial(vector.set_vector, v), partial(vector.set_vector, w), partial(vector.set_vector, None))
    return [
        _Arm(OURS, tuple(zip(names, ours, strict=True)), partial(evaluate_anew, backend, [_TOKEN])),
        _Arm(LORA, tuple(zip(names, loras, strict=True)), partial(evaluate_anew, lora, [_TOKEN])),
        _Arm(VECTOR, tuple(zip(names, vectors, strict=True)), partial(evaluate_anew, vector, [_TOKEN])),
    ]


def _one_round(arm: _Arm) -> Iterator[tuple[str, float]]:
    for name, change in arm.changes:
        before = perf_counter()
        arm.token()
        started = perf_counter()
        change()
        changed = perf_counter()
        arm.token()
        ended = perf_counter()
        yield f"change: {name}", 1e3 * (changed - started)
        yield f"change in all: {name}", 1e3 * (ended - started - (started - before))


def _reload(job: Job) -> Iterator[tuple[str, float]]:
    """Milliseconds to load the file, whose pages are in memory, and make a context; and what that costs in all."""
    started = perf_counter()
    model = StockModel(job.model, repack=False)
    engine = Engine(model, n_ctx=_N_CTX, n_threads=job.n_threads)
    yield A_TO_B, 1e3 * (perf_counter() - started)
    evaluate_anew(engine, [_TOKEN])
    ended = perf_counter()
    evaluate_anew(engine, [_TOKEN])
    yield IN_ALL, 1e3 * (ended - started - (perf_counter() - ended))
    engine.close()
    model.close()
