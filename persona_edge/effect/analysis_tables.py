"""The analysis of a pack's masks (analysis.py) as tables of a report, from the plain values that a record keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from persona_edge.effect.tables import Table

__all__ = ["analysis_tables"]

N_DEPTHS = 6


def analysis_tables(analysis: Mapping[str, Any]) -> list[Table]:
    """Where the poles of an axis differ, what they share, where their units lie, what becomes of hidden states.

    Nothing for an empty analysis.
    """
    if not analysis:
        return []
    poles = list(dict.fromkeys(share["pole"] for share in analysis["budgets"]))
    return [
        _differences(analysis["differences"]),
        _overlaps(analysis["overlaps"], poles),
        *_budgets(analysis["budgets"], poles),
        _similarities(analysis["similarities"], poles),
    ]


def _differences(found: Sequence[Mapping[str, Any]]) -> Table:
    headers = ("axis", "poles", "all weights", "attention", "feed-forward", "largest block")
    rows = []
    for axis in found:
        blocks = list(axis["by_block"])
        most = max(range(len(blocks)), key=blocks.__getitem__, default=0)
        largest = f"{_percent(blocks[most], 2)} (block {most})" if blocks else "-"
        shares = (_percent(axis[part], 2) for part in ("average", "attention", "feed_forward"))
        rows.append((axis["axis"], " / ".join(axis["poles"]), *shares, largest))
    return Table("Share of weights on which the masks of an axis's two poles differ", headers, tuple(rows))


def _overlaps(found: Iterable[Mapping[str, Any]], poles: Sequence[str]) -> Table:
    shared = {tuple(pair["personas"]): pair for pair in found}
    rows = []
    for row in poles:
        cells = [shared.get((row, column)) or shared.get((column, row)) for column in poles]
        rows.append((row, *("-" if pair is None else _percent(pair["jaccard"], 1) for pair in cells)))
    caption = "Units that two poles share, of those that either gates (Jaccard; random masks would share next to none)"
    return Table(caption, ("pole", *poles), tuple(rows))


def _budgets(found: Sequence[Mapping[str, Any]], poles: Sequence[str]) -> list[Table]:
    """Shares of each pole's units by kind of tensor, and by depth in N_DEPTHS parts."""
    of = {(share["pole"], share["part"]): float(share["of_units"]) for share in found}
    parts = list(dict.fromkeys(share["part"] for share in found))
    blocks = [part for part in parts if part.startswith("block ")]
    kinds = [part for part in parts if part not in blocks]
    by_kind = tuple((pole, *(_percent(of[pole, kind], 0) for kind in kinds)) for pole in poles)
    tables = [Table("Where a pole's units lie, by kind of tensor", ("pole", *kinds), by_kind)]
    if blocks:
        size = -(-len(blocks) // N_DEPTHS)
        depths = [blocks[i : i + size] for i in range(0, len(blocks), size)]
        names = [f"{depth[0]} to {depth[-1].removeprefix('block ')}" for depth in depths]
        by_depth = tuple((pole, *(_percent(sum(of[pole, b] for b in depth), 0) for depth in depths)) for pole in poles)
        tables.append(Table("The same by depth", ("pole", *names), by_depth))
    return tables


def _similarities(found: Sequence[Mapping[str, Any]], poles: Sequence[str]) -> Table:
    """Four depths of every pair of poles, or of a pole and base, that was compared; compositions are in the JSON."""
    found = [pair for pair in found if {*pair["personas"]} <= {"base", *poles}]
    depth = len(found[0]["cosines"]) if found else 0
    at = sorted({0, depth // 3, 2 * depth // 3, depth - 1} - {-1})
    rows = tuple((" and ".join(pair["personas"]), *(f"{pair['cosines'][i]:.4f}" for i in at)) for pair in found)
    caption = "Cosine of hidden states at the last token of the prompt, after a block"
    return Table(caption, ("personas", *(f"block {i}" for i in at)), rows)


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"
