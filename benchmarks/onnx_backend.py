"""The ONNX backend beside an untouched ONNX Runtime session of the same model, with the same threads.

Switches are timed around the whole call; the first of each persona, which decodes and plans it, is told apart. Decoding
and reading a prompt are timed by the evaluated token, without sampling, in sessions that take turns in another order
every round: the session as ONNX Runtime makes it, a second such one, ours as base, and ours in a persona. The
second tells how far two equal sessions are apart: where a session's pages happen to lie is worth several percent on
some machines. Memory is what a process of its own has after a prompt. Parity is onnx_parity's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Final

from benchmarks.onnx_parity import OnnxParity, measure_parity
from benchmarks.record import Result, Spread, Table
from benchmarks.runtime_memory import read_memory
from persona_edge.machine import release_freed_memory
from persona_edge.maskpack import MaskPack
from persona_edge.onnx_model import read_onnx_model
from persona_edge.runtime.onnx_backend import OnnxBackend
from persona_edge.runtime.onnx_editors import SessionEditor
from persona_edge.runtime.onnx_geometry import Geometry
from persona_edge.runtime.onnx_prepared import prepare
from persona_edge.runtime.onnx_runtime import load_onnxruntime
from persona_edge.runtime.onnx_session import OnnxRuntime
from persona_edge.runtime.onnx_vocabulary import OnnxVocabulary

__all__ = ["PERSONAS", "Job", "measure"]

PERSONAS: Final = ("INFP", "ENTJ")
_STEPS: Final[tuple[tuple[str, str | None], ...]] = (
    ("base → INFP", "INFP"),
    ("INFP → ENTJ", "ENTJ"),
    ("ENTJ → base", None),
)
_STOCK, _CONTROL = "default session", "a second default session"
_BASE, _MASKED, _SWITCHED = "ours, base", "ours, INFP", "ours, both personas used"
_N_PROMPT = 128  # tokens
_WARM_UP = 2


@dataclass(frozen=True)
class Job:
    """What is measured, and how often: `rounds` of switches, `repeats` of `n_tokens` decoded tokens."""

    gguf: Path
    graph: Path
    pack: Path
    rounds: int = 200
    repeats: int = 12
    n_tokens: int = 64
    n_positions: int = 512
    n_threads: int = 2


@dataclass(frozen=True)
class _Step:
    """A change of persona in milliseconds: later ones, and the first in a fresh session."""

    name: str
    milliseconds: Spread
    first: float
    n_units: int
    n_bytes: int


@dataclass(frozen=True)
class _Speed:
    """Tokens per second of one session, and their ratio to the default session's in the same round."""

    what: str
    arm: str
    tokens_per_second: Spread
    of_default: Spread


def measure(job: Job) -> Result:
    """Everything about one model. Raises what opening it raises, and MissingDependencyError without PyTorch."""
    pack = MaskPack.open(job.pack)
    with OnnxRuntime.open(job.graph, pack, n_ctx=_N_PROMPT + job.n_tokens, n_threads=job.n_threads) as runtime:
        steps = _time_steps(runtime, job.rounds)
        speeds = _speeds(runtime, job)
        mechanism, notes = runtime.mechanism, runtime.mechanism_notes
    reload = Spread.of(list(_reload_times(job)))
    memory = {arm: _in_new_process(_memory, job, arm) for arm in (_STOCK, _BASE, _SWITCHED)}
    parity = measure_parity(job.gguf, job.graph, pack, PERSONAS, n_positions=job.n_positions, n_threads=job.n_threads)
    sizes, version = _sizes(job), load_onnxruntime().__version__
    values = {
        "onnxruntime": version,
        "model": job.graph.parent.name,
        "mechanism": mechanism,
        "mechanism_notes": list(notes),
        "n_threads": job.n_threads,
        "steps": [asdict(step) for step in steps],
        "new_session_milliseconds": asdict(reload),
        "speeds": [asdict(speed) for speed in speeds],
        "memory_bytes": memory,
        "file_bytes": sizes,
        "parity": [asdict(row) for row in parity],
    }
    text = (
        f"onnxruntime {version}. Mechanism: {mechanism}. A new session with the persona's weights takes "
        f"{reload.p50:.0f} ms (median of {reload.n}, file in the page cache).",
    )
    tables = (_step_table(steps), _speed_table(speeds, job), _memory_table(memory), _size_table(sizes))
    return Result(f"ONNX Runtime: {job.graph.parent.name}", (*tables, _parity_table(parity)), values, text)


