"""What a mask pack holds, as JSON types and as tables for people.

A pack may come from any tool: only its planes are certain. The quality report is free-form, so whatever of it is
missing or has another shape than `persona_edge.build` gives it is left out of the tables, and is as it is in the JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from persona_edge.maskpack import MaskPack, PackSummary
from persona_edge.masks import Plane
from persona_edge.pack_header import units_per_tensor
from persona_edge.pack_picture import gated_shares
from persona_edge.sketch import SketchResult
from persona_edge.terminal_text import bytes_text, display_width, printable

__all__ = ["describe", "json_text", "pack_lines", "value_at"]

_LONGEST_VALUE = 60  # characters of a report's value that a line shows


def describe(pack: MaskPack, *, tensors: bool = False, verified: SketchResult | None = None) -> dict[str, Any]:
    """Everything as JSON types: sizes in bytes, shares 0 to 1, gates as factors.

    `tensors` adds for each pole the share of each tensor's weights that it gates. Raises PackPlaneError.
    """
    summary = pack.summary()
    return {
        "n_bytes": pack.n_bytes,
        "n_header_bytes": summary.n_header_bytes,
        "n_sketch_bytes": summary.n_sketch_bytes,
        "architecture": pack.identity.architecture,
        "n_tensors": len(pack.identity.tensors),
        "personas": {name: list(poles) for name, poles in pack.personas.items()},
        "strengths": {name: list(strengths) for name, strengths in pack.strengths.items()},
        "poles": [_pole(pack, name, summary, tensors) for name in pack.pole_names],
        "sections": [
            {"name": s.name, "kind": s.kind, "offset": s.offset, "n_bytes": s.n_bytes, "sha256": s.sha256}
            for s in pack.sections()
        ],
        "report": dict(pack.report),
        "verified": None if verified is None else _verified(verified),
    }


def pack_lines(pack: MaskPack, source: str, *, width: int = 80) -> list[str]:
    """The same for people, without the layers; lists are wrapped to `width` columns."""
    summary = pack.summary()
    n_weights = sum(units_per_tensor(pack.identity.tensors, 1))
    lines = [
        f"{printable(source)}  {bytes_text(pack.n_bytes)}",
        f"for a {printable(pack.identity.architecture)} model with {len(pack.identity.tensors)} maskable tensors, "
        f"{n_weights:,} weights",
        "",
        *_persona_lines(pack, width),
        "",
        *_plane_lines(pack, summary),
    ]
    for part in (_quality_lines(pack), _report_lines(pack.report), _size_lines(pack, summary)):
        lines += ["", *part] if part else []
    return lines


def json_text(value: Mapping[str, Any]) -> str:
    """`value` as JSON in ASCII, indented unless a report is nested too deeply for that."""
    try:
        return json.dumps(value, indent=2)
    except RecursionError:
        return json.dumps(value)


def _pole(pack: MaskPack, name: str, summary: PackSummary, tensors: bool) -> dict[str, Any]:
    pole = pack.pole(name)
    sizes = [plane for plane in summary.planes if plane.pole == name]
    planes = [
        {
            "gate": plane.gate,
            "granularity": plane.granularity,
            "n_units": plane.n_positions,
            "share_of_units": _share(pack, plane),
            "n_bytes": size.n_bytes,
            "entropy_bound_bytes": size.entropy_bound_bytes,
        }
        for plane, size in zip(pole.planes, sizes, strict=True)
    ]
    found: dict[str, Any] = {"name": name, "axis": pole.axis, "planes": planes}
    if tensors:
        found["shares_of_weights"] = gated_shares(pack.identity.tensors, [pole])
    return found


def _verified(result: SketchResult) -> dict[str, Any]:
    return {
        "n_samples": result.n_samples,
        "n_agreeing": result.n_agreeing,
        "worst_tensor": result.worst_tensor,
        "worst_agreement": result.worst_agreement,
    }


def _share(pack: MaskPack, plane: Plane) -> float:
    """The share of all units of the plane's granularity that it gates."""
    return plane.n_positions / sum(units_per_tensor(pack.identity.tensors, plane.granularity))


def _persona_lines(pack: MaskPack, width: int) -> list[str]:
    composed = [name for name, poles in pack.personas.items() if poles != (name,)]
    example = f", composed like {composed[0]} = {_sum_text(pack, composed[0])}" if composed else ""
    return [f"{len(pack.personas)} personas{example}", *_filled(pack.personas, width)]


def _sum_text(pack: MaskPack, persona: str) -> str:
    """The poles of a persona with the strengths that are not 1: `E + 0.8 N + T + J`."""
    poles = pack.personas[persona]
    strengths = pack.strengths.get(persona, (1.0,) * len(poles))
    return " + ".join(p if s == 1 else f"{s:g} {p}" for p, s in zip(poles, strengths, strict=True))


