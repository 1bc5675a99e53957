"""llama.cpp's parameter structures, which change from version to version, and how the one in hand is recognised.

The library hands out structures filled with its defaults, and takes them back by value. A layout is taken for the
library's own only if every default that it names is found where it says. The structures are read and handed back with
room after their known end: fields that a newer version appended there keep their defaults.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_bool, c_char, c_float, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

__all__ = ["CONTEXT_LAYOUTS", "MODEL_LAYOUTS", "Batch", "Layout", "SamplerChainParams", "matching_layouts"]

_ROOM = 256  # bytes after the known end
_Fields = Sequence[tuple[str, Any]]


class Batch(ctypes.Structure):
    """`llama_batch`: `n_tokens` tokens with their positions, sequences, and whether logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", ctypes.POINTER(c_int32)),
        ("embd", ctypes.POINTER(c_float)),
        ("pos", ctypes.POINTER(c_int32)),
        ("n_seq_id", ctypes.POINTER(c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class SamplerChainParams(ctypes.Structure):
    """`llama_sampler_chain_params`."""

    _fields_ = (("no_perf", c_bool),)


@dataclass(frozen=True)
class Layout:
    """One version of a structure. `since` names the build of llama.cpp that is known to have it."""

    since: str
    structure: type[ctypes.Structure]
    defaults: Mapping[str, object]

    def is_that_of(self, contents: bytes) -> bool:
        """Whether `contents`, the library's defaults with what follows them in memory, has this layout."""
        found = self.structure.from_buffer_copy(contents)
        return all(getattr(found, name) == value for name, value in self.defaults.items())


def matching_layouts(layouts: Sequence[Layout], contents: bytes) -> list[Layout]:
    """Those of `layouts` that fit; more than one, or none, means that the library is not known."""
    return [layout for layout in layouts if layout.is_that_of(contents)]


def _structure(name: str, fields: _Fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [*fields, ("_room", c_char * _ROOM)]})


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_MODEL_POINTERS = "tensor_split progress_callback progress_callback_user_data kv_overrides"


def _model_layout(since: str, integers: str, flags: str, defaults: Mapping[str, object]) -> Layout:
    fields = _fields(c_void_p, "devices tensor_buft_overrides") + _fields(c_int32, integers)
    fields += _fields(c_void_p, _MODEL_POINTERS) + _fields(c_bool, flags)
    expected: dict[str, object] = dict.fromkeys(_MODEL_POINTERS.split())
    expected |= dict.fromkeys(flags.split(), False)
    expected |= {"devices": None, "split_mode": 1, "main_gpu": 0, "use_extra_bufts": True}
    return Layout(since, _structure("llama_model_params", fields), expected | dict(defaults))


MODEL_LAYOUTS = (
    _model_layout(
        "b11067",
        "n_gpu_layers split_mode load_mode lazy_mode main_gpu",
        "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp",
        {"n_gpu_layers": -1},
    ),
    _model_layout(
        "b10069",
        "n_gpu_layers split_mode main_gpu",
        "vocab_only use_mmap use_direct_io use_mlock check_tensors use_extra_bufts no_host no_alloc",
        {"n_gpu_layers": -1, "use_mmap": True},
    ),
)

_CONTEXT_SIZES = "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max"
_CONTEXT_CHOICES = "ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"
_CONTEXT_FACTORS = "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"
_CONTEXT_FLAGS = "embeddings offload_kqv no_perf op_offload swa_full kv_unified"


def _context_layout(since: str, more_sizes: str = "", more_caches: str = "") -> Layout:
    fields = _fields(c_uint32, f"{_CONTEXT_SIZES} {more_sizes}") + _fields(c_int32, "n_threads n_threads_batch")
    fields += _fields(c_int32, _CONTEXT_CHOICES) + _fields(c_float, _CONTEXT_FACTORS)
    fields += [("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float)]
    fields += _fields(c_void_p, "cb_eval cb_eval_user_data") + _fields(c_int32, "type_k type_v")
    fields += _fields(c_size_t, more_caches) + _fields(c_void_p, "abort_callback abort_callback_data")
    fields += _fields(c_bool, _CONTEXT_FLAGS) + _fields(c_void_p, "samplers n_samplers ctx_other")
    expected: dict[str, object] = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4}
    expected |= {"n_threads_batch": 4, "ctx_type": 0, "rope_freq_base": 0.0, "yarn_orig_ctx": 0, "defrag_thold": -1.0}
    expected |= dict.fromkeys(_CONTEXT_CHOICES.split()[1:], -1) | {"type_k": 1, "type_v": 1}
    expected |= dict.fromkeys(("cb_eval", "cb_eval_user_data", "abort_callback", "abort_callback_data"))
    expected |= {"embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "kv_unified": False}
    expected |= {"swa_full": True, "samplers": None, "n_samplers": None, "ctx_other": None}
    return Layout(since, _structure("llama_context_params", fields), expected)


CONTEXT_LAYOUTS = (
    _context_layout("b11548", "n_outputs_max_per_seq", "moe_cache_size"),
    _context_layout("b11067", "n_outputs_max_per_seq"),
    _context_layout("b10069"),
)