def _time_steps(runtime: OnnxRuntime, n_rounds: int) -> list[_Step]:
    times: dict[str, list[float]] = {name: [] for name, _ in _STEPS}
    written: dict[str, tuple[int, int]] = {}
    for _ in range(1 + _WARM_UP + n_rounds):
        for name, persona in _STEPS:
            started = perf_counter()
            report = runtime.base() if persona is None else runtime.switch(persona)
            times[name].append(1e3 * (perf_counter() - started))
            written[name] = report.n_units_written, report.n_bytes_written
    return [_Step(name, Spread.of(t[1 + _WARM_UP :]), t[0], *written[name]) for name, t in times.items()]


def _speeds(runtime: OnnxRuntime, job: Job) -> list[_Speed]:
    """Decoding and prompt reading of the sessions, in turns."""
    with _stock_backend(job) as stock, _stock_backend(job) as control:
        arms: dict[str, tuple[OnnxBackend, str | None]] = {
            _STOCK: (stock, None),
            _CONTROL: (control, None),
            _BASE: (_backend_of(runtime), None),
            _MASKED: (_backend_of(runtime), PERSONAS[0]),
        }
        found: dict[tuple[str, str], list[float]] = {(w, arm): [] for w in ("decode", "prefill") for arm in arms}
        for number in range(job.repeats + 1):
            for arm in _rotated(list(arms), number):
                backend, persona = arms[arm]
                if arm in (_BASE, _MASKED):
                    runtime.base() if persona is None else runtime.switch(persona)
                for what, seconds_per_token in _time_tokens(backend, job):
                    if number:
                        found[what, arm].append(1 / seconds_per_token)
    return [
        _Speed(what, arm, Spread.of(speeds), _ratio(speeds, found[what, _STOCK]))
        for (what, arm), speeds in found.items()
    ]


def _time_tokens(backend: OnnxBackend, job: Job) -> Iterator[tuple[str, float]]:
    """Seconds per token of a prompt read anew, and of tokens added one by one behind it."""
    tokens = _prompt(backend)
    backend.clear()
    started = perf_counter()
    ticket = backend.evaluate(tokens)
    yield "prefill", (perf_counter() - started) / len(tokens)
    started = perf_counter()
    for i in range(job.n_tokens):
        tokens.append(40 + i)
        ticket = backend.evaluate(tokens, ticket)
    yield "decode", (perf_counter() - started) / job.n_tokens


def _prompt(backend: OnnxBackend) -> list[int]:
    return [17 + i % min(1000, backend.n_vocab - 17) for i in range(_N_PROMPT)]


def _rotated(names: list[str], number: int) -> list[str]:
    first = number % len(names)
    return names[first:] + names[:first]


def _ratio(speeds: Sequence[float], stock: Sequence[float]) -> Spread:
    return Spread.of([ours / theirs for ours, theirs in zip(speeds, stock, strict=True)])


def _backend_of(runtime: OnnxRuntime) -> OnnxBackend:
    """What evaluates tokens without sampling any: no business of a user's."""
    return runtime._backend


@contextmanager
def _stock_backend(job: Job) -> Iterator[OnnxBackend]:
    """The session as ONNX Runtime makes it from the original file, with a cache like ours."""
    model = read_onnx_model(job.graph)
    geometry, editor = Geometry.of(model), SessionEditor(model, n_threads=job.n_threads)
    vocabulary = OnnxVocabulary(model.folder, n_tokens=geometry.n_vocab, end_tokens=geometry.end_tokens)
    backend = OnnxBackend(model, editor, vocabulary, n_ctx=_N_PROMPT + job.n_tokens)
    try:
        yield backend
    finally:
        backend.close()
        editor.close()


def _reload_times(job: Job) -> Iterator[float]:
    """Milliseconds for a persona as a new session; the first is left out."""
    n_rounds = max(2, job.repeats // 2)
    pack = MaskPack.open(job.pack)
    with OnnxRuntime.open(job.graph, pack, n_ctx=64, n_threads=job.n_threads, mechanism="session") as runtime:
        for number in range(n_rounds + 1):
            started = perf_counter()
            runtime.switch(PERSONAS[number % 2])
            if number:
                yield 1e3 * (perf_counter() - started)


def _in_new_process(call: Callable[[Job, str], dict[str, int]], job: Job, arm: str) -> dict[str, int]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, job, arm).result()


