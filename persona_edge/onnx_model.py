"""An ONNX model on disk in the words of a mask pack: which rows of which initializer are `blk.3.attn_q.weight`.

Reads folders as onnxruntime-genai's builder writes them: `model.onnx` with its external data, and `genai_config.json`.
Packs count rows as GGUF does. For the llama architecture GGUF interleaves the rotary halves of attn_q and attn_k, ONNX
keeps Hugging Face's order, and fused projections lie one after the other in one matrix; `OnnxWeight.rows` undoes both.
Reads the graph and, when asked, the weights; never writes. What the numbers mean is onnx_weights' business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import MissingDependencyError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from persona_edge.masks import GROUP_SIZE, TensorShape

if TYPE_CHECKING:
    import onnx

__all__ = [
    "CONFIG_NAME",
    "OnnxMatrix",
    "OnnxModel",
    "OnnxWeight",
    "StoredTensor",
    "find_onnx",
    "output_matrix",
    "read_onnx_model",
]

CONFIG_NAME: Final = "genai_config.json"

# "type" of genai_config.json -> general.architecture of the GGUF of the same model
_ARCHITECTURES: Final = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_ROTARY_PERMUTED: Final = frozenset({"llama"})
_PARTS: Final = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_PROJECTION = re.compile(r"layers\.(\d+)[./].*?\b(qkv_proj|q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\b")
_DTYPES: Final = {1: "<f4", 2: "|u1", 3: "|i1", 10: "<f2"}  # onnx.TensorProto.DataType


@dataclass(frozen=True)
class StoredTensor:
    """An initializer: `n_bytes` at `offset` of `file`, or `inline` in the graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0
    inline: bytes = field(default=b"", repr=False)

    def read(self) -> NDArray[Any]:
        """The values, read-only, in the stored shape; a view of the file where there is one. ModelFileError."""
        count = int(np.prod(self.shape, dtype=np.int64))
        try:
            if self.file is None:
                return np.frombuffer(self.inline, self.dtype, count).reshape(self.shape)
            return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"{self.file or self.name}: cannot read {self.name} ({error}); export it again"
            ) from error


@dataclass(frozen=True)
class OnnxMatrix:
    """The weights of one MatMulNBits node (`scales` set) or of one MatMul node (`codes` then holds the numbers).

    Quantized: `codes` is (n_rows, blocks, block_size * bits / 8) uint8, low bits first; `scales` n_rows x blocks.
    Otherwise `codes` is (n_columns, n_rows): MatMul multiplies from the right.
    """

    name: str
    n_rows: int
    n_columns: int
    codes: StoredTensor
    scales: StoredTensor | None = None
    zero_points: StoredTensor | None = None
    bits: int = 0
    block_size: int = 0
    accuracy_level: int = 0

    @property
    def blocks_per_row(self) -> int:
        """How many scales a row has."""
        return -(-self.n_columns // self.block_size)


@dataclass(frozen=True, eq=False)
class OnnxWeight:
    """A tensor as packs know it. `rows` (n_rows,) int64 are the matrix's rows in GGUF's order."""

    name: str
    matrix: OnnxMatrix
    rows: NDArray[np.int64]

    @property
    def shape(self) -> TensorShape:
        """Rows and columns under the GGUF name."""
        return TensorShape(self.name, len(self.rows), self.matrix.n_columns)


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A folder that was read. `weights` holds what masks may touch, by GGUF name; `config` is genai_config.json."""

    path: Path
    architecture: str
    weights: Mapping[str, OnnxWeight]
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where graph, data, tokenizer and configuration lie."""
        return self.path.parent

    def matrices(self) -> tuple[OnnxMatrix, ...]:
        """Every matrix that holds maskable weights, once."""
        return tuple({weight.matrix.name: weight.matrix for weight in self.weights.values()}.values())

    def shapes(self) -> tuple[TensorShape, ...]:
        """Shapes of the maskable tensors."""
        return tuple(weight.shape for weight in self.weights.values())

    def data_files(self) -> tuple[Path, ...]:
        """The graph and every file of external data that the maskable weights lie in."""
        parts = (part for m in self.matrices() for part in (m.codes, m.scales, m.zero_points) if part is not None)
        return (self.path, *sorted({part.file for part in parts if part.file is not None}))


def find_onnx(path: Path) -> Path | None:
    """The graph that `path` stands for: an .onnx file itself, or the one in a folder. None when it is neither."""
    if path.is_file():
        return path if path.suffix == ".onnx" else None
    if not path.is_dir():
        return None
    config = path / CONFIG_NAME
    named = _decoder(_read_config(config)).get("filename", "model.onnx") if config.is_file() else "model.onnx"
    found = path / str(named)
    return found if found.is_file() else None


def read_onnx_model(path: Path) -> OnnxModel:
    """Read the graph that `path`, a folder or an .onnx file, stands for.

    Raises ModelNotFoundError, ModelFileError for damaged or incomplete files, UnsupportedModelError for graphs whose
    weights masks cannot be applied to, MissingDependencyError without the onnx package.
    """
    found = find_onnx(path)
    if found is None:
        raise ModelNotFoundError(f"{path}: no ONNX model there; make one with: persona-edge export --format onnx")
    config = _read_config(found.parent / CONFIG_NAME)
    kind = str(config.get("model", {}).get("type", ""))
    if kind not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise UnsupportedModelError(f"{found.parent}: models of type {kind!r} are not supported; supported: {known}")
    architecture = _ARCHITECTURES[kind]
    heads = _Heads.of(config, permuted=architecture in _ROTARY_PERMUTED)
    weights = {w.name: w for w in _weights(_read_graph(found), found.parent, heads)}
    if not weights:
        raise UnsupportedModelError(f"{found}: no layer has weights with known names; export with --format onnx")
    return OnnxModel(found, architecture, dict(sorted(weights.items(), key=_by_block)), config)


def output_matrix(model: OnnxModel) -> OnnxMatrix | None:
    """The matrix of the last layer, often the embedding too, which no mask touches; None where it has no known name."""
    graph = _read_graph(model.path)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        is_product = node.op_type in ("MatMulNBits", "MatMul") and "lm_head" in node.name
        if is_product and node.input[1] in initializers:
            return _matrix(node, initializers, model.folder)
    return None


def _by_block(item: tuple[str, OnnxWeight]) -> tuple[int, str]:
    return int(item[0].split(".")[1]), item[0]


@dataclass(frozen=True)
class _Heads:
    n_query: int
    n_key: int
    size: int
    permuted: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], *, permuted: bool) -> _Heads:
        decoder = _decoder(config)
        try:
            n_query, n_key = int(decoder["num_attention_heads"]), int(decoder["num_key_value_heads"])
            return cls(n_query, n_key, int(decoder["head_size"]), permuted)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{CONFIG_NAME} lacks {error}; export the model again") from None

    def row_counts(self) -> Mapping[str, int]:
        """Rows of the query, key and value parts of a fused matrix, in their order in it."""
        keys = self.n_key * self.size
        return {"q_proj": self.n_query * self.size, "k_proj": keys, "v_proj": keys}

    def order(self, part: str, n_rows: int) -> NDArray[np.int64]:
        """The Hugging Face row of each GGUF row."""
        rows = np.arange(n_rows, dtype=np.int64)
        if not self.permuted or part not in ("q_proj", "k_proj"):
            return rows
        n_heads = self.n_query if part == "q_proj" else self.n_key
        return rows.reshape(n_heads, 2, -1).swapaxes(1, 2).ravel()


