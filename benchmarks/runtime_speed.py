"""Stage `speed`: tokens per second of ours with and without a persona, beside stock llama.cpp, LoRA and a vector.

Stock is what llama.cpp does by itself: its own loading, its own context parameters, weights repacked where it likes.
LoRA and the vector run on that. Ours is loaded and evaluated as the runtime does it. The same given tokens are
evaluated in all arms, in another order every round; what chooses tokens is the same code for all and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.engine import Engine, StockModel, evaluate_anew, opened_model, opened_runtime
from benchmarks.measured import Measured, Recorder, in_rounds
from benchmarks.runtime_first_token import some_tokens
from benchmarks.runtime_job import Job
from benchmarks.runtime_switch import LORA, OURS, VECTOR
from persona_edge.runtime.llama_backend import LlamaBackend

__all__ = ["DECODE", "PREFILL", "STOCK", "UNMASKED", "measure"]

STOCK, UNMASKED = "stock llama.cpp", "persona-edge, no persona"
DECODE, PREFILL = "decode", "prefill"
_ROOM = 8


def measure(job: Job) -> list[Measured]:
    """Tokens per second: of evaluating a prompt of `job.n_prompt`, and of `job.n_tokens` after it, one at a time."""
    recorder = Recorder()
    with ExitStack() as stack:
        arms = _open(job, stack)
        names = list(arms)
        for number in in_rounds(job.rounds, job.seconds, least=2):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                prefill, decode = arms[name]()
                if number:
                    recorder.add(name, PREFILL, "tokens/s", prefill)
                    recorder.add(name, DECODE, "tokens/s", decode)
    return recorder.result()


def _open(job: Job, stack: ExitStack) -> Mapping[str, Callable[[], tuple[float, float]]]:
    n_ctx = job.n_prompt + job.n_tokens + _ROOM
    stock = StockModel(job.model)
    stack.callback(stock.close)
    engine = stack.enter_context(Engine(stock, n_ctx=n_ctx, n_threads=job.n_threads))
    lora, vector = engine.load_lora(Path(job.loras[0])), np.load(job.vectors[0])
    model = stack.enter_context(opened_model(job.model))
    runtime, backend = stack.enter_context(opened_runtime(model, n_ctx=n_ctx, n_threads=job.n_threads))
    runtime.attach(job.pack)
    return {
        STOCK: partial(_engine_speeds, engine, job, engine.set_lora, None),
        UNMASKED: lambda: (runtime.base(), _our_speeds(backend, job))[1],
        OURS: lambda: (runtime.switch(job.personas[0]), _our_speeds(backend, job))[1],
        LORA: partial(_engine_speeds, engine, job, engine.set_lora, lora),
        VECTOR: partial(_engine_speeds, engine, job, engine.set_vector, vector),
    }


def _engine_speeds(engine: Engine, job: Job, become: Callable[..., None], persona: object) -> tuple[float, float]:
    become(persona)
    evaluate_anew(engine, some_tokens(_ROOM))  # plans the graph, which is not what is measured
    engine.clear()
    tokens = iter(some_tokens(job.n_tokens, seed=1))
    speeds = _speeds(job, engine.evaluate, lambda: engine.evaluate([next(tokens)]))
    become(None)
    return speeds


def _our_speeds(backend: LlamaBackend, job: Job) -> tuple[float, float]:
    evaluate_anew(backend, some_tokens(_ROOM))
    backend.clear()
    tokens, ticket = some_tokens(job.n_prompt), 0
    more = iter(some_tokens(job.n_tokens, seed=1))

    def prefill(_: list[int]) -> None:
        nonlocal ticket
        ticket = backend.evaluate(tokens)

    def token() -> None:
        nonlocal ticket
        tokens.append(next(more))
        ticket = backend.evaluate(tokens, ticket)

    return _speeds(job, prefill, token)


def _speeds(job: Job, prefill: Callable[[list[int]], None], token: Callable[[], None]) -> tuple[float, float]:
    """Tokens per second of the prompt, and of each token after it."""
    started = perf_counter()
    prefill(some_tokens(job.n_prompt))
    evaluated = perf_counter()
    for _ in range(job.n_tokens):
        token()
    ended = perf_counter()
    return job.n_prompt / (evaluated - started), job.n_tokens / (ended - evaluated)
