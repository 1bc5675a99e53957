"""A chat model that takes a millisecond: a llama of one layer with random weights that speaks in single bytes.

What it says is noise, control characters and broken UTF-8 included, which is what a chat has to be able to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from persona_edge.chat_values import Answer, Speaker, Switch
from persona_edge.maskpack import write_pack
from persona_edge.masks import Granularity, ModelIdentity, PersonaSet, Plane, Pole, TensorShape
from persona_edge.runtime.dequantize import dequantize
from persona_edge.runtime.llama_weights import LlamaModel, find_tensors
from persona_edge.sketch import sample_signs

WIDTH, N_TOKENS, N_CONTEXT = 64, 260, 512
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}S:{% elif m['role'] == 'user' %}U:{% else %}A:{% endif %}"
    "{{ m['content'] }}\n{% endfor %}A:"
)
PERSONAS = {"INFP": ("I", "N"), "ENTJ": ("E", "N"), "I": ("I",), "E": ("E",), "N": ("N",), "night owl": ("E", "I")}


def write_model(
    path: Path,
    *,
    seed: int = 0,
    chat_template: str | None = TEMPLATE,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
) -> Path:
    """A GGUF that answers; another seed is another model of the same shape."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_eos_token_id(add_byte_vocabulary(writer))
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    random = np.random.default_rng(seed)
    for name, shape in _shapes().items():
        weights = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.abs(weights))
        else:
            blocks = gguf.quants.quantize(weights, quantization)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_vocabulary(writer: gguf.GGUFWriter) -> int:
    """A token per byte, then special tokens up to N_TOKENS; the number of the first special one."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]  # GPT-2's names of the bytes
    specials = [f"<{i}>" for i in range(N_TOKENS - len(alphabet))]
    writer.add_token_list([chr(c) for c in alphabet] + specials)
    writer.add_token_types([1] * len(alphabet) + [3] * len(specials))
    writer.add_token_merges(["a b"])
    return len(alphabet)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (N_TOKENS, WIDTH), "output": (N_TOKENS, WIDTH)}
    shapes["output_norm"] = (WIDTH,)
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (2 * WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (WIDTH, 2 * WIDTH)}
        shapes |= {f"blk.{block}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    return shapes


def personas_for(
    model_path: Path,
    *,
    personas: Mapping[str, tuple[str, ...]] = PERSONAS,
    report: Mapping[str, Any] | None = None,
    blocks: Sequence[int] = (0, 1),
) -> PersonaSet:
    """Random masks over some blocks of any GGUF, and the sketch of those weights. The poles are E, I, S and N."""
    model = LlamaModel(model_path)
    prefixes = tuple(f"blk.{block}." for block in blocks)
    tensors = [t for name, t in find_tensors(model).items() if name.startswith(prefixes) and t.n_rows > 1]
    shapes = tuple(TensorShape(t.name, t.n_rows, t.n_columns) for t in tensors)
    sketch = {}
    for tensor in tensors:
        weights = dequantize(tensor.data, tensor.ggml_type, np.arange(tensor.n_rows * tensor.n_columns))
        sketch[tensor.name] = sample_signs(weights.reshape(tensor.n_rows, tensor.n_columns))
    identity = ModelIdentity(model.architecture, shapes, sketch)
    model.close()
    random = np.random.default_rng(7)
    poles = tuple(
        Pole(name, axis, (random_plane(random, shapes, gate=0.0, share=0.2), random_plane(random, shapes, gate=1.5)))
        for name, axis in (("E", "EI"), ("I", "EI"), ("S", "SN"), ("N", "SN"))
    )
    return PersonaSet(identity, poles, personas, report or {})


def random_plane(
    random: np.random.Generator,
    shapes: Sequence[TensorShape],
    *,
    gate: float,
    share: float = 0.05,
    granularity: Granularity = 32,
) -> Plane:
    """A plane over about `share` of the units of each of `shapes`, at least one."""
    positions = {}
    for shape in shapes:
        n_units = shape.n_units(granularity)
        chosen = random.choice(n_units, max(1, int(share * n_units)), replace=False)
        positions[shape.name] = np.sort(chosen).astype(np.uint32)
    return Plane(gate, positions, granularity)


def write_model_and_pack(folder: Path, name: str = "tiny") -> Path:
    """`<name>.gguf` in `folder`, with its pack `<name>.mbti.maskpack` beside it."""
    model = write_model(folder / f"{name}.gguf")
    write_pack(folder / f"{name}.mbti.maskpack", personas_for(model))
    return model


class RecordedOutput:
    """A chat's output as a list: (what, value). Pieces of an answer are joined to the text under "pieces"."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.answers: list[Answer] = []
        self.switches: list[Switch] = []

    def texts(self, kind: str) -> list[str]:
        """The values of all events of one kind."""
        return [value for found, value in self.events if found == kind]

    def note(self, text: str) -> None:
        self.events.append(("note", text))

    def show(self, text: str) -> None:
        self.events.append(("show", text))

    def problem(self, text: str) -> None:
        self.events.append(("problem", text))

    def comparison_begins(self, question: str) -> None:
        self.events.append(("compare", question))

    def comparison_ends(self, switches: Sequence[Switch]) -> None:
        self.switches = list(switches)

    def answer_begins(self, speaker: Speaker, strength: float) -> None:
        self.events += [("speaker", speaker), ("pieces", "")]

    def answer_piece(self, text: str) -> None:
        self.events[-1] = ("pieces", self.events[-1][1] + text)

    def answer_ends(self, answer: Answer) -> None:
        self.answers.append(answer)
