"""The inputs and outputs of a decoder graph with a KV cache, as onnxruntime-genai's builder names them.

Inputs: `input_ids` (1, n) int64, `attention_mask` (1, cached + n) int64, maybe `position_ids` (1, n) int64, and per
layer a past key and value, (1, n_kv_heads, room, head_size). Outputs: `logits` (1, n, n_vocab) and per layer what the
past becomes. Where past and present are the same buffer, attention appends to it in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import GenerationError, ModelFileError
from persona_edge.onnx_model import CONFIG_NAME, OnnxModel

__all__ = ["Geometry"]

_DTYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Geometry:
    """Counts and names, from genai_config.json. `end_tokens` end a generation."""

    n_layers: int
    n_kv_heads: int
    head_size: int
    n_vocab: int
    n_context: int
    end_tokens: frozenset[int]
    ids: str
    mask: str
    positions: str
    logits: str
    past: tuple[str, ...]
    present: tuple[str, ...]

    @classmethod
    def of(cls, model: OnnxModel) -> Geometry:
        """Read the model's configuration; ModelFileError names what it lacks."""
        try:
            config, decoder = model.config["model"], model.config["model"]["decoder"]
            n_layers, inputs, outputs = int(decoder["num_hidden_layers"]), decoder["inputs"], decoder["outputs"]
            ends = config["eos_token_id"]
            return cls(
                n_layers,
                int(decoder["num_key_value_heads"]),
                int(decoder["head_size"]),
                int(config["vocab_size"]),
                int(config["context_length"]),
                frozenset(int(token) for token in (ends if isinstance(ends, list) else [ends])),
                str(inputs["input_ids"]),
                str(inputs["attention_mask"]),
                str(inputs.get("position_ids", "position_ids")),
                str(outputs["logits"]),
                _per_layer(inputs, "past", n_layers),
                _per_layer(outputs, "present", n_layers),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{model.folder / CONFIG_NAME} lacks {error}; export the model again") from None

    def cache_dtype(self, session: Any) -> Any:
        """The number type of keys and values."""
        kinds = {given.name: given.type for given in session.get_inputs()}
        return _DTYPES.get(kinds.get(next(iter(self.past), ""), ""), np.float32)

    def wants_positions(self, session: Any) -> bool:
        """Whether positions are an input of their own."""
        return any(given.name == self.positions for given in session.get_inputs())

    def empty_past(self, session: Any) -> dict[str, NDArray[Any]]:
        """Keys and values of nothing."""
        none = np.zeros((1, self.n_kv_heads, 0, self.head_size), self.cache_dtype(session))
        return dict.fromkeys(self.past, none)

    def logits_of(self, session: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits at every position of `tokens`, (n, n_vocab), without any cache; for trials."""
        n = len(tokens)
        feeds = {self.ids: tokens[None], self.mask: np.ones((1, n), np.int64), **self.empty_past(session)}
        if self.wants_positions(session):
            feeds[self.positions] = np.arange(n, dtype=np.int64)[None]
        try:
            return np.asarray(session.run([self.logits], feeds)[0][0], np.float32)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            reason = " ".join(str(error).split())
            raise GenerationError(f"ONNX Runtime could not evaluate the model ({reason:.200})") from error


def _per_layer(names: Mapping[str, Any], which: str, n_layers: int) -> tuple[str, ...]:
    return tuple(str(names[f"{which}_{kind}_names"]) % layer for layer in range(n_layers) for kind in ("key", "value"))
