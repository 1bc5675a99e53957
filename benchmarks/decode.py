"""Decoding speed beside stock llama-cpp-python: a mask must cost nothing per token.

Three arms take turns, in another order every round: `llama_cpp.Llama` as it comes, our runtime without a mask, and our
runtime with one. All read the same file with the same number of threads, decode greedily after the same prompt, and
are timed from the first token to the last, so that evaluating the prompt does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.record import Result, Spread, Table
from persona_edge.errors import InputError
from persona_edge.maskpack import MaskPack
from persona_edge.runtime.session import PersonaRuntime, SamplingOptions

__all__ = ["measure"]

_PROMPT = "The old harbour town had changed a great deal since the railway came. In the early years,"
_N_CTX = 1024
_STOCK, _UNMASKED = "stock llama-cpp-python", "persona-edge, no mask"


@dataclass(frozen=True)
class _Arm:
    """Tokens per second, and their ratio to stock's in the same round."""

    name: str
    tokens_per_second: Spread
    of_stock: Spread


def measure(
    model: Path,
    pack: MaskPack,
    *,
    persona: str = "INFP",
    n_repeats: int = 10,
    n_tokens: int = 64,
    n_threads: int = 2,
) -> Result:
    """Time `n_repeats` rounds of `n_tokens` tokens per arm. InputError when a text ends before its second token."""
    masked = f"persona-edge, {persona}"
    with PersonaRuntime.open(model, pack, n_ctx=_N_CTX, n_threads=n_threads) as runtime:
        stock = _open_stock(model, n_threads)
        arms: dict[str, Callable[[], float]] = {
            _STOCK: lambda: _stock_speed(stock, n_tokens),
            _UNMASKED: lambda: _our_speed(runtime, None, n_tokens),
            masked: lambda: _our_speed(runtime, persona, n_tokens),
        }
        speeds = _take_turns(arms, n_repeats)
        stock.close()
    found = [_Arm(name, Spread.of(speeds[name]), _ratio(speeds[name], speeds[_STOCK])) for name in arms]
    medians = {arm.name: arm.tokens_per_second.p50 for arm in found}
    ratios = {
        "unmasked / stock": medians[_UNMASKED] / medians[_STOCK],
        "masked / stock": medians[masked] / medians[_STOCK],
        "masked / unmasked": medians[masked] / medians[_UNMASKED],
    }
    values = {
        "model": model.name,
        "n_threads": n_threads,
        "n_tokens": n_tokens,
        "arms": [asdict(arm) for arm in found],
        "ratios_of_medians": ratios,
    }
    note = "Ratios of the medians: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()) + "."
    return Result(f"Decoding speed: {model.stem}", (_table(found, n_tokens, n_threads),), values, (note,))


def _open_stock(model: Path, n_threads: int) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(model), n_ctx=_N_CTX, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)


def _take_turns(arms: dict[str, Callable[[], float]], n_repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each arm, round by round, after one round that does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(n_repeats + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            speed = arms[name]()
            if number:
                speeds[name].append(speed)
    return speeds


def _stock_speed(stock: Any, n_tokens: int) -> float:
    """`Llama.generate` goes on past the end of the text, so it always yields as many tokens as are wanted."""
    tokens = stock.generate(stock.tokenize(_PROMPT.encode()), temp=0)
    next(tokens)
    started = perf_counter()
    for _ in range(n_tokens - 1):
        next(tokens)
    elapsed = perf_counter() - started
    tokens.close()
    return (n_tokens - 1) / elapsed


def _our_speed(runtime: PersonaRuntime, persona: str | None, n_tokens: int) -> float:
    if persona is None:
        runtime.base()
    else:
        runtime.switch(persona)
    completion = runtime.generate(_PROMPT, SamplingOptions(max_tokens=n_tokens, temperature=0))
    # The token that ends a text was decoded too, though it is not part of it.
    n_after_first = completion.n_tokens - (completion.finish_reason != "stop")
    if n_after_first < 1:
        raise InputError(f"{persona or 'the unmodified model'} ends the text at once; there is nothing to time")
    return n_after_first / (completion.seconds - completion.seconds_to_first_token)


def _ratio(speeds: list[float], stock: list[float]) -> Spread:
    return Spread.of([ours / theirs for ours, theirs in zip(speeds, stock, strict=True)])


def _table(found: list[_Arm], n_tokens: int, n_threads: int) -> Table:
    rows = tuple(
        (
            arm.name,
            f"{arm.tokens_per_second.p50:.1f}",
            f"{arm.tokens_per_second.p25:.1f}–{arm.tokens_per_second.p75:.1f}",
            f"{arm.of_stock.p50:.3f}",
            f"{arm.of_stock.p25:.3f}–{arm.of_stock.p75:.3f}",
        )
        for arm in found
    )
    headers = ("arm", "tokens/s", "p25–p75", "of stock, same round", "p25–p75")
    n_rounds = found[0].tokens_per_second.n
    return Table(headers, rows, f"{n_rounds} interleaved rounds of {n_tokens} tokens, {n_threads} threads, medians:")
