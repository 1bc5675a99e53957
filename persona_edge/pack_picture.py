"""Where in a model a mask lies: a grid with one row per block and one column per kind of tensor.

Each cell is the share of the tensor's weights that a persona gates, drawn as a bar or written as a number. Drawing
needs no colour; where the terminal's encoding has no block characters, bars are made of `#`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persona_edge.errors import InputError, PersonaNotFoundError
from persona_edge.maskpack import MaskPack
from persona_edge.masks import GROUP_SIZE, Pole, Positions, TensorShape, match_name
from persona_edge.terminal_text import display_width, printable

__all__ = ["LayerGrid", "draw_bars", "gated_shares", "layer_grid", "picture_lines", "write_numbers"]

_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)
_USUAL_ORDER = ("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_SHORTER = {"attn_output": "attn_out"}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_CELLS = 1 << 18
_LEAST_CELL = 7  # columns; fewer would not tell bars apart


@dataclass(frozen=True)
class LayerGrid:
    """Shares by block and kind of tensor, 0 to 1. `others` are the gated tensors outside of blocks, by name.

    A cell that is missing is a tensor that the model does not have.
    """

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[int, str], float]
    totals: Mapping[str, float]
    others: Mapping[str, float]

    @property
    def largest(self) -> float:
        """The largest share of any tensor; 0 when nothing is gated."""
        return max([*self.cells.values(), *self.others.values()], default=0.0)


def gated_shares(tensors: Iterable[TensorShape], poles: Iterable[Pole]) -> dict[str, float]:
    """For each tensor the share of its weights, 0 to 1, that at least one plane of `poles` gates."""
    gated: dict[tuple[str, int], list[Positions]] = {}
    for plane in (plane for pole in poles for plane in pole.planes):
        for name, positions in plane.positions.items():
            gated.setdefault((name, plane.granularity), []).append(positions)
    return {
        tensor.name: _share(tensor, gated.get((tensor.name, GROUP_SIZE), []), gated.get((tensor.name, 1), []))
        for tensor in tensors
    }


def layer_grid(shares: Mapping[str, float], tensors: Sequence[TensorShape]) -> LayerGrid:
    """Sort `shares`, by tensor name, into blocks and kinds; names other than `blk.<number>.<kind>` go to `others`."""
    cells: dict[tuple[int, str], float] = {}
    others: dict[str, float] = {}
    sizes: dict[str, list[tuple[float, int]]] = {}
    for tensor in tensors:
        match = _BLOCK_TENSOR.fullmatch(tensor.name)
        if match is None:
            if shares[tensor.name]:
                others[tensor.name] = shares[tensor.name]
            continue
        kind = match[2].removesuffix(".weight")
        cells[int(match[1]), kind] = shares[tensor.name]
        sizes.setdefault(kind, []).append((shares[tensor.name], tensor.n_rows * tensor.n_columns))
    totals = {kind: sum(share * n for share, n in of) / sum(n for _, n in of) for kind, of in sizes.items()}
    blocks = sorted({block for block, _ in cells})
    if len(blocks) * len(sizes) > _MOST_CELLS:  # no model is like that: a grid would be nearly all holes
        return LayerGrid((), (), {}, {}, {name: share for name, share in shares.items() if share})
    kinds = sorted(sizes, key=lambda kind: _USUAL_ORDER.index(kind) if kind in _USUAL_ORDER else len(_USUAL_ORDER))
    return LayerGrid(tuple(blocks), tuple(kinds), cells, totals, others)


def draw_bars(grid: LayerGrid, *, width: int = 80, unicode: bool = True) -> list[str]:
    """The grid as bars in at most `width` columns; a full bar is the largest share, a dot is a tensor without gates."""
    largest = grid.largest

    def bar(share: float, room: int) -> str:
        if share <= 0 or not largest:
            return "·" if unicode else "."
        if not unicode:
            return "#" * max(1, round(share / largest * room))
        eighths = max(1, round(share / largest * room * 8))
        return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")

    return [*_panels(grid, width, bar), *_others(grid), f"A full bar is {_percent(largest)} of a tensor's weights."]


def write_numbers(grid: LayerGrid, *, width: int = 80) -> list[str]:
    """The grid as percentages in at most `width` columns."""
    lines = _panels(grid, width, lambda share, _: f"{100 * share:.3f}" if share else "-")
    return [*lines, *_others(grid), "Percent of each tensor's weights."]


def picture_lines(
    pack: MaskPack, *, pole: str | None = None, persona: str | None = None, width: int, numbers: bool, unicode: bool
) -> list[str]:
    """The layers that `pole` or `persona` gates, or all poles together. InputError for both, or for unknown names."""
    title, poles = _chosen(pack, pole, persona)
    shares = gated_shares(pack.identity.tensors, [pack.pole(name) for name in poles])
    grid = layer_grid(shares, pack.identity.tensors)
    drawn = write_numbers(grid, width=width) if numbers else draw_bars(grid, width=width, unicode=unicode)
    return [f"{title}: what is gated, by block and tensor", *drawn]


def _chosen(pack: MaskPack, pole: str | None, persona: str | None) -> tuple[str, Sequence[str]]:
    if pole is not None and persona is not None:
        raise InputError("give --pole or --persona, not both")
    if pole is not None:
        name = match_name(pole, pack.pole_names)
        if name is None:
            raise InputError(f"no pole {pole!r}; this pack has {', '.join(pack.pole_names)}")
        return f"pole {name}", [name]
    if persona is not None:
        name = match_name(persona, pack.personas)
        if name is None:
            raise PersonaNotFoundError(f"no persona {persona!r}; this pack has {', '.join(pack.personas)}")
        return f"persona {name} ({' + '.join(pack.personas[name])})", pack.personas[name]
    return f"all {len(pack.pole_names)} poles", pack.pole_names


def _share(tensor: TensorShape, groups: Sequence[Positions], single: Sequence[Positions]) -> float:
    """Each weight counts once: gated groups, and the single weights outside of them."""
    in_groups, weights = _union(groups), _union(single)
    outside = weights[~np.isin(weights // GROUP_SIZE, in_groups)] if len(in_groups) else weights
    return (len(in_groups) * GROUP_SIZE + len(outside)) / (tensor.n_rows * tensor.n_columns)


def _union(positions: Sequence[Positions]) -> Positions:
    return np.unique(np.concatenate(positions)) if positions else np.empty(0, np.uint32)


def _panels(grid: LayerGrid, width: int, cell: Callable[[float, int], str]) -> list[str]:
    """One table below the other, each with as many kinds as fit."""
    label_width = max([3, *(len(str(block)) for block in grid.blocks)])
    per_panel = max(1, (width - label_width) // (_LEAST_CELL + 1))
    lines: list[str] = []
    for start in range(0, len(grid.kinds), per_panel):
        kinds = grid.kinds[start : start + per_panel]
        room = min(12, max(_LEAST_CELL, (width - label_width) // len(kinds) - 1))
        lines.append(_row("blk", [_fitted(kind, room) for kind in kinds], label_width, room))
        for block in grid.blocks:
            shares = [grid.cells.get((block, kind)) for kind in kinds]
            cells = ["" if share is None else cell(share, room) for share in shares]
            lines.append(_row(str(block), cells, label_width, room))
        lines += [_row("all", [cell(grid.totals[kind], room) for kind in kinds], label_width, room), ""]
    return lines[:-1]


def _row(label: str, cells: Sequence[str], label_width: int, room: int) -> str:
    padded = [text + " " * (room - display_width(text)) for text in cells]
    return " ".join([label.rjust(label_width), *padded]).rstrip()


def _others(grid: LayerGrid) -> list[str]:
    return [f"{printable(name)}: {_percent(share)}" for name, share in grid.others.items()]


def _fitted(kind: str, room: int) -> str:
    """The kind's name in at most `room` columns; a name that is too long keeps its end, which differs."""
    name = _SHORTER.get(kind, printable(kind))
    while display_width(name) > room:
        name = name[1:]
    return name


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
