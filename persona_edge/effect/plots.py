"""The picture of an evaluation: effect against side effect, every arm a point. Drawn without a display, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

from persona_edge.effect.interfaces import CHAT_KL, TOWARD_POLE
from persona_edge.effect.intervals import Estimate, estimate
from persona_edge.effect.record import ArmRecord, Axis, Record
from persona_edge.effect.tables import BASE, engines_of, sides_of
from persona_edge.errors import MissingDependencyError

__all__ = ["effect_plot"]

LEAST_KL: Final = 1e-3  # nats per token: arms below it (prompts, base) stand on the left edge
MARKERS: Final = {1: "^", -1: "v"}


def effect_plot(record: Record) -> str | None:
    """SVG text: a panel per engine and axis, chat KL (log) against the share toward the pole, with 95 % intervals.

    None when nothing has both. Raises MissingDependencyError without matplotlib.
    """
    panels = [
        (engine, axis, points)
        for engine in engines_of(record)
        for axis in record.axes
        if (points := _points(record, engine, axis))
    ]
    if not panels:
        return None
    pyplot = _pyplot()
    # No metadata and fixed ids: the same record always gives the same bytes.
    with pyplot.rc_context({"svg.hashsalt": "persona-edge", "svg.fonttype": "none", "font.size": 9}):
        n_columns = min(2, len(panels))
        n_rows = -(-len(panels) // n_columns)
        size = (5.0 * n_columns + 1.6, 4.0 * n_rows)
        figure, axes = pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
        colours = _colours(record)
        for place, panel in zip(axes.flat, panels, strict=False):
            _draw(place, *panel, colours)
        for place in axes.flat[len(panels) :]:
            place.set_visible(False)
        handles = [pyplot.Line2D([], [], color=c, marker="o", linestyle="", label=n) for n, c in colours.items()]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


Point = tuple[ArmRecord, int, Estimate, Estimate]


def _points(record: Record, engine: str, axis: Axis) -> list[Point]:
    """(arm, toward, chat KL, share toward the pole) of every arm that has both; base once per pole."""
    sides = [side for side in sides_of(record, engine) if side.axis == axis]
    found = []
    for arm in (arm for arm in record.arms if arm.engine == engine):
        towards = [side.toward for side in sides if arm.pole in (None, side.pole)]
        for toward in dict.fromkeys(towards):
            cost, effect = _estimate(arm, None, CHAT_KL, 0), _estimate(arm, axis.name, TOWARD_POLE, toward)
            if cost is not None and effect is not None:
                found.append((arm, toward, cost, effect))
    return found


def _estimate(arm: ArmRecord, axis: str | None, measure: str, toward: int) -> Estimate | None:
    for outcome in arm.outcomes:
        items = outcome.measure(measure) if outcome.axis == axis else None
        if items is not None:
            return estimate(items, toward=toward)
    return None


def _colours(record: Record) -> dict[str, Any]:
    names = list(dict.fromkeys(arm.name for arm in record.arms if arm.error is None))
    palette = _pyplot().get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return {name: "black" if name == BASE else palette[i % len(palette)] for i, name in enumerate(names)}


def _draw(place: Any, engine: str, axis: Axis, points: Sequence[Point], colours: dict[str, Any]) -> None:
    for arm, toward, cost, effect in points:
        x, low, high = (max(value, LEAST_KL) for value in (cost.mean, cost.low, cost.high))
        place.errorbar(
            x,
            100 * effect.mean,
            xerr=[[x - min(low, x)], [max(high, x) - x]],
            yerr=[[100 * max(0.0, effect.mean - effect.low)], [100 * max(0.0, effect.high - effect.mean)]],
            color=colours[arm.name],
            marker=MARKERS[toward],
            markersize=6,
            elinewidth=0.5,
        )
    place.set_xscale("log")
    place.set_ylim(0, 102)
    place.axhline(50, color="0.8", linewidth=0.8, zorder=0)
    place.set_xlabel(f"chat KL, nats per token (up to {LEAST_KL:g} at the left edge)")
    place.set_ylabel("contrasts won by the pole, %")
    place.set_title(f"{axis.name} on {engine}: ▲ {axis.positive}, ▼ {axis.negative}", fontsize=10)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "plots need matplotlib, not installed here; run: pip install 'persona-edge[eval]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
