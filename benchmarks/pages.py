"""What kind of memory the weights lie in, and what that does: huge pages, small ones, the mapped file.

The same model is open three times in one process, and the three take turns: each decodes some tokens, which fills the
caches, and then switches from base to one persona, to another and back, with one decoded token between. Small pages are
forced by PR_SET_THP_DISABLE while that copy is loaded, so this runs on Linux alone.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

from benchmarks.measured import Measured, Recorder, find, in_rounds, ratio
from benchmarks.record import Result, Spread, Table
from persona_edge.errors import InputError
from persona_edge.maskpack import MaskPack
from persona_edge.runtime.placement import WeightsMode
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import SamplingOptions

__all__ = ["measure"]

HUGE, SMALL, MAPPED = "heap, huge pages", "heap, small pages", "mapped file"
OPENING, DECODING = "opening", "decoding"
SWITCHES = (("base → INFP", "INFP"), ("INFP → ENTJ", "ENTJ"), ("ENTJ → base", None))
_ARMS: tuple[tuple[str, WeightsMode], ...] = ((HUGE, "heap"), (SMALL, "heap"), (MAPPED, "mmap"))
_PROMPT = "Tell me about your weekend."
_N_CTX = 512
_OPENINGS = 5
_THP_DISABLE = 41  # <linux/prctl.h>


def measure(
    model: Path, pack: MaskPack, *, n_rounds: int = 30, n_tokens: int = 32, n_threads: int = 2, seconds: float = 600.0
) -> Result:
    """Compare the three on `model` with `pack`, which must hold INFP and ENTJ. InputError elsewhere than on Linux."""
    if not sys.platform.startswith("linux"):
        raise InputError("huge pages can be had and refused on Linux alone; this benchmark runs there")
    recorder = Recorder()
    with ExitStack() as stack:
        arms = dict(_opened(model, pack, n_threads, recorder, stack))
        names = list(arms)
        for number in in_rounds(n_rounds, seconds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                _one_round(name, arms[name], n_tokens, recorder if number else Recorder())
    found = recorder.result()
    values = {"model": model.name, "n_threads": n_threads, "n_tokens": n_tokens, "values": [m.to_json() for m in found]}
    return Result(f"Where weights lie: {model.stem}", (_table(found),), values)


def _opened(
    model: Path, pack: MaskPack, n_threads: int, recorder: Recorder, stack: ExitStack
) -> Iterator[tuple[str, PersonaRuntime]]:
    """Each arm's runtime; before that, all are opened and closed in turn, the first time to fill caches."""

    def opened(name: str, weights: WeightsMode) -> PersonaRuntime:
        with _small_pages() if name == SMALL else nullcontext():
            return PersonaRuntime.open(model, pack, n_ctx=_N_CTX, n_threads=n_threads, weights=weights)

    for number in range(_OPENINGS + 1):
        for name, weights in _ARMS:
            started = perf_counter()
            runtime = opened(name, weights)
            elapsed = perf_counter() - started
            runtime.close()
            if number:
                recorder.add(name, OPENING, "ms", 1e3 * elapsed)
    for name, weights in _ARMS:
        yield name, stack.enter_context(opened(name, weights))


def _one_round(name: str, runtime: PersonaRuntime, n_tokens: int, recorder: Recorder) -> None:
    completion = runtime.generate(_PROMPT, SamplingOptions(max_tokens=n_tokens, temperature=0))
    n_after_first = completion.n_tokens - (completion.finish_reason != "stop")
    recorder.add(name, DECODING, "ms", 1e3 * (completion.seconds - completion.seconds_to_first_token) / n_after_first)
    for what, persona in SWITCHES:
        started = perf_counter()
        if persona is None:
            runtime.base()
        else:
            runtime.switch(persona)
        recorder.add(name, what, "ms", 1e3 * (perf_counter() - started))
        runtime.generate(_PROMPT, SamplingOptions(max_tokens=1))


@contextmanager
def _small_pages() -> Iterator[None]:
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    prctl(_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_THP_DISABLE, 0, 0, 0, 0)


def _table(found: list[Measured]) -> Table:
    whats = (OPENING, DECODING, *(what for what, _ in SWITCHES))
    rows = []
    for what, (name, _) in itertools.product(whats, _ARMS):
        mine, small = find(found, name, what), find(found, SMALL, what)
        assert mine is not None  # every arm does everything in every round
        assert small is not None
        spread = mine.spread
        of_small = "1" if name == SMALL else _shown(ratio(mine, small))
        rows.append((f"{what}: {name}", f"{spread.p50:.2f}", f"{spread.p95:.2f}", of_small, str(spread.n)))
    caption = "Opening with a pack, the file in the page cache; decoding per token; switches after a decoded token:"
    return Table(("what", "p50 ms", "p95 ms", "of small pages (p25–p75)", "rounds"), tuple(rows), caption)


def _shown(found: Spread) -> str:
    return f"{found.p50:.2f} ({found.p25:.2f}–{found.p75:.2f})" if found.n > 1 else f"{found.p50:.2f}"
