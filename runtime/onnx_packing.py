"""How ONNX Runtime packs a matrix on this machine, learned from ONNX Runtime itself.

A quantized matrix is packed into one blob: its codes in an order that suits the processor, and for int8 arithmetic its
scales and block sums (`-zero * scale`) behind them. Nothing of that layout is assumed. `learn_places` packs a matrix of
the same shape twice, with scales that are all one and scales that count, and reads off where each scale went and what
it was multiplied by; where that does not explain every byte that changed, there are no places, and `packed_images`
(ORT's own packing of the masked matrices) takes over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.onnx_model import OnnxMatrix
from persona_edge.runtime.onnx_runtime import save_packed

__all__ = ["Blob", "ScalePlaces", "layout_key", "learn_places", "packed_blobs", "packed_images"]

_MOST_BLOCKS = (1 << 24) - 2  # float32 counts exactly up to there


@dataclass(frozen=True)
class Blob:
    """Where the packed form of a matrix lies in a data file, in bytes."""

    offset: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class ScalePlaces:
    """Where a blob keeps its scales: float32 number `offsets[b, i]` is `factors[i] * scale[b]`.

    `offsets` is (n_blocks, n_places) int32, counted in float32 from the blob's start; `factors` (n_places,) float32.
    """

    offsets: NDArray[np.int32]
    factors: NDArray[np.float32]

    def fields(
        self, blocks: NDArray[np.int64], scales: NDArray[np.float32]
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Offsets and contents, both (n * n_places,), of `blocks` (n,) whose scales are `scales` (n,)."""
        return self.offsets[blocks].ravel(), (scales[:, None] * self.factors).astype(np.float32).ravel()


def layout_key(matrix: OnnxMatrix) -> str:
    """What a matrix's packed layout depends on, besides the machine; also a file's name."""
    assert matrix.scales is not None
    scale = matrix.scales.dtype.strip("<|")
    shape = f"{matrix.n_rows}x{matrix.n_columns}"
    return f"{shape}-int{matrix.bits}-block{matrix.block_size}-level{matrix.accuracy_level}-{scale}"


def learn_places(matrix: OnnxMatrix) -> ScalePlaces | None:
    """Where scales lie in the packed form of matrices like this one; None when that is not plain.

    Takes a tenth of a second per ten million weights. Zero points and scales in half precision are not tried.
    """
    if matrix.scales is None or matrix.scales.dtype != "<f4" or matrix.zero_points is not None:
        return None
    n_blocks = matrix.n_rows * matrix.blocks_per_row
    if n_blocks > _MOST_BLOCKS or matrix.bits not in (4, 8):
        return None
    codes = np.full(matrix.codes.shape, 0x88 if matrix.bits == 4 else 0x80, np.uint8)
    images = []
    for scales in (np.ones(n_blocks, np.float32), np.arange(2, n_blocks + 2, dtype=np.float32)):
        changed: dict[str, NDArray[Any]] = {matrix.codes.name: codes}
        changed[matrix.scales.name] = scales.reshape(matrix.scales.shape)
        image = packed_images([matrix], changed).get(matrix.name)
        if image is None:
            return None
        images.append(image)
    return _compare(images[0], images[1], n_blocks)


def _compare(ones: NDArray[np.uint8], counted: NDArray[np.uint8], n_blocks: int) -> ScalePlaces | None:
    """The places, when every changed number is a fixed multiple of one scale and every scale has the same places."""
    whole = len(ones) // 4 * 4
    if len(ones) != len(counted) or (ones[whole:] != counted[whole:]).any():
        return None
    a, b = (image[:whole].view("<f4") for image in (ones, counted))
    at = np.flatnonzero(a.view(np.uint32) != b.view(np.uint32))
    if len(at) == 0 or len(at) % n_blocks or not np.isfinite(a[at]).all() or (a[at] == 0).any():
        return None
    factors = a[at]
    ratio = b[at].astype(np.float64) / factors - 2
    block = np.rint(ratio).astype(np.int64)
    if (ratio != block).any() or block.min() < 0 or block.max() >= n_blocks:
        return None
    order = np.lexsort((factors, block))
    n_places = len(at) // n_blocks
    expected = np.repeat(np.arange(n_blocks), n_places)
    table = factors[order].reshape(n_blocks, n_places)
    if (block[order] != expected).any() or (table != table[0]).any():
        return None
    return ScalePlaces(at[order].reshape(n_blocks, n_places).astype(np.int32), table[0].copy())


def packed_images(
    matrices: Sequence[OnnxMatrix], changed: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[np.uint8]]:
    """The packed form of each matrix, by name, with the initializers of `changed` in place of the stored ones.

    A matrix that ONNX Runtime does not pack, or not into a single blob, is left out.
    """
    with tempfile.TemporaryDirectory(prefix="persona-edge-") as folder:
        target = Path(folder) / "packed.onnx"
        save_packed(_graph_of(matrices, changed or {}), target)
        blobs, file = packed_blobs(target), target.with_name(target.name + ".data")
        data = np.fromfile(file, np.uint8) if file.is_file() else np.zeros(0, np.uint8)  # tiny matrices stay inline
    names = {matrix.name for matrix in matrices}
    return {name: data[b.offset : b.offset + b.n_bytes].copy() for name, b in blobs.items() if name in names}


def packed_blobs(model: Path) -> dict[str, Blob]:
    """The blobs of a model that was saved with its packed weights, by the name of the initializer they replace."""
    import onnx

    found: dict[str, Blob] = {}
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        entries = [entry.value for entry in tensor.external_data if entry.key.startswith("prepacked_")]
        places = [_blob(part) for entry in entries for part in entry.split("|")[1:]]
        if len(places) == 1 and places[0] is not None:
            found[tensor.name] = places[0]
    return found


def _blob(text: str) -> Blob | None:
    """A place as ONNX Runtime writes it, `offset;length;0`."""
    numbers = text.split(";")
    if len(numbers) < 2 or not all(number.isdecimal() for number in numbers):
        return None
    return Blob(int(numbers[0]), int(numbers[1]))


def _graph_of(matrices: Sequence[OnnxMatrix], changed: Mapping[str, NDArray[Any]]) -> bytes:
    """A graph of these matrices alone, each multiplied with an input of its own."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, initializers, inputs, outputs = [], [], [], []
    for i, matrix in enumerate(matrices):
        stored = [part for part in (matrix.codes, matrix.scales, matrix.zero_points) if part is not None]
        values = [np.array(changed[part.name] if part.name in changed else part.read()) for part in stored]
        initializers += [numpy_helper.from_array(v, part.name) for v, part in zip(values, stored, strict=True)]
        names = [f"x{i}", *(part.name for part in stored)]
        kind = TensorProto.FLOAT16 if (matrix.scales or matrix.codes).dtype == "<f2" else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(names[0], kind, ["n", matrix.n_columns]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", kind, ["n", matrix.n_rows]))
        nodes.append(_node(matrix, names, f"y{i}"))
    graph = helper.make_graph(nodes, "packing", inputs, outputs, initializers)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())


def _node(matrix: OnnxMatrix, inputs: Sequence[str], output: str) -> Any:
    from onnx import helper

    if matrix.scales is None:
        return helper.make_node("MatMul", inputs, [output])
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [output],
        domain="com.microsoft",
        K=matrix.n_columns,
        N=matrix.n_rows,
        bits=matrix.bits,
        block_size=matrix.block_size,
        accuracy_level=matrix.accuracy_level,
    )
