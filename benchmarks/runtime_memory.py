"""Stage `memory`: what one arm takes in a process of its own, and how long it takes to be ready.

Memory is read after a prompt, with what the process had before the model was loaded subtracted.
Resident is all that lies in memory, the pages of the mapped file included, which other processes can share. Private is
what this process alone has and has changed: it comes on top for every process. Linux tells both; elsewhere they are
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.engine import Engine, StockModel, evaluate_anew, opened_model, opened_runtime
from benchmarks.measured import Measured, Recorder
from benchmarks.runtime_first_token import some_tokens
from benchmarks.runtime_job import Job
from benchmarks.runtime_speed import STOCK, UNMASKED
from benchmarks.runtime_switch import LORA, OURS, VECTOR
from persona_edge.machine import release_freed_memory
from persona_edge.maskpack import MaskPack

__all__ = ["ARMS", "PRIVATE", "RESIDENT", "SWITCHED", "measure", "read_memory"]

RESIDENT, PRIVATE = "resident", "private"
SWITCHED = "persona-edge, both personas used"
ARMS = (STOCK, UNMASKED, OURS, SWITCHED, LORA, VECTOR)
_ROLLUP = Path("/proc/self/smaps_rollup")


def read_memory() -> dict[str, int]:
    """Resident and private dirty bytes of this process; empty where the system does not tell."""
    try:
        lines = _ROLLUP.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = {words[0]: int(words[1]) * 1024 for line in lines[1:] if len(words := line.split()) == 3}
    return {RESIDENT: fields["Rss:"], PRIVATE: fields["Private_Dirty:"]}


def measure(job: Job) -> list[Measured]:
    """Bytes and milliseconds of `job.arm`. The library is loaded before, so that it is no part of either."""
    from persona_edge.runtime.llama_library import load_library

    load_library()
    before = read_memory()
    recorder = Recorder()
    with ExitStack() as stack:
        evaluate = _open(job, stack, recorder)
        evaluate()
        release_freed_memory()
        for what, n_bytes in read_memory().items():
            recorder.add(job.arm, what, "bytes", n_bytes - before[what])
    return recorder.result()


def _open(job: Job, stack: ExitStack, recorder: Recorder) -> Callable[[], None]:
    """Open the arm, timing its parts; returns what evaluates a prompt in it."""
    if job.arm in (UNMASKED, OURS, SWITCHED):
        return _open_ours(job, stack, recorder)
    started = perf_counter()
    model = StockModel(job.model)
    stack.callback(model.close)
    engine = stack.enter_context(Engine(model, n_ctx=job.n_prompt + job.n_tokens, n_threads=job.n_threads))
    loaded = perf_counter()
    recorder.add(job.arm, "load", "ms", 1e3 * (loaded - started))
    if job.arm == LORA:
        adapters = [engine.load_lora(Path(path)) for path in job.loras]
        engine.set_lora(adapters[0])
    elif job.arm == VECTOR:
        engine.set_vector(np.load(job.vectors[0]))
    if job.arm != STOCK:
        recorder.add(job.arm, "attach", "ms", 1e3 * (perf_counter() - loaded))
    return lambda: _evaluate(job, engine.evaluate)


def _open_ours(job: Job, stack: ExitStack, recorder: Recorder) -> Callable[[], None]:
    started = perf_counter()
    model = stack.enter_context(opened_model(job.model))
    opened = opened_runtime(model, n_ctx=job.n_prompt + job.n_tokens, n_threads=job.n_threads)
    runtime, backend = stack.enter_context(opened)
    loaded = perf_counter()
    recorder.add(job.arm, "load", "ms", 1e3 * (loaded - started))
    if job.arm != UNMASKED:
        pack = MaskPack.open(job.pack)
        runtime.attach(pack)
        attached = perf_counter()
        recorder.add(job.arm, "attach", "ms", 1e3 * (attached - loaded))
        poles = [pack.pole(name) for name in pack.pole_names]
        decoded = perf_counter()
        n_groups = sum(tensor.n_units(32) for tensor in pack.identity.tensors)
        n_planes = sum(len(pole.planes) for pole in poles)
        recorder.add(job.arm, "decode the pack", "ms", 1e3 * (decoded - attached))
        recorder.add(job.arm, "decoding", "million groups/s", n_planes * n_groups / (decoded - attached) / 1e6)
        for name in job.personas[:: -1 if job.arm == SWITCHED else 2]:
            runtime.switch(name)
    return lambda: _evaluate(job, lambda tokens: evaluate_anew(backend, tokens))


def _evaluate(job: Job, evaluate: Callable[[list[int]], None]) -> None:
    evaluate(some_tokens(job.n_prompt))
