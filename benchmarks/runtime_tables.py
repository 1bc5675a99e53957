"""What `runtime` measured, as tables: one per question, a row per model and arm, ratios paired within rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.measured import Measured, find, find_all, ratio
from benchmarks.record import Spread, Table
from benchmarks.runtime_memory import PRIVATE, RESIDENT
from benchmarks.runtime_speed import DECODE, PREFILL, STOCK, UNMASKED
from benchmarks.runtime_switch import (
    A_TO_B,
    DENSITY_A_TO_B,
    DENSITY_TO_A,
    DENSITY_UNITS,
    IN_ALL,
    NO_CHANGE,
    OURS,
)

__all__ = ["Artefact", "ModelResult", "runtime_tables"]


@dataclass(frozen=True)
class Artefact:
    """Bytes of what one persona needs on disk, and for masks the entropy bound."""

    name: str
    n_bytes: int
    entropy_bound_bytes: float | None = None


@dataclass(frozen=True)
class ModelResult:
    """Everything measured on one model. `real_switch`: switches with its own pack, where it has one."""

    name: str
    n_bytes: int
    measured: tuple[Measured, ...]
    real_switch: tuple[Measured, ...]
    artefacts: tuple[Artefact, ...]

    def to_json(self) -> dict[str, object]:
        """All of it, for the record."""
        return {
            "name": self.name,
            "model_bytes": self.n_bytes,
            "measured": [each.to_json() for each in self.measured],
            "switch_with_the_real_pack": [each.to_json() for each in self.real_switch],
            "artefacts": [asdict(each) for each in self.artefacts],
        }


def runtime_tables(models: Sequence[ModelResult]) -> tuple[Table, ...]:
    """The tables; those without rows are left out."""
    tables = (
        _table(
            "From one persona to another: the call, and what the change costs in all, which is the call and what the "
            "token after it takes longer than the one before. The last column is a ratio of medians:",
            ("model, way", "call p50 ms", "call p95 ms", "in all, p50 ms", "p25–p75", "in all, times ours"),
            (row for model in models for row in _switch_rows(model)),
        ),
        _table(
            "From the wish to the first token, with a conversation in the cache. Ratios are paired within rounds "
            "(p25–p75):",
            ("model, context, way", "p50 ms", "p25–p75", "times no change", "of ours"),
            (row for model in models for row in _first_token_rows(model)),
        ),
        _table(
            "Tokens per second, and the ratio to stock llama.cpp in the same round (p25–p75):",
            ("model, arm", "decode", "of stock", "prefill", "of stock"),
            (row for model in models for row in _speed_rows(model)),
        ),
        _table(
            "In a process of its own: until it is ready, and its memory. The last column is private memory above "
            "the same runtime's without a persona (stock's for the others), as a share of the model's file:",
            ("model, arm", "load ms", "attach ms", "resident MB", "private MB", "more, of the weights"),
            (row for model in models for row in _memory_rows(model)),
        ),
        _table(
            "Reading a whole pack: positions of all planes decoded.",
            ("model", "ms", "million groups/s"),
            (row for model in models for row in _decode_rows(model)),
        ),
        _table(
            "What a persona takes on disk:",
            ("model, what", "bytes", "entropy bound", "ratio"),
            (row for model in models for row in _artefact_rows(model)),
        ),
        _table(
            "How a switch grows with the model and with the share of groups that a persona gates:",
            ("model, density", "units written", "base to A, p50 ms", "A to B, p50 ms", "A to B, p95 ms", "ns per unit"),
            (row for model in models for row in _growth_rows(model)),
        ),
    )
    return tuple(table for table in tables if table.rows)


def _table(caption: str, headers: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Table:
    return Table(headers, tuple(rows), caption)


def _switch_rows(model: ModelResult) -> Iterator[tuple[str, ...]]:
    ours = find(model.measured, OURS, IN_ALL)
    for change in find_all(model.measured, A_TO_B):
        in_all = find(model.measured, change.arm, IN_ALL)
        call = f"{model.name}, {change.arm}", _ms(change.spread.p50), _ms(change.spread.p95)
        if in_all and ours:
            spread = in_all.spread
            yield *call, _ms(spread.p50), f"{_ms(spread.p25)}–{_ms(spread.p75)}", f"{spread.p50 / ours.spread.p50:.3g}"
        else:
            yield *call, "", "", ""
    for change in find_all(model.real_switch, DENSITY_A_TO_B):
        spread = change.spread
        yield f"{model.name}, {OURS}, its real pack", _ms(spread.p50), _ms(spread.p95), "", "", ""


def _first_token_rows(model: ModelResult) -> Iterator[tuple[str, ...]]:
    lengths = dict.fromkeys(each.what for each in model.measured if each.what.endswith(" tokens"))
    for length in lengths:
        plain, ours = find(model.measured, NO_CHANGE, length), find(model.measured, OURS, length)
        for waited in find_all(model.measured, length):
            spread = waited.spread
            yield (
                f"{model.name}, {length}, {waited.arm}",
                _ms(spread.p50),
                f"{_ms(spread.p25)}–{_ms(spread.p75)}",
                _with_quartiles(ratio(waited, plain)) if plain else "",
                _with_quartiles(ratio(waited, ours)) if ours else "",
            )


def _speed_rows(model: ModelResult) -> Iterator[tuple[str, ...]]:
    stock = {what: find(model.measured, STOCK, what) for what in (DECODE, PREFILL)}
    arms = [decode.arm for decode in find_all(model.measured, DECODE)]
    for arm in sorted(arms, key=lambda name: name != STOCK):
        cells = []
        for what in (DECODE, PREFILL):
            speed, reference = find(model.measured, arm, what), stock[what]
            cells += [f"{speed.spread.p50:.1f}" if speed else ""]
            cells += [_with_quartiles(ratio(speed, reference)) if speed and reference else ""]
        yield f"{model.name}, {arm}", *cells


def _memory_rows(model: ModelResult) -> Iterator[tuple[str, ...]]:
    for load in find_all(model.measured, "load"):
        reference = UNMASKED if load.arm.startswith(OURS) else STOCK
        private, without = find(model.measured, load.arm, PRIVATE), find(model.measured, reference, PRIVATE)
        more = (private.spread.p50 - without.spread.p50) / model.n_bytes if private and without else None
        attach = find(model.measured, load.arm, "attach")
        yield (
            f"{model.name}, {load.arm}",
            _ms(load.spread.p50),
            _ms(attach.spread.p50) if attach else "",
            _megabytes(find(model.measured, load.arm, RESIDENT)),
            _megabytes(private),
            "" if more is None or load.arm == reference else f"{more:.1%}",
        )


def _decode_rows(model: ModelResult) -> Iterator[tuple[str, ...]]:
    time, speed = find(model.measured, OURS, "decode the pack"), find(model.measured, OURS, "decoding")
    if time and speed:
        yield model.name, _ms(time.spread.p50), f"{speed.spread.p50:.0f}"


def _artefact_rows(model: ModelResult) -> Iterator[tuple[str, ...]]:
    for each in model.artefacts:
        bound = each.entropy_bound_bytes
        yield (
            f"{model.name}, {each.name}",
            f"{each.n_bytes:,}",
            "" if not bound else f"{bound:,.0f}",
            "" if not bound else f"{each.n_bytes / bound:.3f}",
        )


def _growth_rows(model: ModelResult) -> Iterator[tuple[str, ...]]:
    for units in find_all(model.measured, DENSITY_UNITS):
        first = find(model.measured, units.arm, DENSITY_TO_A)
        change = find(model.measured, units.arm, DENSITY_A_TO_B)
        if first and change:
            n = units.spread.p50
            yield (
                f"{model.name}, {float(units.arm):.1%}",
                f"{n:,.0f}",
                _ms(first.spread.p50),
                _ms(change.spread.p50),
                _ms(change.spread.p95),
                f"{1e6 * change.spread.p50 / max(n, 1):.1f}",
            )


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _with_quartiles(spread: Spread) -> str:
    p25, p50, p75 = (f"{value:.3g}" for value in (spread.p25, spread.p50, spread.p75))
    return p50 if p25 == p75 else f"{p50} ({p25}–{p75})"


def _megabytes(measured: Measured | None) -> str:
    return "" if measured is None else f"{measured.spread.p50 / 1e6:,.0f}"