def _plane_lines(pack: MaskPack, summary: PackSummary) -> list[str]:
    rows = [("pole", "axis", "gate", "of", "units", "share", "bytes", "bound")]
    for size in summary.planes:
        pole = pack.pole(size.pole)
        plane = pole.planes[size.index]
        rows.append(
            (
                size.pole,
                pole.axis,
                f"{plane.gate:g}",
                "groups" if plane.granularity > 1 else "weights",
                f"{plane.n_positions:,}",
                f"{_share(pack, plane):.2%}",
                bytes_text(size.n_bytes),
                bytes_text(size.entropy_bound_bytes),
            )
        )
    return _table(rows)


def _quality_lines(pack: MaskPack) -> list[str]:
    """What the report says of each pole: its effect on held-out contrasts, and what it costs."""
    rows = []
    for name in pack.pole_names:
        base, masked = _toward(pack.report, name, "held_out_base"), _toward(pack.report, name, "held_out")
        cells = (
            f"{base:.0%} → {masked:.0%}" if base is not None and masked is not None else "",
            _shown(_number(pack.report, "poles", name, "held_out", "n_contrasts"), ".0f"),
            _shown(_number(pack.report, "poles", name, "drift", "chat_kl"), ".3f"),
            _shown(_number(pack.report, "poles", name, "drift", "perplexity_ratio"), ".3f"),
            _shown(_number(pack.report, "poles", name, "budget_nats"), ".2g"),
        )
        if any(cells):
            rows.append((name, *cells))
    lines = _table([("pole", "preferred", "of", "chat KL", "perplexity x", "budget"), *rows]) if rows else []
    drifts = [(_number(pack.report, "compositions", name, "chat_kl"), name) for name in pack.personas]
    known = sorted((kl, name) for kl, name in drifts if kl is not None)
    if known:
        lines.append(f"composed: chat KL {known[0][0]:.3f} ({known[0][1]}) to {known[-1][0]:.3f} ({known[-1][1]})")
    return lines


def _report_lines(report: Mapping[str, Any]) -> list[str]:
    """The rest of the report, one line per key; nested values are cut to what fits on a line."""
    settings = report.get("settings")
    rows = [(key, value) for key, value in report.items() if key not in ("settings", "poles", "compositions")]
    rows += list(settings.items()) if isinstance(settings, dict) else []
    told = [(key, value) for key, value in rows if value not in (None, [], {})]
    return _table([(_cut(key), _cut(value)) for key, value in told], right=False)


def _size_lines(pack: MaskPack, summary: PackSummary) -> list[str]:
    planes = sum(plane.n_bytes for plane in summary.planes)
    bound = sum(plane.entropy_bound_bytes for plane in summary.planes)
    front = pack.n_bytes - summary.n_sketch_bytes - planes
    return _table(
        [
            ("header", bytes_text(front)),
            ("sign sketch", bytes_text(summary.n_sketch_bytes)),
            (f"{len(summary.planes)} planes", f"{bytes_text(planes)} (entropy bound {bytes_text(bound)})"),
        ],
        right=False,
    )


def _toward(report: Mapping[str, Any], pole: str, which: str) -> float | None:
    """Share of held-out contrasts whose answer in this pole's manner is the likelier; the report counts the axis's."""
    share, poles = _number(report, "poles", pole, which, "share_mean"), report.get("poles")
    entry = poles.get(pole) if isinstance(poles, dict) else None
    side = entry.get("side") if isinstance(entry, dict) else None
    if share is None or side not in ("positive", "negative"):
        return None
    return share if side == "positive" else 1 - share


def value_at(report: object, *keys: str) -> object:
    """What a report, of any shape, has at this path of keys; None when it has nothing there."""
    for key in keys:
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def _number(report: object, *keys: str) -> float | None:
    """The finite number at this path of keys; None when it is not there or something else is."""
    value = value_at(report, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(number: float | None, spelled: str) -> str:
    return "" if number is None else format(number, spelled)


def _cut(value: object) -> str:
    """`value` on one line: a string as it is, anything else as JSON."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        text = "(nested too deeply to show)"
    text = " ".join(printable(text).split())
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _filled(words: Iterable[str], width: int) -> list[str]:
    lines = [" "]
    for word in words:
        if len(lines[-1]) > 1 and display_width(lines[-1]) + 1 + display_width(word) > width:
            lines.append(" ")
        lines[-1] += f" {word}"
    return lines


def _table(rows: Sequence[Sequence[str]], *, right: bool = True) -> list[str]:
    """Aligned columns two spaces apart: the first to the left, the others to the right or also to the left."""
    if not rows:
        return []
    widths = [max(display_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        gaps = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [gap + cell if right and i else cell + gap for i, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
