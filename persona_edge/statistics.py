"""Sums over calibration data, per tensor: what every score is computed from.

Plain sums, so that they merge across batches, files and machines, and can be saved half-way and resumed. Fields by kind
(all float32 in memory; unit in brackets):

margin      gate_gradient (n_rows, n_groups)   sum over contrasts of d margin / d gate            [nats per token]
            positive_{abs,sum,square} (n_columns,), negative_{…}   sums over response tokens of |x|, x, x^2
damage      input_square (n_columns,)          sum over tokens of x^2
            output_gradient_square (n_rows,)   sum over tokens of delta^2
            gate_gradient_square (n_rows, n_groups)   sum over tokens of (delta_i sum_j w_ij x_j)^2
drift       drift_gradient (n_rows, n_groups)  sum over tokens of d KL(base || masked) / d gate   [nats]

where x is a layer's input, delta the gradient at its output. Counts: `contrasts`, `batches`, `positive_tokens`,
`negative_tokens` for margins; `batches` and `tokens`, the number of predictions, for damage and drift. Leaves computing
them to collect.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import CalibrationError
from persona_edge.files import atomic_output
from persona_edge.per_tensor import PerTensor

__all__ = ["Kind", "Statistics", "load_statistics", "merge", "save_statistics", "stored_means"]

Kind = Literal["margin", "damage", "drift"]
TensorSums = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Statistics:
    """`sums[field][tensor]` and `counts`, as listed above."""

    kind: Kind
    counts: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, TensorSums] = field(default_factory=dict)

    def mean(self, field_name: str, count: str) -> PerTensor:
        """A field divided by a count, per tensor and when asked for; CalibrationError when nothing was counted."""
        n = self.counts.get(count, 0)
        if n < 1:
            raise CalibrationError(f"no {count} were counted in these statistics; calibrate with more data")
        sums = self.sums[field_name]
        return PerTensor(sums, lambda name: sums[name] / np.float32(n))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that were watched, in the model's order."""
        return tuple(next(iter(self.sums.values()), {}))


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Statistics over the data of both, in the arrays of `first`: those of an 8B model take 0.9 GB.

    CalibrationError when they are of different kinds, models or settings.
    """
    if not first.counts:
        return second
    if not second.counts:
        return first
    if first.kind != second.kind or first.tensors != second.tensors or first.sums.keys() != second.sums.keys():
        raise CalibrationError("statistics of different kinds, models or settings cannot be merged")
    counts = {name: n + second.counts.get(name, 0) for name, n in first.counts.items()}
    sums = {
        name: {tensor: np.add(values, second.sums[name][tensor], out=values) for tensor, values in tensors.items()}
        for name, tensors in first.sums.items()
    }
    return Statistics(first.kind, counts, sums)


def save_statistics(path: Path, statistics: Statistics, key: Mapping[str, object]) -> None:
    """Write to a safetensors file, whole or not at all. `key` says what they were computed from."""
    flat = {
        f"{name}|{tensor}": values for name, tensors in statistics.sums.items() for tensor, values in tensors.items()
    }
    metadata = {
        "kind": statistics.kind,
        "counts": json.dumps(dict(statistics.counts)),
        "order": json.dumps(list(statistics.tensors)),
        "key": json.dumps(dict(key), sort_keys=True),
    }
    with atomic_output(path) as file:
        file.writelines(_safetensors(flat, metadata))


def _safetensors(arrays: TensorSums, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """A safetensors file of float32 arrays, piece by piece: the package's own writer makes a copy of all first."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, values in arrays.items():
        start, end = end, end + 4 * values.size
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for values in arrays.values():
        yield np.asarray(values, "<f4").tobytes()


def load_statistics(path: Path, key: Mapping[str, object]) -> Statistics | None:
    """What `save_statistics` wrote under the same `key`; None when there is no such file or it cannot be used."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != json.dumps(dict(key), sort_keys=True):
                return None
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return None
    kind = next((known for known in get_args(Kind) if known == metadata["kind"]), None)
    if kind is None:
        return None
    order = json.loads(metadata["order"])
    fields = sorted({name.split("|", 1)[0] for name in flat})
    sums = {name: {tensor: flat[f"{name}|{tensor}"] for tensor in order} for name in fields}
    return Statistics(kind, json.loads(metadata["counts"]), sums)


def stored_means(path: Path, key: Mapping[str, object], field_name: str, count: str) -> PerTensor:
    """`Statistics.mean` of a field that stays on the disk: a tensor is read when it is asked for.

    CalibrationError when there is no such file, or it was written under another key.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="numpy")  # kept open: parsing the header takes milliseconds
        metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}); calibrate again") from error
    if metadata.get("key") != json.dumps(dict(key), sort_keys=True):
        raise CalibrationError(f"{path} holds other statistics; calibrate again")
    n = np.float32(json.loads(metadata["counts"])[count])

    def read(name: str) -> NDArray[np.float32]:
        found: NDArray[np.float32] = file.get_tensor(f"{field_name}|{name}")
        return found / n

    return PerTensor(json.loads(metadata["order"]), read)