def _memory(job: Job, arm: str) -> dict[str, int]:
    """Resident and private bytes of this process after a prompt, over what it had with the library alone."""
    load_onnxruntime()
    prepare(read_onnx_model(job.graph))
    before = read_memory()
    if arm == _STOCK:
        with _stock_backend(job) as stock:
            stock.evaluate(_prompt(stock))
            return _memory_since(before)
    with OnnxRuntime.open(job.graph, job.pack, n_ctx=_N_PROMPT + job.n_tokens, n_threads=job.n_threads) as runtime:
        for persona in PERSONAS if arm == _SWITCHED else ():
            runtime.switch(persona)
        backend = _backend_of(runtime)
        backend.evaluate(_prompt(backend))
        return _memory_since(before)


def _memory_since(before: dict[str, int]) -> dict[str, int]:
    release_freed_memory()
    return {what: n_bytes - before[what] for what, n_bytes in read_memory().items()}


def _sizes(job: Job) -> dict[str, int]:
    model = read_onnx_model(job.graph)
    prepared = prepare(model)
    return {
        "GGUF file": job.gguf.stat().st_size,
        "ONNX graph and weights": sum(path.stat().st_size for path in model.data_files()),
        "packed for this machine, in the cache": prepared.graph.stat().st_size + prepared.data.stat().st_size,
        "mask pack": job.pack.stat().st_size,
    }


def _step_table(steps: list[_Step]) -> Table:
    rows = tuple(
        (
            step.name,
            f"{step.milliseconds.p50:.2f}",
            f"{step.milliseconds.p95:.2f}",
            f"{step.first:.0f}",
            f"{step.n_units:,}",
            f"{step.n_bytes:,}",
        )
        for step in steps
    )
    caption = f"A switch, {steps[0].milliseconds.n} rounds; the first, in a session just opened, decodes the pack:"
    return Table(("switch", "p50 ms", "p95 ms", "first ms", "units written", "bytes written"), rows, caption)


def _speed_table(speeds: list[_Speed], job: Job) -> Table:
    rows = tuple(
        (
            f"{speed.what}: {speed.arm}",
            f"{speed.tokens_per_second.p50:.1f}",
            f"{speed.of_default.p50:.3f}",
            f"{speed.of_default.p25:.3f}–{speed.of_default.p75:.3f}",
        )
        for speed in speeds
    )
    caption = (
        f"{job.repeats} interleaved rounds, {job.n_threads} threads, a prompt of {_N_PROMPT} tokens and {job.n_tokens} "
        "after it; medians, and the ratio to the default session within the round:"
    )
    return Table(("what", "tokens/s", "of default", "p25–p75"), rows, caption)


def _memory_table(memory: dict[str, dict[str, int]]) -> Table:
    rows = tuple((arm, *(f"{n_bytes / 1e6:.0f}" for n_bytes in found.values())) for arm, found in memory.items())
    return Table(("memory, MB", *next(iter(memory.values()), {})), rows, "A process after a prompt:")


def _size_table(sizes: dict[str, int]) -> Table:
    return Table(("file", "MB"), tuple((name, f"{n / 1e6:.2f}") for name, n in sizes.items()))


def _parity_table(parity: Sequence[OnnxParity]) -> Table:
    rows = tuple(
        (
            row.persona or "base",
            f"{row.agreement.kl_divergence:.5f} ± {row.agreement.kl_error:.5f}",
            f"{row.agreement.kl_median:.5f}",
            f"{row.agreement.top1:.1%}",
            "" if row.kl_from_base is None else f"{row.kl_from_base:.3f}",
        )
        for row in parity
    )
    caption = (
        f"KL(PyTorch ‖ ONNX Runtime) in nats over {parity[0].agreement.n_positions} positions, PyTorch with the same "
        "dequantized weights and mask; beside it how far the persona is from base:"
    )
    return Table(("persona", "KL", "median", "same likeliest token", "KL(base ‖ persona)"), rows, caption)
