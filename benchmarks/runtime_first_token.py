"""Stage `first_token`: from the wish for another persona to the first token of its answer, in a running conversation.

A conversation of n tokens is in the cache, and a message of 16 more is waiting. The cache of another persona does not
hold, so LoRA, a control vector, a reload and a changed system prompt (it stands at the beginning) all evaluate n + 16
tokens, as ours does with `reprefill`. With `snapshot` the conversation was once evaluated by the persona that returns;
with `keep` the old cache is used as it is. "No change" is the conversation that goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np

from benchmarks.engine import Engine, StockModel, evaluate_anew, opened_model, opened_runtime
from benchmarks.measured import Measured, Recorder, in_rounds
from benchmarks.runtime_job import Job
from benchmarks.runtime_switch import LORA, NO_CHANGE, OURS, RELOAD, VECTOR
from persona_edge.runtime.llama_backend import LlamaBackend
from persona_edge.runtime.llama_weights import LlamaModel
from persona_edge.runtime.session import PersonaRuntime

__all__ = ["KEEP", "SNAPSHOT", "SYSTEM_PROMPT", "measure", "some_tokens"]

_Item = TypeVar("_Item")
SNAPSHOT, KEEP, SYSTEM_PROMPT = "persona-edge, kv=snapshot", "persona-edge, kv=keep", "another system prompt"
_MESSAGE = 16  # tokens
_ROOM = 2 * _MESSAGE
_SNAPSHOT_MEGABYTES = 2048
_FIRST, _LAST = 40, 250  # tokens that every vocabulary has and that end nothing
_PATIENCE = 4  # times the seconds of the job that a first round may take
_PROBE = 64  # tokens evaluated to see how long a prompt will take


@dataclass(frozen=True)
class _Turn:
    """One round: a conversation, a message after it, and the number of the round, by which personas take turns."""

    conversation: list[int]
    message: list[int]
    number: int

    @property
    def prompt(self) -> list[int]:
        """All that has to be in the cache for the first token."""
        return self.conversation + self.message

    def pair(self, both: Sequence[_Item]) -> tuple[_Item, _Item]:
        """Which of `both` leaves in this round, and which returns."""
        first, second = both
        return (first, second) if self.number % 2 else (second, first)


Way = Callable[[_Turn], float]
"""A turn to the seconds waited."""


def measure(job: Job) -> list[Measured]:
    """Milliseconds to the first token, at least one round for each length that does not take far over `job.seconds`."""
    recorder = Recorder()
    with ExitStack() as stack:
        model = stack.enter_context(opened_model(job.model))
        ways = _ways(job, model, stack)
        for way in ways.values():  # what a first call allocates and compiles is not waited for again
            way(_Turn(some_tokens(_MESSAGE), some_tokens(_MESSAGE), 0))
        for length in job.lengths:
            is_too_long = length + _ROOM > model.library.api.llama_model_n_ctx_train(model.handle)
            if is_too_long or _seconds_of_a_round(model, job, length) > _PATIENCE * job.seconds:
                continue
            conversation = some_tokens(length, seed=length)
            for number in in_rounds(job.rounds, job.seconds, warm_up=False):
                turn = _Turn(conversation, some_tokens(_MESSAGE, seed=number), number)
                for name, way in ways.items():
                    recorder.add(name, f"{length} tokens", "ms", 1e3 * way(turn))
    return recorder.result()


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """`n` tokens without meaning, the same for the same seed."""
    return [int(token) for token in np.random.default_rng(seed).integers(_FIRST, _LAST, n)]


def _ways(job: Job, model: LlamaModel, stack: ExitStack) -> Mapping[str, Way]:
    n_ctx = max(job.lengths) + _ROOM
    engine = stack.enter_context(Engine(model, n_ctx=n_ctx, n_threads=job.n_threads))
    loras = [engine.load_lora(Path(path)) for path in job.loras]
    vectors = [np.load(path) for path in job.vectors]
    open_runtime = partial(opened_runtime, model, n_ctx=n_ctx, n_threads=job.n_threads)
    ours = stack.enter_context(open_runtime())
    snapshot = stack.enter_context(open_runtime(kv="snapshot", kv_megabytes=_SNAPSHOT_MEGABYTES))
    keep = stack.enter_context(open_runtime(kv="keep"))
    plain = stack.enter_context(open_runtime())
    for runtime, _ in (ours, snapshot, keep):
        runtime.attach(job.pack)
    return {
        OURS: partial(_switched, job, *ours, False),
        SNAPSHOT: partial(_switched, job, *snapshot, True),
        KEEP: partial(_switched, job, *keep, True),
        LORA: partial(_set, engine, engine.set_lora, loras),
        VECTOR: partial(_set, engine, engine.set_vector, vectors),
        RELOAD: partial(_reloaded, job, n_ctx),
        SYSTEM_PROMPT: partial(_prompted, engine),
        NO_CHANGE: partial(_unchanged, plain[1]),
    }


def _switched(job: Job, runtime: PersonaRuntime, backend: LlamaBackend, cache_counts: bool, turn: _Turn) -> float:
    """Where the cache counts, both personas know the conversation: the one that leaves and the one that returns."""
    leaving, returning = turn.pair(job.personas)
    known = [*turn.conversation, _FIRST]
    if cache_counts:
        runtime.switch(returning)
        backend.evaluate(known)
    runtime.switch(leaving)
    if cache_counts:
        backend.evaluate(known)
    started = perf_counter()
    runtime.switch(returning)
    backend.evaluate(turn.prompt)
    elapsed = perf_counter() - started
    runtime.base()
    return elapsed


def _set(engine: Engine, become: Callable[[_Item | None], None], personas: Sequence[_Item], turn: _Turn) -> float:
    leaving, returning = turn.pair(personas)
    become(leaving)
    evaluate_anew(engine, turn.message)
    started = perf_counter()
    become(returning)
    evaluate_anew(engine, turn.prompt)
    elapsed = perf_counter() - started
    become(None)
    return elapsed


def _reloaded(job: Job, n_ctx: int, turn: _Turn) -> float:
    started = perf_counter()
    model = StockModel(job.model, repack=False)
    with Engine(model, n_ctx=n_ctx, n_threads=job.n_threads) as engine:
        engine.evaluate(turn.prompt)
        elapsed = perf_counter() - started
    model.close()
    return elapsed


def _prompted(engine: Engine, turn: _Turn) -> float:
    evaluate_anew(engine, turn.message)  # whatever was set before, the graph is planned without it
    started = perf_counter()
    evaluate_anew(engine, turn.prompt)
    return perf_counter() - started


def _unchanged(backend: LlamaBackend, turn: _Turn) -> float:
    backend.evaluate([*turn.conversation, _FIRST])
    started = perf_counter()
    backend.evaluate(turn.prompt)
    return perf_counter() - started


def _seconds_of_a_round(model: LlamaModel, job: Job, length: int) -> float:
    """What a round will take at least: five ways evaluate the whole length, in the first round three more do."""
    with opened_runtime(model, n_ctx=2 * _PROBE, n_threads=job.n_threads) as (_, backend):
        evaluate_anew(backend, some_tokens(8))
        started = perf_counter()
        evaluate_anew(backend, some_tokens(_PROBE))
        return (perf_counter() - started) / _PROBE * length * 8
