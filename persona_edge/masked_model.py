"""Gate the weights of a torch model in place, and put every bit back: what the runtime does, on PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from persona_edge.masks import Plane, Positions
from persona_edge.modeling import LinearLayer, TorchModel

if TYPE_CHECKING:
    import torch

__all__ = ["masked"]


@contextmanager
def masked(model: TorchModel, planes: Sequence[Plane], *, strength: float = 1.0) -> Iterator[None]:
    """While open, the weights of `model` are multiplied by the gates of `planes`; on exit every bit is as before.

    Gates of planes that overlap multiply. At `strength` s a plane's gate g acts as 1 + s (g - 1).
    """
    with _restoring(model, planes):
        for plane in planes:
            gate = 1.0 + strength * (plane.gate - 1.0)
            for name, positions in plane.positions.items():
                _multiply(model.layer(name), positions, plane.granularity, gate)
        yield


@contextmanager
def _restoring(model: TorchModel, planes: Sequence[Plane]) -> Iterator[None]:
    saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for plane in planes:
        for name, positions in plane.positions.items():
            units, index = _units(model.layer(name), positions, plane.granularity)
            saved.append((units, index, units[index].clone()))
    try:
        yield
    finally:
        for units, index, values in saved:
            units[index] = values


def _multiply(layer: LinearLayer, positions: Positions, granularity: int, gate: float) -> None:
    units, index = _units(layer, positions, granularity)
    # Gate 0 is assigned, not multiplied: 0 * inf would be NaN and 0 * -w a negative zero.
    units[index] = units[index] * gate if gate else units.new_zeros(())


def _units(layer: LinearLayer, positions: Positions, granularity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's weights as (n_units, granularity), sharing memory, and the module's index of each position."""
    import torch

    per_row = layer.module.in_features // granularity
    rows, units_in_row = np.divmod(positions.astype(np.int64), per_row)
    index: NDArray[np.int64] = (rows if layer.row_order is None else layer.row_order[rows]) * per_row + units_in_row
    weight = layer.module.weight.detach()
    return weight.view(-1, granularity), torch.from_numpy(index).to(weight.device)
