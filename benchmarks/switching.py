"""How long a change of persona takes: the weights alone, to the first token, and beside loading the model again.

The switch is timed around the whole call, as a user's program waits for it: finding what differs, writing it, and
emptying the KV cache. The last grows with the context that the session has room for, so there are two sessions: one
with chat's default, and one so small that what remains is the weights. To the first token there are three ways on from
a conversation of some length, each with the same next message: the conversation goes on (its keys and values are kept),
the same prompt from nothing, and after a switch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.record import Result, Spread, Table
from persona_edge.maskpack import MaskPack
from persona_edge.persona_sets import neutral_texts
from persona_edge.runtime.session import PersonaRuntime, SamplingOptions, SwitchReport

__all__ = ["measure"]

_STEPS: tuple[tuple[str, str | None], ...] = (("base → INFP", "INFP"), ("INFP → ENTJ", "ENTJ"), ("ENTJ → base", None))
_WAYS = ("conversation goes on", "from nothing", "after a switch")
_WARM_UP = 3
_N_CTX = 4096  # chat's default
_SMALL_N_CTX = 256
_NEXT_MESSAGE = " What would you say about that to someone who has never heard of it?"
_ONE_TOKEN = SamplingOptions(max_tokens=1, temperature=0)


@dataclass(frozen=True)
class _Step:
    """One change of persona: its time in milliseconds, and what it wrote."""

    name: str
    n_ctx: int
    milliseconds: Spread
    n_units: int
    n_bytes: int


@dataclass(frozen=True)
class _FirstToken:
    """Milliseconds to the first token of a prompt of `n_tokens`."""

    way: str
    n_tokens: int
    milliseconds: Spread


@dataclass(frozen=True)
class _PoleSize:
    """What a pole takes in the pack, beside the entropy of its masks."""

    pole: str
    n_units: int
    n_bytes: int
    entropy_bound_bytes: float


def measure(
    model: Path,
    pack: MaskPack,
    *,
    n_rounds: int = 200,
    n_prompt_rounds: int = 5,
    lengths: tuple[int, ...] = (100, 500),
    n_threads: int | None = None,
) -> Result:
    """Time `model` with `pack`, which must hold INFP and ENTJ."""
    reload = Spread.of(list(_reload_times(model, n_prompt_rounds, n_threads)))
    with PersonaRuntime.open(model, pack, n_ctx=_SMALL_N_CTX, n_threads=n_threads) as runtime:
        steps = _time_steps(runtime, n_rounds)
    with PersonaRuntime.open(model, pack, n_ctx=_N_CTX, n_threads=n_threads) as runtime:
        steps += _time_steps(runtime, n_rounds)
        first_tokens = [row for n in lengths for row in _time_first_tokens(runtime, n, n_prompt_rounds)]
    sizes = _pole_sizes(pack)
    values = {
        "model": model.name,
        "n_threads": n_threads,
        "steps": [asdict(step) for step in steps],
        "first_token": [asdict(row) for row in first_tokens],
        "reload_milliseconds": asdict(reload),
        "poles": [asdict(size) for size in sizes],
        "pack_bytes": pack.n_bytes,
    }
    slowest = max(step.milliseconds.p50 for step in steps)
    notes = (
        f"Loading the model file again takes {reload.p50:.0f} ms (median of {reload.n}, file in the page cache): "
        f"{reload.p50 / slowest:.0f} times the slowest switch.",
        f"The pack has {pack.n_bytes:,} bytes in all, for {len(pack.personas)} personas.",
    )
    tables = (_step_table(steps), _first_token_table(first_tokens), _size_table(sizes))
    return Result(f"Switching personas: {model.stem}", tables, values, notes)


def _reload_times(model: Path, n_rounds: int, n_threads: int | None) -> Iterator[float]:
    """Milliseconds to load the model; the first load, which may have to read the disk, is left out."""
    for number in range(n_rounds + 1):
        started = perf_counter()
        runtime = PersonaRuntime.open(model, n_ctx=_N_CTX, n_threads=n_threads)
        elapsed = perf_counter() - started
        runtime.close()
        if number:
            yield elapsed * 1e3


def _time_steps(runtime: PersonaRuntime, n_rounds: int) -> list[_Step]:
    times: dict[str, list[float]] = {name: [] for name, _ in _STEPS}
    reports: dict[str, SwitchReport] = {}
    for number in range(_WARM_UP + n_rounds):
        for name, persona in _STEPS:
            started = perf_counter()
            reports[name] = _become(runtime, persona)
            elapsed = perf_counter() - started
            if number >= _WARM_UP:
                times[name].append(elapsed * 1e3)
    return [
        _Step(name, runtime.n_ctx, Spread.of(times[name]), report.n_units_written, report.n_bytes_written)
        for name, report in reports.items()
    ]


def _time_first_tokens(runtime: PersonaRuntime, n_tokens: int, n_rounds: int) -> list[_FirstToken]:
    """All three ways in turn, round by round, so that a busy moment of the machine meets them alike."""
    context = _text_of(runtime, n_tokens)
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    personas = itertools.cycle(("INFP", "ENTJ"))
    n_prompt_tokens = 0
    for number in range(n_rounds + 1):
        for way in _WAYS:
            runtime.generate(context, _ONE_TOKEN)
            seconds = 0.0
            if way == "from nothing":
                runtime.logits(runtime.tokenize("a"))  # leaves the KV cache empty
            elif way == "after a switch":
                started = perf_counter()
                runtime.switch(next(personas))
                seconds = perf_counter() - started
            completion = runtime.generate(context + _NEXT_MESSAGE, _ONE_TOKEN)
            n_prompt_tokens = completion.n_prompt_tokens
            if number:
                times[way].append((seconds + completion.seconds_to_first_token) * 1e3)
    runtime.base()
    return [_FirstToken(way, n_prompt_tokens, Spread.of(times[way])) for way in _WAYS]


def _become(runtime: PersonaRuntime, persona: str | None) -> SwitchReport:
    return runtime.base() if persona is None else runtime.switch(persona)


def _text_of(runtime: PersonaRuntime, n_tokens: int) -> str:
    """Neutral text of whole words, of `n_tokens` tokens or barely more."""
    words = " ".join(neutral_texts()).split()
    for n_words in range(n_tokens // 2, len(words)):
        text = " ".join(words[:n_words])
        if len(runtime.tokenize(text)) >= n_tokens:
            return text
    return " ".join(words)


def _pole_sizes(pack: MaskPack) -> list[_PoleSize]:
    planes = pack.summary().planes
    return [
        _PoleSize(
            pole,
            sum(plane.n_positions for plane in planes if plane.pole == pole),
            sum(plane.n_bytes for plane in planes if plane.pole == pole),
            sum(plane.entropy_bound_bytes for plane in planes if plane.pole == pole),
        )
        for pole in pack.pole_names
    ]


def _step_table(steps: list[_Step]) -> Table:
    rows = tuple(
        (
            f"{step.name}, context of {step.n_ctx}",
            f"{step.milliseconds.p50:.2f}",
            f"{step.milliseconds.p95:.2f}",
            f"{step.n_units:,}",
            f"{step.n_bytes:,}",
        )
        for step in steps
    )
    headers = ("switch", "p50 ms", "p95 ms", "units written", "bytes written")
    return Table(
        headers,
        rows,
        f"The switch alone, {steps[0].milliseconds.n} interleaved rounds; in a small context nearly the weights alone:",
    )


def _first_token_table(found: list[_FirstToken]) -> Table:
    rows = tuple(
        (f"{row.n_tokens} tokens, {row.way}", f"{row.milliseconds.p50:.0f}", f"{row.milliseconds.p95:.0f}")
        for row in found
    )
    caption = f"Time to the first token, {found[0].milliseconds.n} rounds; a switch's own time is included:"
    return Table(("prompt", "p50 ms", "p95 ms"), rows, caption)


def _size_table(sizes: list[_PoleSize]) -> Table:
    rows = tuple(
        (
            size.pole,
            f"{size.n_units:,}",
            f"{size.n_bytes:,}",
            f"{size.entropy_bound_bytes:,.0f}",
            f"{size.n_bytes / size.entropy_bound_bytes:.3f}",
        )
        for size in sizes
        if size.n_units
    )
    return Table(("pole", "units", "bytes", "entropy bound", "ratio"), rows, "What each pole takes in the pack:")
