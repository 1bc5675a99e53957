"""libllama's functions as ctypes sees them, of whichever build was loaded: `bind_api` makes a namespace of C names.

Only what this package calls is bound, with prototypes of our own. Nothing is called here except what hands out default
values, to recognise the version.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p
from types import SimpleNamespace
from typing import Any

from persona_edge.errors import WeightAccessError
from persona_edge.runtime.llama_structs import (
    CONTEXT_LAYOUTS,
    MODEL_LAYOUTS,
    Batch,
    Layout,
    SamplerChainParams,
    matching_layouts,
)

__all__ = ["Prototypes", "bind", "bind_api", "find_symbol"]

Prototypes = Mapping[str, tuple[Any, tuple[Any, ...]]]
_MODEL = _CONTEXT = _VOCABULARY = _SAMPLER = _MEMORY = c_void_p
_TOKENS = ctypes.POINTER(c_int32)
_BYTES = c_void_p

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_EVAL_CALLBACK = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)

_PROTOTYPES: Prototypes = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG_CALLBACK, c_void_p)),
    "llama_supports_gpu_offload": (c_bool, ()),
    "llama_print_system_info": (c_char_p, ()),
    "llama_split_path": (c_int32, (c_char_p, c_size_t, c_char_p, c_int32, c_int32)),
    "llama_model_free": (None, (_MODEL,)),
    "llama_model_meta_val_str": (c_int32, (_MODEL, c_char_p, c_char_p, c_size_t)),
    "llama_model_has_encoder": (c_bool, (_MODEL,)),
    "llama_model_has_decoder": (c_bool, (_MODEL,)),
    "llama_model_n_ctx_train": (c_int32, (_MODEL,)),
    "llama_model_n_layer": (c_int32, (_MODEL,)),
    "llama_model_get_vocab": (_VOCABULARY, (_MODEL,)),
    "llama_vocab_n_tokens": (c_int32, (_VOCABULARY,)),
    "llama_vocab_bos": (c_int32, (_VOCABULARY,)),
    "llama_vocab_eos": (c_int32, (_VOCABULARY,)),
    "llama_vocab_is_eog": (c_bool, (_VOCABULARY, c_int32)),
    "llama_tokenize": (c_int32, (_VOCABULARY, c_char_p, c_int32, _TOKENS, c_int32, c_bool, c_bool)),
    "llama_detokenize": (c_int32, (_VOCABULARY, _TOKENS, c_int32, c_char_p, c_int32, c_bool, c_bool)),
    "llama_token_to_piece": (c_int32, (_VOCABULARY, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "llama_free": (None, (_CONTEXT,)),
    "llama_n_ctx": (c_uint32, (_CONTEXT,)),
    "llama_decode": (c_int32, (_CONTEXT, Batch)),
    "llama_batch_get_one": (Batch, (_TOKENS, c_int32)),
    "llama_get_logits_ith": (ctypes.POINTER(c_float), (_CONTEXT, c_int32)),
    "llama_get_memory": (_MEMORY, (_CONTEXT,)),
    "llama_memory_clear": (None, (_MEMORY, c_bool)),
    "llama_memory_seq_rm": (c_bool, (_MEMORY, c_int32, c_int32, c_int32)),
    "llama_state_seq_get_size": (c_size_t, (_CONTEXT, c_int32)),
    "llama_state_seq_get_data": (c_size_t, (_CONTEXT, _BYTES, c_size_t, c_int32)),
    "llama_state_seq_set_data": (c_size_t, (_CONTEXT, _BYTES, c_size_t, c_int32)),
    "llama_sampler_chain_default_params": (SamplerChainParams, ()),
    "llama_sampler_chain_init": (_SAMPLER, (SamplerChainParams,)),
    "llama_sampler_chain_add": (None, (_SAMPLER, _SAMPLER)),
    "llama_sampler_init_greedy": (_SAMPLER, ()),
    "llama_sampler_init_dist": (_SAMPLER, (c_uint32,)),
    "llama_sampler_init_top_k": (_SAMPLER, (c_int32,)),
    "llama_sampler_init_top_p": (_SAMPLER, (c_float, c_size_t)),
    "llama_sampler_init_min_p": (_SAMPLER, (c_float, c_size_t)),
    "llama_sampler_init_temp": (_SAMPLER, (c_float,)),
    "llama_sampler_name": (c_char_p, (_SAMPLER,)),
    "llama_sampler_accept": (None, (_SAMPLER, c_int32)),
    "llama_sampler_sample": (c_int32, (_SAMPLER, _CONTEXT, c_int32)),
    "llama_sampler_free": (None, (_SAMPLER,)),
}
_CONSTANTS: Mapping[str, object] = {
    "LLAMA_LOAD_MODE_NONE": 0,
    "LLAMA_LOAD_MODE_MMAP": 1,
    "LLAMA_FLASH_ATTN_TYPE_DISABLED": 0,
    "llama_token": c_int32,
    "llama_batch": Batch,
    "llama_log_callback": _LOG_CALLBACK,
    "ggml_backend_sched_eval_callback": _EVAL_CALLBACK,
}


class _Contents(ctypes.Structure):
    """A structure of unknown layout, returned by value: more room than any of them takes."""

    _fields_ = (("bytes", c_char * 1024),)


def bind_api(libraries: Sequence[ctypes.CDLL], description: str) -> SimpleNamespace:
    """libllama's functions, types and constants under their C names.

    `llama_model_default_params()` and `llama_context_default_params()` return structures of this library's own layout.
    Raises WeightAccessError when a function is missing or a layout is not known; `description` names the library.
    """
    functions = bind(libraries, _PROTOTYPES, description)
    model = _recognised(libraries, "llama_model_default_params", MODEL_LAYOUTS, description)
    context = _recognised(libraries, "llama_context_default_params", CONTEXT_LAYOUTS, description)
    by_value: Prototypes = {
        "llama_model_default_params": (model, ()),
        "llama_context_default_params": (context, ()),
        "llama_model_load_from_file": (_MODEL, (c_char_p, model)),
        "llama_init_from_model": (_CONTEXT, (_MODEL, context)),
    }
    functions |= bind(libraries, by_value, description)
    functions["new_penalties_sampler"] = _bind_penalties(libraries, functions, description)
    return SimpleNamespace(**functions, **_CONSTANTS)


def bind(libraries: Sequence[ctypes.CDLL], prototypes: Prototypes, description: str) -> dict[str, Any]:
    """The functions of `prototypes`, wherever in `libraries` they are; WeightAccessError names one that is nowhere."""
    functions: dict[str, Any] = {}
    for name, (result, arguments) in prototypes.items():
        function = find_symbol(libraries, name, ctypes.CFUNCTYPE(result, *arguments))
        if function is None:
            raise WeightAccessError(f"{description} does not export {name}; {_REMEDY}")
        functions[name] = function
    return functions


_REMEDY = "install a version that persona-edge knows: pip install 'llama-cpp-python==0.3.36'"


def find_symbol(libraries: Sequence[ctypes.CDLL], name: str, prototype: Any) -> Callable[..., Any] | None:
    """A function by its exported name; None when no library has it."""
    for library in libraries:
        try:
            function: Callable[..., Any] = prototype((name, library))
        except AttributeError:
            continue
        return function
    return None


def _recognised(
    libraries: Sequence[ctypes.CDLL], name: str, layouts: Sequence[Layout], description: str
) -> type[ctypes.Structure]:
    defaults = bind(libraries, {name: (_Contents, ())}, description)[name]
    fitting = matching_layouts(
        layouts, ctypes.string_at(ctypes.addressof(contents := defaults()), ctypes.sizeof(contents))
    )
    if len(fitting) != 1:
        known = ", ".join(layout.since for layout in layouts)
        raise WeightAccessError(
            f"{description}: what {name} returns has a layout that persona-edge does not know "
            f"(it knows those of llama.cpp {known}); {_REMEDY}"
        )
    return fitting[0].structure


def _bind_penalties(
    libraries: Sequence[ctypes.CDLL], functions: Mapping[str, Any], description: str
) -> Callable[[int, int, float], int]:
    """(n_vocab, last_n, repeat) to a sampler. Some versions take the size of the vocabulary first, and some do not.

    Told to look back no tokens, the sampler names itself as switched off: so much shows which argument that is.
    """
    name = "llama_sampler_init_penalties"
    floats = (c_float, c_float, c_float)
    long = bind(libraries, {name: (_SAMPLER, (c_int32, c_int32, *floats))}, description)[name]
    short = bind(libraries, {name: (_SAMPLER, (c_int32, *floats))}, description)[name]
    probe = long(1000, 0, 2.0, 0.0, 0.0)
    takes_vocabulary = functions["llama_sampler_name"](probe).startswith(b"?")
    functions["llama_sampler_free"](probe)

    def new_penalties_sampler(n_vocab: int, last_n: int, repeat: float) -> int:
        handle: int = long(n_vocab, last_n, repeat, 0.0, 0.0) if takes_vocabulary else short(last_n, repeat, 0.0, 0.0)
        return handle

    return new_penalties_sampler
