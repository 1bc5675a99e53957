"""One evaluation session on a loaded llama.cpp model: what is in the KV cache, and how the next token comes out of it.

The backend remembers which tokens the cache holds and where evaluated batches ended. For a new prompt it keeps the
longest common beginning that consists of whole batches. The rounding of an evaluation depends on how tokens were
batched, and quantized activations turn a last-bit difference into a visible one; kept this way, the same prompt gives
the same logits, bit for bit, whatever was generated in between. (What a reply left in the cache was evaluated token by
token; a conversation goes on from that, as in every llama.cpp chat.)

Nothing here is locked or knows of personas: `generation` and `session` see to that.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import GenerationError, InputError
from persona_edge.runtime.backend import CacheState
from persona_edge.runtime.kv_cache import common_beginning
from persona_edge.runtime.llama_vocabulary import LlamaVocabulary
from persona_edge.runtime.llama_weights import LlamaModel
from persona_edge.runtime.values import SamplingOptions

__all__ = ["LlamaBackend", "Sampler", "default_n_threads"]

_BATCH = 256  # tokens evaluated at once: the granularity at which a prompt's beginning is reused
_LOGITS_BATCH = 64  # rows of logits computed at once; bounds a buffer of that many times n_vocab floats
_PENALTY_WINDOW = 64  # tokens that repeat_penalty looks back


class LlamaBackend:
    """Evaluates tokens with the model's present weights. One sequence; not thread-safe."""

    def __init__(self, model: LlamaModel, *, n_ctx: int = 4096, n_threads: int | None = None) -> None:
        """`n_ctx` is capped at what the model was trained for; `n_threads` None means `default_n_threads()`.

        Raises InputError for values below 1, GenerationError when the memory does not suffice.
        """
        for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        self._api = model.library.api
        self._model = model
        self.n_threads = n_threads or default_n_threads()
        self._context: int | None = self._make_context(n_ctx)
        self._finalizer = weakref.finalize(self, _free_context, self._api, self._context, model)
        self.n_ctx = int(self._api.llama_n_ctx(self._context))
        self.vocabulary = LlamaVocabulary(model)
        self._batch = _Batch(self._api, _BATCH)
        self._tokens: list[int] = []  # what the cache holds
        self._ends: list[int] = []  # where evaluated batches ended, ascending
        self._cache_is_known = True
        self._ticket = 0
        self.recall: Callable[[Sequence[int]], None] | None = None  # may load an earlier state that fits a new prompt

    def _make_context(self, n_ctx: int) -> int:
        params = self._api.llama_context_default_params()
        params.n_ctx = min(n_ctx, self._api.llama_model_n_ctx_train(self._model.handle))
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self.n_threads
        params.offload_kqv = params.op_offload = self._model.n_gpu_layers > 0
        params.no_perf = True
        params.swa_full = True  # or dropping the end of the cache would be impossible with sliding-window attention
        params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if hasattr(params, "n_outputs_max"):
            params.n_outputs_max = _LOGITS_BATCH
        self._model.library.listen()
        context: int | None = self._api.llama_init_from_model(self._model.handle, params)
        if not context:
            reason = self._model.library.log.first_error() or "no reason given"
            raise GenerationError(f"cannot make a context of {params.n_ctx} tokens ({reason}); try a smaller n_ctx")
        return context

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the cache holds."""
        return tuple(self._tokens)

    def evaluate(self, tokens: Sequence[int], ticket: int | None = None) -> int:
        """Bring the cache to exactly `tokens`, at least one and at most `n_ctx`; logits of the last are then at hand.

        Returns a ticket. When it is given back with the same tokens and one more, and nothing happened in between, only
        that one is evaluated; otherwise the beginning that still holds is kept and the rest evaluated.
        Raises GenerationError when llama.cpp fails; the next call then starts from what is certain.
        """
        kept = len(tokens) - 1
        if ticket is None or ticket != self._ticket or kept != len(self._tokens) or not self._cache_is_known:
            if self.recall is not None:
                self.recall(tokens)
            kept = self._keep_beginning_of(tokens)
        self._ticket += 1
        for start in range(kept, len(tokens), _BATCH):
            chunk = tokens[start : start + _BATCH]
            is_last = start + len(chunk) == len(tokens)
            self._decode(chunk, range(len(chunk) - 1, len(chunk)) if is_last else range(0))
        return self._ticket

    @contextmanager
    def sampler(self, options: SamplingOptions, prompt: Sequence[int] = ()) -> Iterator[Callable[[], int]]:
        """What one generation chooses its tokens by: each call is a `sample`."""
        with Sampler(self, options, prompt) as sampler:
            yield lambda: self.sample(sampler)

    def sample(self, sampler: Sampler) -> int:
        """The next token after those evaluated last."""
        first_logit = self._api.llama_get_logits_ith(self._handle, -1)[0]
        if math.isnan(first_logit):
            raise GenerationError("the model computes no numbers any more (NaN); go back to base or lower the strength")
        return int(self._api.llama_sampler_sample(sampler.handle, self._handle, -1))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position, (n_tokens, n_vocab) float32. The cache is empty before and after.

        Raises InputError for no tokens, unknown ones, or more than `n_ctx`; GenerationError when llama.cpp fails.
        """
        if not 1 <= len(tokens) <= self.n_ctx:
            raise InputError(f"{len(tokens)} tokens given; logits are computed for 1 to {self.n_ctx}")
        self.vocabulary.check(tokens)
        n_vocab = self.vocabulary.n_tokens
        logits = np.empty((len(tokens), n_vocab), np.float32)
        self.clear()
        try:
            for start in range(0, len(tokens), _LOGITS_BATCH):
                chunk = tokens[start : start + _LOGITS_BATCH]
                self._decode(chunk, range(len(chunk)))
                for i in range(len(chunk)):
                    row = self._api.llama_get_logits_ith(self._handle, i)
                    logits[start + i] = np.ctypeslib.as_array(row, (n_vocab,))
        finally:
            self.clear()
        return logits

    def scored_logits(self, tokens: Sequence[int], n_scored: int) -> Iterator[NDArray[np.float32]]:
        """Logits that predict the last `n_scored` of `tokens`, in pieces of (at most 64, n_vocab) float32.

        What comes before the scored tokens is evaluated once for all endings that are asked for one after another. It
        is kept only where an empty cache would have been filled in the same batches, so the order of questions changes
        no bit. Raises InputError for unknown or too many tokens, and unless 1 <= n_scored < len(tokens).
        """
        n_before = len(tokens) - n_scored - 1
        if n_scored < 1 or n_before < 0 or len(tokens) - 1 > self.n_ctx:
            raise InputError(
                f"{n_scored} of {len(tokens)} tokens cannot be scored; give 1 to {self.n_ctx} tokens before the last"
            )
        tokens = list(tokens)
        self.vocabulary.check(tokens)
        n_vocab = self.vocabulary.n_tokens
        self._ticket += 1
        for start in range(self._keep_batches_of(tokens[:n_before]), n_before, _BATCH):
            self._decode(tokens[start : min(start + _BATCH, n_before)], range(0))
        for start in range(n_before, len(tokens) - 1, _LOGITS_BATCH):
            chunk = tokens[start : min(start + _LOGITS_BATCH, len(tokens) - 1)]
            self._decode(chunk, range(len(chunk)))
            logits = np.empty((len(chunk), n_vocab), np.float32)
            for i in range(len(chunk)):
                logits[i] = np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._handle, i), (n_vocab,))
            yield logits

    def clear(self) -> None:
        """Forget every token: the weights changed, so their keys and values no longer hold."""
        self._ticket += 1
        self._cache_is_known = False
        self._tokens, self._ends = [], []
        # False: forget the entries without overwriting the cache's memory, which at 4096 tokens takes longer than a
        # switch. No token attends to a forgotten entry.
        self._api.llama_memory_clear(self._memory, False)
        self._cache_is_known = True

    def save_state(self) -> CacheState | None:
        """A copy of the cache; None when it is empty, or llama.cpp cannot copy it."""
        if not self._tokens or not self._cache_is_known:
            return None
        data = np.empty(self._api.llama_state_seq_get_size(self._handle, 0), np.uint8)
        n_bytes = self._api.llama_state_seq_get_data(self._handle, data.ctypes.data, data.nbytes, 0)
        return CacheState(tuple(self._tokens), tuple(self._ends), data) if n_bytes == data.nbytes else None

    def load_state(self, state: CacheState) -> None:
        """Replace the cache by `state`, which the present weights must have computed; by nothing when that fails."""
        self.clear()
        self._cache_is_known = False
        data = state.data
        if self._api.llama_state_seq_set_data(self._handle, data.ctypes.data, data.nbytes, 0):
            self._tokens, self._ends = list(state.tokens), list(state.ends)
            self._cache_is_known = True
        else:
            self.clear()

    def close(self) -> None:
        """Free the context, not the model. Using the backend afterwards raises GenerationError."""
        self._context = None
        self._finalizer()

    @property
    def _handle(self) -> int:
        if self._context is None:
            raise GenerationError("this session is closed; open the model again")
        return self._context

    @property
    def _memory(self) -> int:
        memory: int = self._api.llama_get_memory(self._handle)
        return memory

    def _keep_beginning_of(self, tokens: Sequence[int]) -> int:
        """Drop what `tokens` does not begin with from the cache; returns how many tokens stay, fewer than given."""
        n_common = common_beginning(self._tokens, tokens[:-1])
        return self._keep(bisect.bisect_right(self._ends, n_common))

    def _keep_batches_of(self, tokens: Sequence[int]) -> int:
        """As `_keep_beginning_of`, but only batches that `tokens` alone would have made; maybe all of them."""
        n_common = common_beginning(self._tokens, tokens)
        ends = [*range(_BATCH, len(tokens), _BATCH), len(tokens)]
        same = (found == wanted <= n_common for found, wanted in zip(self._ends, ends, strict=False))
        return self._keep(sum(itertools.takewhile(bool, same)))

    def _keep(self, n_batches: int) -> int:
        """Drop all but the first batches from the cache; returns how many tokens stay."""
        kept = self._ends[n_batches - 1] if n_batches else 0
        if kept == len(self._tokens) and self._cache_is_known:
            return kept
        self._cache_is_known = False
        if kept == 0 or not self._api.llama_memory_seq_rm(self._memory, 0, kept, -1):
            self.clear()  # a recurrent model's memory cannot be cut
            return 0
        self._tokens, self._ends = self._tokens[:kept], self._ends[:n_batches]
        self._cache_is_known = True
        return kept

    def _decode(self, chunk: Sequence[int], outputs: range) -> None:
        batch = self._batch.fill(chunk, len(self._tokens), outputs)
        self._cache_is_known = False  # until the call is back: Ctrl-C may strike right after it
        code = self._api.llama_decode(self._handle, batch)
        if code:
            raise GenerationError(_decode_failure(code, len(chunk), self.n_ctx))
        self._tokens.extend(chunk)
        self._ends.append(len(self._tokens))
        self._cache_is_known = True


