"""The sign sketch: does a pack belong to these weights, whatever quantization they are in?

Quantization keeps the sign of a large weight, so the signs of a few of the largest weights per tensor agree between
all quantizations of one model, and agree by chance, about one in two, between different models. What the sketch does
not tell apart is a model and its light fine-tunes, which change few signs of large weights. Measured agreement, and
with it the reasons for the two limits: docs/pack-format.md, "Sign sketch".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import ModelMismatchError
from persona_edge.masks import ModelIdentity, SignSample, TensorShape

__all__ = ["OVERALL_AGREEMENT", "TENSOR_AGREEMENT", "SketchResult", "check_identity", "check_sketch", "sample_signs"]

OVERALL_AGREEMENT = 0.98  # share of all samples whose sign must agree
TENSOR_AGREEMENT = 0.90  # share of one tensor's samples whose sign must agree
SAMPLES_PER_TENSOR = 64

Positions = NDArray[np.uint32]
ReadWeights = Callable[[str, Positions], NDArray[np.float32]]
_REMEDY = "use the pack with the model it was made from, or export one for this model"


@dataclass(frozen=True)
class SketchResult:
    """How many of the sampled signs agree: in all, and in the tensor where the share is lowest."""

    n_samples: int
    n_agreeing: int
    worst_tensor: str
    worst_agreement: float

    @property
    def agreement(self) -> float:
        """Share of all samples that agree, 0 to 1."""
        return self.n_agreeing / self.n_samples


def sample_signs(weights: NDArray[np.float32], n: int = SAMPLES_PER_TENSOR) -> SignSample:
    """The signs of up to `n` large weights of one tensor, shape (n_rows, n_columns), spread evenly over its rows.

    Takes the weight of largest magnitude of each of `n` evenly spaced rows; where there are fewer rows, of each of
    several equal parts of every row. Weights that are zero or not a number are never taken, so that fewer than `n`
    samples, even none, can result.
    """
    n_rows, n_columns = weights.shape
    rows = np.unique(np.arange(n, dtype=np.int64) * n_rows // n)
    edges = np.linspace(0, n_columns, min(-(-n // len(rows)), n_columns) + 1).astype(np.int64)
    magnitudes = np.nan_to_num(np.abs(weights[rows]), nan=0.0)
    largest = [magnitudes[:, a:b].argmax(axis=1) + a for a, b in pairwise(edges)]
    flat = np.stack([rows * n_columns + columns for columns in largest], axis=1).ravel()
    flat = flat[np.nan_to_num(weights.ravel()[flat]) != 0]
    flat = flat[np.unique(np.linspace(0, len(flat) - 1, min(n, len(flat))).astype(np.int64))]
    return SignSample(flat.astype(np.uint32), weights.ravel()[flat] < 0)


def check_identity(
    identity: ModelIdentity, architecture: str, tensors: Iterable[TensorShape], read_weights: ReadWeights
) -> SketchResult:
    """Compare everything: the architecture, that each tensor is there and has its shape, and the signs.

    The model may have more tensors than the pack knows. Raises ModelMismatchError that names the first difference.
    """
    if architecture != identity.architecture:
        raise ModelMismatchError(
            f"the pack is for the architecture {identity.architecture}, this model is {architecture}; {_REMEDY}"
        )
    shapes: Mapping[str, TensorShape] = {tensor.name: tensor for tensor in tensors}
    for wanted in identity.tensors:
        found = shapes.get(wanted.name)
        if found is None:
            raise ModelMismatchError(f"the pack was made from another model: {wanted.name} is missing here; {_REMEDY}")
        if found != wanted:
            raise ModelMismatchError(
                f"the pack was made from another model: {wanted.name} has {wanted.n_rows} x {wanted.n_columns} weights "
                f"there and {found.n_rows} x {found.n_columns} here; {_REMEDY}"
            )
    return check_sketch(identity, read_weights)


def check_sketch(identity: ModelIdentity, read_weights: ReadWeights) -> SketchResult:
    """Compare the signs of the sampled weights with those that `read_weights(tensor, positions)` returns, shape (n,).

    A zero disagrees: it is no sign of the model that had a large weight there. The weights must be the base model's,
    without a persona. Raises ModelMismatchError below 98 % agreement over all, or below 90 % in any tensor.
    """
    agreeing: dict[str, int] = {}
    for name, sample in identity.sketch.items():
        weights = read_weights(name, sample.positions)
        agreeing[name] = int(np.sum(np.where(sample.negative, weights < 0, weights > 0)))
    sizes = {name: len(sample.positions) for name, sample in identity.sketch.items()}
    if not sum(sizes.values()):
        raise ModelMismatchError(f"the pack has no sign sketch, so that no model can be checked; {_REMEDY}")
    worst = min(sizes, key=lambda name: agreeing[name] / max(1, sizes[name]))
    result = SketchResult(sum(sizes.values()), sum(agreeing.values()), worst, agreeing[worst] / max(1, sizes[worst]))
    if result.agreement < OVERALL_AGREEMENT:
        raise ModelMismatchError(
            f"the pack was made from other weights: only {result.agreement:.1%} of {result.n_samples:,} sampled "
            f"weights have the sign they should; {_REMEDY}"
        )
    if result.worst_agreement < TENSOR_AGREEMENT:
        raise ModelMismatchError(
            f"the pack was made from other weights: in {worst} only {result.worst_agreement:.1%} of {sizes[worst]} "
            f"sampled weights have the sign they should; {_REMEDY}"
        )
    return result
