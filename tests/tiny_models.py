"""Real models that take a millisecond: random weights of real architectures, with a real tokenizer and chat template.

Saved as Hugging Face folders and, for llama, as a GGUF file whose attn_q and attn_k rows lie as llama.cpp's converter
lays them. The permutation is written out row by row here, so that the code under test is compared with another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from persona_edge.contrasts import CalibrationSet, Contrast
from persona_edge.encoding import EncodedText, encode_contrast
from persona_edge.modeling import TorchModel, load_torch_model

ARCHITECTURES: Final = ("llama", "qwen2", "gemma3_text")
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
N_BLOCKS: Final = 2
HIDDEN: Final = 64
HEADS: Final = 4
KEY_VALUE_HEADS: Final = 2
HEAD_SIZE: Final = 16
FEED_FORWARD: Final = 96
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES: Final = (
    "A quiet evening with one good friend and a book is all I need.",
    "Let us invite everyone, the more the merrier, and dance until the morning!",
    "The river rises in the hills, runs past the old mill and reaches the sea after a week.",
    "Write the list first, then buy what is on it, and put the rest back where it was.",
    "I would rather wait and see what the weather does before I decide anything at all.",
)

_CONFIG: Final[dict[str, Any]] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Import it, and a module's tests use one thread: several wait for each other longer than these models run."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@cache
def tokenizer() -> Any:
    """A byte-level BPE trained on SENTENCES."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def save_folder(folder: Path, architecture: str = "llama", *, seed: int = 0, n_blocks: int = N_BLOCKS) -> Path:
    """A Hugging Face folder with random weights (biases and norms too, where the architecture has them)."""
    vocab_size = len(tokenizer())
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=vocab_size, num_hidden_layers=n_blocks, **_CONFIG
    )
    if architecture == "gemma3_text":
        config.sliding_window, config.query_pre_attn_scalar = 8, HEAD_SIZE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(source: Path, **options: Any) -> TorchModel:
    """`source` on the CPU in float32."""
    return load_torch_model(source, name="tiny", device="cpu", dtype="float32", **options)


def interleaved(weights: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Rows as GGUF has them: of each head, row 0 of the first half, row 0 of the second, row 1 of the first, …"""
    size = len(weights) // n_heads
    order = [
        head * size + half * (size // 2) + i for head in range(n_heads) for i in range(size // 2) for half in (0, 1)
    ]
    return np.ascontiguousarray(weights[order])


def save_gguf(
    path: Path,
    folder: Path,
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """The llama model in `folder` as llama.cpp's converter would write it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, N_BLOCKS)
    writer = gguf.GGUFWriter(path, "llama")
    _write_settings(writer, model.config)
    for key, tensor in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        if name == "output.weight":
            continue  # tied to the embedding
        values = tensor.numpy()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = interleaved(values, HEADS if "attn_q" in name else KEY_VALUE_HEADS)
        kind = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token, _ in vocabulary])
    merges = json.loads(tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def contrasts(n: int = 8) -> tuple[Contrast, ...]:
    """Contrasts whose answers differ in length, so that every batch needs padding."""
    lengths = (3, 9, 5, 14, 7)
    answers = [sentence.split() for sentence in SENTENCES]
    return tuple(
        Contrast(
            f"What do you do on day {i}{' of the long holiday' * (i % 3)}?",
            " ".join(answers[i % 5][: lengths[i % 5]]),
            " ".join(answers[(i + 1) % 5][: lengths[(i + 2) % 5]]),
        )
        for i in range(n)
    )


def contrast_pairs(model: TorchModel, n: int = 8) -> list[tuple[EncodedText, EncodedText]]:
    """`contrasts(n)`, encoded for `model`."""
    return [encode_contrast(model.tokenizer, contrast, i) for i, contrast in enumerate(contrasts(n))]


def calibration_set(n: int = 12, *, axis: str = "EI", first: int = 0) -> CalibrationSet:
    """`n` contrasts from number `first` on; the poles of axis `EI` are `E` and `I`."""
    return CalibrationSet(f"tiny-{axis}", axis, axis[0], axis[1], contrasts(first + n)[first:])