def _free_context(api: SimpleNamespace, context: int, _model: LlamaModel) -> None:
    """Free `context`; being handed the model keeps the garbage collector from freeing that first."""
    api.llama_free(context)


class _Batch:
    """A `llama_batch` for one sequence, with its memory, used again and again."""

    def __init__(self, api: SimpleNamespace, capacity: int) -> None:
        self._token = np.zeros(capacity, np.int32)
        self._position = np.zeros(capacity, np.int32)
        self._n_sequences = np.ones(capacity, np.int32)
        self._wants_output = np.zeros(capacity, np.int8)
        self._sequence = ctypes.c_int32(0)
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._sequences = (pointer * capacity)(*[ctypes.pointer(self._sequence)] * capacity)
        self._batch: ctypes.Structure = api.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(pointer),
            pos=self._position.ctypes.data_as(pointer),
            n_seq_id=self._n_sequences.ctypes.data_as(pointer),
            seq_id=self._sequences,
            logits=self._wants_output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, tokens: Sequence[int], first_position: int, outputs: range) -> ctypes.Structure:
        n = len(tokens)
        self._token[:n] = tokens
        self._position[:n] = np.arange(first_position, first_position + n)
        self._wants_output[:n] = 0
        self._wants_output[outputs.start : outputs.stop] = 1
        self._batch.n_tokens = n
        return self._batch