def _weights(graph: onnx.GraphProto, folder: Path, heads: _Heads) -> Iterator[OnnxWeight]:
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "MatMul") or len(node.input) < 2 or node.input[1] not in initializers:
            continue
        named = _PROJECTION.search(node.input[1]) or _PROJECTION.search(node.name)
        if named is None:
            continue
        matrix = _matrix(node, initializers, folder)
        if matrix.n_columns % GROUP_SIZE == 0:
            yield from _split(matrix, int(named[1]), named[2], heads)


def _split(matrix: OnnxMatrix, block: int, part: str, heads: _Heads) -> Iterator[OnnxWeight]:
    """The GGUF tensors in one matrix: itself, or query, key and value one after the other."""
    parts = heads.row_counts() if part == "qkv_proj" else {part: matrix.n_rows}
    if sum(parts.values()) != matrix.n_rows:
        raise ModelFileError(f"{matrix.name} has {matrix.n_rows} rows where its heads need {sum(parts.values())}")
    first = 0
    for name, n_rows in parts.items():
        yield OnnxWeight(f"blk.{block}.{_PARTS[name]}.weight", matrix, first + heads.order(name, n_rows))
        first += n_rows


def _matrix(node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto], folder: Path) -> OnnxMatrix:
    attributes = {attribute.name: int(attribute.i) for attribute in node.attribute}
    parts = [_stored(initializers[name], folder) if name in initializers else None for name in node.input[1:]]
    codes = parts[0]
    assert codes is not None  # the caller looked
    if node.op_type == "MatMul":
        if len(codes.shape) != 2 or codes.dtype not in ("<f4", "<f2"):
            raise UnsupportedModelError(f"{codes.name}: weights of this type cannot be masked; export in int4 or fp32")
        return OnnxMatrix(codes.name, codes.shape[1], codes.shape[0], codes)
    scales, zero_points, *rest = [*parts[1:], None, None]
    if scales is None or any(part is not None for part in rest[:1]):
        raise UnsupportedModelError(f"{codes.name}: scales computed by the graph or reordered columns cannot be masked")
    return OnnxMatrix(
        codes.name,
        attributes["N"],
        attributes["K"],
        codes,
        scales,
        zero_points,
        attributes.get("bits", 4),
        attributes["block_size"],
        attributes.get("accuracy_level", 0),
    )


def _stored(tensor: onnx.TensorProto, folder: Path) -> StoredTensor:
    if tensor.data_type not in _DTYPES:
        raise UnsupportedModelError(f"{tensor.name}: numbers of ONNX type {tensor.data_type} cannot be masked")
    dtype, shape = _DTYPES[tensor.data_type], tuple(int(n) for n in tensor.dims)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if "location" in place:
        file = (folder / place["location"]).resolve()
        if folder.resolve() not in file.parents:
            raise ModelFileError(f"{tensor.name} lies outside the model's folder; move its data there")
        return StoredTensor(tensor.name, dtype, shape, file, int(place.get("offset", 0)))
    return StoredTensor(tensor.name, dtype, shape, inline=_raw(tensor))


def _raw(tensor: onnx.TensorProto) -> bytes:
    if tensor.raw_data:
        return bytes(tensor.raw_data)
    import onnx.numpy_helper

    return np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).tobytes()


def _read_graph(path: Path) -> onnx.GraphProto:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "ONNX models need the onnx packages; run: pip install 'persona-edge[onnx]'"
        ) from error
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own errors have no common public base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(f"{path}: not a readable ONNX file ({reason}); export it again") from error


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing; export the model with: persona-edge export --format onnx") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error}); export the model again") from error
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise ModelFileError(f"{path}: describes no model; export the model again")
    return value


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    decoder = config.get("model", {}).get("decoder", {})
    return decoder if isinstance(decoder, dict) else {}
