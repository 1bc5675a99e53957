"""The picture of `runtime`: what grows with the model's size, and with the share of groups that a persona gates."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

from benchmarks.measured import find, find_all
from benchmarks.runtime_first_token import KEEP, SNAPSHOT, SYSTEM_PROMPT
from benchmarks.runtime_switch import A_TO_B, DENSITY_A_TO_B, DENSITY_UNITS, LORA, NO_CHANGE, OURS, RELOAD, VECTOR
from benchmarks.runtime_tables import ModelResult
from persona_edge.errors import MissingDependencyError

__all__ = ["size_and_density_plot"]

_COLOURS: Final = {
    OURS: "#c1272d",
    SNAPSHOT: "#e8743b",
    KEEP: "#f2b134",
    LORA: "#1f4e9e",
    VECTOR: "#2a9d8f",
    RELOAD: "#555555",
    SYSTEM_PROMPT: "#8e5ea2",
    NO_CHANGE: "#aaaaaa",
}


def size_and_density_plot(models: Sequence[ModelResult]) -> str:
    """SVG text of three panels: the change by model size, the first token by model size, the switch by density.

    Raises MissingDependencyError without matplotlib.
    """
    try:
        import matplotlib as mpl

        mpl.use("svg")
        from matplotlib import lines, pyplot
    except ImportError:
        raise MissingDependencyError("plots need matplotlib; pip install 'persona-edge[eval]'") from None
    lengths = [each.what for model in models for each in model.measured if each.what.endswith(" tokens")]
    length = next(iter(lengths), "512 tokens")
    # No metadata and fixed ids: the same values always give the same bytes.
    with pyplot.rc_context({"svg.hashsalt": "persona-edge", "svg.fonttype": "none", "font.size": 9}):
        figure, (change, token, density) = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
        _by_size(change, models, A_TO_B, "the change itself, ms")
        _by_size(token, models, length, f"to the first token, ms ({length} of context)")
        _by_density(density, models)
        handles = [lines.Line2D([], [], color=c, marker="o", label=arm) for arm, c in _COLOURS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _by_size(panel: Any, models: Sequence[ModelResult], what: str, label: str) -> None:
    ordered = sorted(models, key=lambda model: model.n_bytes)
    for arm, colour in _COLOURS.items():
        found = [(model.n_bytes / 1e9, each.spread) for model in ordered if (each := find(model.measured, arm, what))]
        if found:
            middle = [spread.p50 for _, spread in found]
            below = [spread.p50 - spread.p25 for _, spread in found]
            above = [spread.p75 - spread.p50 for _, spread in found]
            panel.errorbar([x for x, _ in found], middle, yerr=(below, above), color=colour, marker="o", capsize=2)
    for model in ordered:
        panel.annotate(model.name, (model.n_bytes / 1e9, 0.01), xycoords=("data", "axes fraction"), rotation=90,
                       ha="right", va="bottom", color="#777777", fontsize=7)  # fmt: skip
    panel.set(xscale="log", yscale="log", xlabel="model file, GB", ylabel=label)


def _by_density(panel: Any, models: Sequence[ModelResult]) -> None:
    for model, style in zip(models, ("o-", "s--", "^-.", "D:", "v-", "x--"), strict=False):
        units = find_all(model.measured, DENSITY_UNITS)
        found = [(float(n.arm), find(model.measured, n.arm, DENSITY_A_TO_B)) for n in units]
        points = [(100 * density, each.spread.p50) for density, each in found if each]
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            panel.plot(xs, ys, style, color=_COLOURS[OURS], label=model.name)
    panel.set(xscale="log", yscale="log", xlabel="groups that a persona gates, %", ylabel="switch from A to B, ms")
    if panel.lines:
        panel.legend(frameon=False, fontsize=7)
