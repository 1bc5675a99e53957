"""Which way of changing weights works with the ONNX Runtime of this machine, found out on a model of one matrix.

For `persona-edge doctor`, which has no model at hand: the graph has the inputs and names of a decoder, and no layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.onnx_model import CONFIG_NAME, read_onnx_model
from persona_edge.runtime.onnx_mechanism import ChosenEditor, open_editor

__all__ = ["try_mechanisms", "write_trial_model"]

_SIZE = 128  # rows, columns and tokens


def try_mechanisms(folder: Path) -> ChosenEditor:
    """Open a trial model, which is written into the empty `folder`, in the best way that works; closed already.

    Raises MissingDependencyError and what else `open_editor` raises.
    """
    chosen = open_editor(read_onnx_model(write_trial_model(folder)), n_threads=1)
    chosen.editor.close()
    return chosen


def write_trial_model(folder: Path) -> Path:
    """A model that looks up a token, multiplies once, and calls the result logits."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    name = "model.layers.0.attn.o_proj.MatMul.weight"
    arrays: dict[str, NDArray[Any]] = {
        "embedding": random.standard_normal((_SIZE, _SIZE)).astype(np.float32),
        f"{name}_Q4": random.integers(0, 256, (_SIZE, _SIZE // 32, 16), dtype=np.uint8),
        f"{name}_scales": random.random((_SIZE, _SIZE // 32)).astype(np.float32),
    }
    product = helper.make_node(
        "MatMulNBits", ["hidden", f"{name}_Q4", f"{name}_scales"], ["logits"], domain="com.microsoft",
        K=_SIZE, N=_SIZE, bits=4, block_size=32, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]), product],
        "trial",
        [helper.make_tensor_value_info(n, TensorProto.INT64, [1, None]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None, _SIZE])],
        [numpy_helper.from_array(values, key) for key, values in arrays.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), folder / "model.onnx")
    (folder / CONFIG_NAME).write_text(json.dumps({"model": _CONFIG}), encoding="utf-8")
    return folder


_CONFIG = {
    "type": "qwen2",
    "vocab_size": _SIZE,
    "context_length": _SIZE,
    "eos_token_id": 0,
    "decoder": {
        "filename": "model.onnx",
        "num_hidden_layers": 0,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_size": 32,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past.%d.key",
            "past_value_names": "past.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    },
}