class Sampler:
    """A chain of llama.cpp samplers for one generation. A context manager; `handle` is the `llama_sampler *`."""

    def __init__(self, backend: LlamaBackend, options: SamplingOptions, prompt: Sequence[int] = ()) -> None:
        """`prompt` is what `repeat_penalty` counts as already said; `options.seed` None counts as 0."""
        api = self._api = backend._api
        self.handle = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        self._finalizer = weakref.finalize(self, api.llama_sampler_free, self.handle)
        if options.repeat_penalty != 1:
            n_vocab = backend.vocabulary.n_tokens
            self._add(api.new_penalties_sampler(n_vocab, _PENALTY_WINDOW, options.repeat_penalty))
        if options.temperature == 0:
            self._add(api.llama_sampler_init_greedy())
        else:
            self._add(api.llama_sampler_init_top_k(options.top_k))
            self._add(api.llama_sampler_init_top_p(options.top_p, 1))
            self._add(api.llama_sampler_init_min_p(options.min_p, 1))
            self._add(api.llama_sampler_init_temp(options.temperature))
            self._add(api.llama_sampler_init_dist(options.seed or 0))
        for token in prompt[-_PENALTY_WINDOW:]:
            api.llama_sampler_accept(self.handle, token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finalizer()

    def _add(self, sampler: int) -> None:
        self._api.llama_sampler_chain_add(self.handle, sampler)


def default_n_threads() -> int:
    """How many physical cores this process may use: hyper-threads share the units that matrix products keep busy."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
                cores.add(file.read().strip())
        except OSError:
            cores.add(str(cpu))
    return min(len(cores), _cpu_quota())


def _cpu_quota() -> int:
    """CPUs that a container's control group grants, rounded up; a huge number when it sets no limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        return 1 << 16


def _decode_failure(code: int, n_tokens: int, n_ctx: int) -> str:
    if code == 1:
        return f"the context of {n_ctx} tokens has no room for {n_tokens} more; open the model with a larger n_ctx"
    return f"llama.cpp could not evaluate {n_tokens} tokens (code {code}); try again, or open the model again"
