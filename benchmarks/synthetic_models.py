"""Models of a given shape with random weights: for timing sizes of which no real model is at hand.

    python -m benchmarks.synthetic_models 8b        make one now, and print where it is

Weights are random blocks of Q4_K and Q6_K in the mix of Q4_K_M, scaled so that activations stay finite; the vocabulary
has the real model's size and no merges, so every byte is a token. Speed, size and memory are those of a real model of
that shape; what such a model says is noise. A file is written tensor by tensor, made once and kept.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.cache import cache_folder, writing_to
from persona_edge.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["SHAPES", "Shape", "make_model", "synthetic_folder"]

Kind = Literal["F32", "Q4_K", "Q6_K"]
_VERSION = 1  # of what is written: a file of another one is made again
_ALPHABET = (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))  # GPT-2's names of the bytes
_SPARE = 1 << 30  # bytes of disk that stay free
_Q4_K_SPREAD, _Q4_K_OFFSET = 258.0, 7.5  # standard deviation of scale * code - offset * minimum, all of them uniform
_Q6_K_SPREAD = 1366.0  # of scale * (code - 32)


@dataclass(frozen=True)
class Shape:
    """A llama's sizes. `is_tied`: the embedding serves as the output matrix as well."""

    name: str
    n_layers: int
    hidden: int
    feed_forward: int
    n_heads: int
    n_kv_heads: int
    n_vocab: int
    is_tied: bool
    n_ctx: int = 8192

    @property
    def file_name(self) -> str:
        """What its file is called."""
        return f"{self.name}-shape.v{_VERSION}.Q4_K_M.gguf"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Kind]]:
        """Name, shape (n_rows, n_columns) or (n,), and type of every tensor, in the file's order."""
        key = self.hidden // self.n_heads * self.n_kv_heads
        yield "token_embd", (self.n_vocab, self.hidden), "Q6_K" if self.is_tied else "Q4_K"
        yield "output_norm", (self.hidden,), "F32"
        if not self.is_tied:
            yield "output", (self.n_vocab, self.hidden), "Q6_K"
        for layer in range(self.n_layers):
            finer: Kind = "Q6_K" if self._is_finer(layer) else "Q4_K"
            block = f"blk.{layer}."
            yield block + "attn_norm", (self.hidden,), "F32"
            yield block + "attn_q", (self.hidden, self.hidden), "Q4_K"
            yield block + "attn_k", (key, self.hidden), "Q4_K"
            yield block + "attn_v", (key, self.hidden), finer
            yield block + "attn_output", (self.hidden, self.hidden), "Q4_K"
            yield block + "ffn_norm", (self.hidden,), "F32"
            yield block + "ffn_gate", (self.feed_forward, self.hidden), "Q4_K"
            yield block + "ffn_up", (self.feed_forward, self.hidden), "Q4_K"
            yield block + "ffn_down", (self.hidden, self.feed_forward), finer

    def _is_finer(self, layer: int) -> bool:
        """Q4_K_M keeps attn_v and ffn_down finer in the outer eighths of the layers, and in every third between."""
        eighth = self.n_layers // 8
        return layer < eighth or layer >= 7 * self.n_layers // 8 or (layer - eighth) % 3 == 2


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", 2, 256, 512, 4, 2, 320, is_tied=True),
        Shape("1.7b", 24, 2048, 8192, 32, 32, 49152, is_tied=True),  # SmolLM2 1.7B
        Shape("8b", 32, 4096, 14336, 32, 8, 128256, is_tied=False),  # Llama 3 8B
    )
}


def synthetic_folder() -> Path:
    """Where synthetic models, packs and adapters are kept; it need not exist."""
    return cache_folder() / "synthetic"


def make_model(shape: Shape, folder: Path | None = None) -> Path:
    """The GGUF of `shape` in `folder`, made when it is not there. Needs memory for its largest tensor twice.

    Raises InputError when the disk has no room for it, OutputError when it cannot be written.
    """
    folder = synthetic_folder() if folder is None else folder
    path = folder / shape.file_name
    if path.exists():
        return path
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        n_bytes, free = sum(_n_bytes(s, kind) for _, s, kind in shape.tensors()), shutil.disk_usage(folder).free
        if free < n_bytes + _SPARE:
            raise InputError(f"{shape.file_name} takes {n_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there")
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            _write(shape, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _write(shape: Shape, path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    _add_metadata(writer, shape)
    for name, size, kind in shape.tensors():
        # Bytes of a row, which gguf turns into the number of weights.
        stored = (*size[:-1], _row_bytes(size[-1], kind)) if kind != "F32" else size
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        writer.add_tensor_info(f"{name}.weight", stored, dtype, _n_bytes(size, kind), GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.Generator(np.random.SFC64(0))
    for _, size, kind in shape.tensors():
        writer.write_tensor_data(_weights(random, size, kind))
    writer.close()


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"{shape.name} shape, random weights")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    n_more = shape.n_vocab - len(_ALPHABET) - 1
    writer.add_token_list(
        [chr(code) for code in _ALPHABET] + ["<end>", "ab"] + [f"token{i}" for i in range(n_more - 1)]
    )
    writer.add_token_types([1] * len(_ALPHABET) + [3] + [1] * n_more)
    writer.add_token_merges(["a b"])  # transformers needs what a merge makes to be a token
    writer.add_eos_token_id(len(_ALPHABET))


def _weights(random: np.random.Generator, shape: tuple[int, ...], kind: Kind) -> NDArray[np.generic]:
    """Random blocks, (n_rows, bytes of a row) uint8, of weights around 0 with variance 1 / n_columns; or ones."""
    if kind == "F32":
        return np.ones(shape, np.float32)
    n_bytes = _n_bytes(shape, kind)
    data = random.integers(0, 1 << 64, -(-n_bytes // 8), np.uint64, endpoint=False).view(np.uint8)[:n_bytes]
    blocks = data.reshape(-1, _row_bytes(256, kind))
    if kind == "Q4_K":
        scale = 1 / (_Q4_K_SPREAD * shape[-1] ** 0.5)
        blocks[:, 0:4] = np.array([scale, _Q4_K_OFFSET * scale], "<f2").view(np.uint8)
    else:
        blocks[:, 208:210] = np.array([1 / (_Q6_K_SPREAD * shape[-1] ** 0.5)], "<f2").view(np.uint8)
    return data.reshape(shape[0], -1)


def _row_bytes(n_columns: int, kind: Kind) -> int:
    return n_columns // 256 * {"Q4_K": 144, "Q6_K": 210, "F32": 1024}[kind]


def _n_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    return 4 * shape[0] if kind == "F32" else shape[0] * _row_bytes(shape[-1], kind)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(make_model(SHAPES[name]))
