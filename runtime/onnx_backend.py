"""One evaluation session on a loaded ONNX model: what is in its KV cache, and the logits of the next token.

Keys and values live in buffers of our own, `n_ctx` long, to which attention appends in place, so the cache is cut by
counting: what lies behind the count is never attended to. A prompt is evaluated in batches, and a new prompt keeps the
longest common beginning that consists of whole batches: the same prompt then gives the same logits, bit for bit,
whatever was generated in between. Nothing here is locked or knows of personas.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import GenerationError, InputError
from persona_edge.onnx_model import OnnxModel
from persona_edge.runtime.backend import CacheState
from persona_edge.runtime.kv_cache import common_beginning
from persona_edge.runtime.llama_backend import default_n_threads
from persona_edge.runtime.onnx_editors import Editor
from persona_edge.runtime.onnx_geometry import Geometry
from persona_edge.runtime.onnx_runtime import load_onnxruntime
from persona_edge.runtime.onnx_sampler import OnnxSampler
from persona_edge.runtime.onnx_vocabulary import OnnxVocabulary
from persona_edge.runtime.values import SamplingOptions

__all__ = ["OnnxBackend", "onnx_n_threads"]

_MOST_LOGITS = 1 << 24  # numbers: a batch's logits take at most 64 MB
_LARGEST_BATCH = 256  # tokens


class OnnxBackend:
    """Evaluates tokens with the editor's present session. One sequence; not thread-safe."""

    def __init__(self, model: OnnxModel, editor: Editor, vocabulary: OnnxVocabulary, *, n_ctx: int = 4096) -> None:
        """`n_ctx` is capped at what the model was trained for. InputError below 1, GenerationError without memory."""
        if n_ctx < 1:
            raise InputError(f"n_ctx is {n_ctx}; it must be at least 1")
        self._runtime = load_onnxruntime()
        self._editor: Editor | None = editor
        self._geometry = Geometry.of(model)
        self.n_ctx = min(n_ctx, self._geometry.n_context)
        self.vocabulary = vocabulary
        self.n_vocab = self._geometry.n_vocab
        self._batch = min(_LARGEST_BATCH, max(16, _MOST_LOGITS // self.n_vocab // 16 * 16))
        self._cache = _Cache(self._geometry, editor.session, self.n_ctx, self._runtime)
        self._tokens: list[int] = []  # what the cache holds
        self._ends: list[int] = []  # where evaluated batches ended, ascending
        self._last: NDArray[np.float32] | None = None  # logits after the last token
        self._ticket = 0
        self.recall: Callable[[Sequence[int]], None] | None = None  # may load an earlier state that fits a new prompt

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the cache holds."""
        return tuple(self._tokens)

    def evaluate(self, tokens: Sequence[int], ticket: int | None = None) -> int:
        """Bring the cache to exactly `tokens`, 1 to `n_ctx`; the logits of the last are then at hand.

        Returns a ticket. Given back with the same tokens and one more, and with nothing in between, only that one is
        evaluated. Raises GenerationError when ONNX Runtime fails; the next call then starts from what is certain.
        """
        kept = len(tokens) - 1
        if ticket is None or ticket != self._ticket or kept != len(self._tokens):
            if self.recall is not None:
                self.recall(tokens)
            kept = self._keep(bisect.bisect_right(self._ends, common_beginning(self._tokens, tokens[:-1])))
        self._ticket += 1
        for start in range(kept, len(tokens), self._batch):
            self._last = self._run(tokens[start : start + self._batch])[-1]
        return self._ticket

    @contextmanager
    def sampler(self, options: SamplingOptions, prompt: Sequence[int] = ()) -> Iterator[Callable[[], int]]:
        """What one generation chooses its tokens by: each call is a `sample`."""
        sampler = OnnxSampler(options, prompt)
        yield lambda: self.sample(sampler)

    def sample(self, sampler: OnnxSampler) -> int:
        """The next token after those evaluated last."""
        if self._last is None:
            raise GenerationError("nothing was evaluated yet, so there is no next token")
        if np.isnan(self._last[0]):
            raise GenerationError("the model computes no numbers any more (NaN); go back to base or lower the strength")
        return sampler.choose(self._last)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position, (n_tokens, n_vocab) float32. The cache is empty before and after."""
        if not 1 <= len(tokens) <= self.n_ctx:
            raise InputError(f"{len(tokens)} tokens given; logits are computed for 1 to {self.n_ctx}")
        self.vocabulary.check(tokens)
        self.clear()
        try:
            starts = range(0, len(tokens), self._batch)
            return np.concatenate([self._run(tokens[start : start + self._batch]) for start in starts])
        finally:
            self.clear()

    def scored_logits(self, tokens: Sequence[int], n_scored: int) -> Iterator[NDArray[np.float32]]:
        """Logits that predict the last `n_scored` of `tokens`, in pieces of (at most a batch, n_vocab) float32.

        The beginning is kept for other endings where an empty cache would have been filled in the same batches, so the
        order of questions changes no bit. Raises InputError unless 1 <= n_scored < len(tokens).
        """
        tokens, n_before = list(tokens), len(tokens) - n_scored - 1
        if n_scored < 1 or n_before < 0 or len(tokens) - 1 > self.n_ctx:
            raise InputError(
                f"{n_scored} of {len(tokens)} tokens cannot be scored; give 1 to {self.n_ctx} tokens before the last"
            )
        self.vocabulary.check(tokens)
        self._ticket += 1
        n_common = common_beginning(self._tokens, tokens[:n_before])
        wanted = [*range(self._batch, n_before, self._batch), n_before]
        same = (found == end <= n_common for found, end in zip(self._ends, wanted, strict=False))
        for start in range(self._keep(sum(itertools.takewhile(bool, same))), n_before, self._batch):
            self._run(tokens[start : min(start + self._batch, n_before)])
        for start in range(n_before, len(tokens) - 1, self._batch):
            yield self._run(tokens[start : min(start + self._batch, len(tokens) - 1)])

    def save_state(self) -> CacheState | None:
        """A copy of what the cache holds; None when that is nothing."""
        if not self._tokens:
            return None
        return CacheState(tuple(self._tokens), tuple(self._ends), self._cache.copy_of(len(self._tokens)))

    def load_state(self, state: CacheState) -> None:
        """Replace the cache by `state`, which the present weights must have computed."""
        self.clear()
        self._cache.restore(state.data, len(state.tokens))
        self._tokens, self._ends = list(state.tokens), list(state.ends)

    def clear(self) -> None:
        """Forget every token: the weights changed, so their keys and values no longer hold."""
        self._ticket += 1
        self._tokens, self._ends, self._last = [], [], None

    def close(self) -> None:
        """Let go of the cache. Using the backend afterwards raises GenerationError."""
        self.clear()
        self._editor = None

    def _keep(self, n_batches: int) -> int:
        """Forget all but the first batches; returns how many tokens stay."""
        kept = self._ends[n_batches - 1] if n_batches else 0
        self._tokens, self._ends = self._tokens[:kept], self._ends[:n_batches]
        return kept

    def _run(self, chunk: Sequence[int]) -> NDArray[np.float32]:
        """Evaluate `chunk` behind what the cache holds: logits (n, n_vocab)."""
        if self._editor is None:
            raise GenerationError("this session is closed; open the model again")
        n_cached = len(self._tokens)
        if n_cached + len(chunk) > self.n_ctx:
            raise GenerationError(
                f"the context of {self.n_ctx} tokens has no room for {len(chunk)} more; open it with a larger n_ctx"
            )
        try:
            logits = self._cache.run(self._editor.session, chunk, n_cached)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            reason = " ".join(str(error).split())
            raise GenerationError(f"ONNX Runtime could not evaluate {len(chunk)} tokens ({reason:.200})") from error
        self._tokens.extend(chunk)
        self._ends.append(len(self._tokens))
        return logits


class _Cache:
    """Keys and values, and the call that extends them. Knows how much room there is, not what is in it."""

    def __init__(self, geometry: Geometry, session: Any, n_ctx: int, runtime: Any) -> None:
        self._geometry, self._runtime = geometry, runtime
        shape = (1, geometry.n_kv_heads, n_ctx, geometry.head_size)
        dtype = geometry.cache_dtype(session)
        self._wants_positions = geometry.wants_positions(session)
        try:
            self._buffers = [np.zeros(shape, dtype) for _ in geometry.past]
        except MemoryError:
            raise GenerationError(f"not enough memory for a context of {n_ctx} tokens; try a smaller n_ctx") from None
        self._values = [runtime.OrtValue.ortvalue_from_numpy(buffer) for buffer in self._buffers]
        self._ones = np.ones((1, n_ctx), np.int64)
        self._bound: tuple[Any, Any] | None = None  # a session and its binding of the buffers

    def run(self, session: Any, chunk: Sequence[int], n_cached: int) -> NDArray[np.float32]:
        """Logits (n, n_vocab) of `chunk` at positions from `n_cached` on; its keys and values are then in the cache."""
        geometry, n = self._geometry, len(chunk)
        binding = self._binding(session)
        ids = np.array([chunk], np.int64)
        mask = self._ones[:, : n_cached + n]
        at = np.arange(n_cached, n_cached + n, dtype=np.int64)[None]
        given = [(geometry.ids, ids), (geometry.mask, mask)]
        given += [(geometry.positions, at)] if self._wants_positions else []
        for name, values in given:
            binding.bind_ortvalue_input(name, self._runtime.OrtValue.ortvalue_from_numpy(values))
        binding.bind_output(geometry.logits)
        session.run_with_iobinding(binding)
        logits: NDArray[Any] = binding.get_outputs()[-1].numpy()
        return np.asarray(logits[0], np.float32)

    def copy_of(self, n: int) -> NDArray[np.uint8]:
        """Keys and values of the first `n` tokens, as flat bytes."""
        return np.concatenate(
            [np.ascontiguousarray(buffer[:, :, :n]).reshape(-1).view(np.uint8) for buffer in self._buffers]
        )

    def restore(self, data: NDArray[np.uint8], n: int) -> None:
        """Put back what `copy_of` gave for `n` tokens."""
        parts = np.split(data, len(self._buffers))
        for buffer, part in zip(self._buffers, parts, strict=True):
            shape = (buffer.shape[0], buffer.shape[1], n, buffer.shape[3])
            buffer[:, :, :n] = part.view(buffer.dtype).reshape(shape)

    def _binding(self, session: Any) -> Any:
        if self._bound is None or self._bound[0] is not session:
            binding = session.io_binding()
            for past, present, value in zip(self._geometry.past, self._geometry.present, self._values, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
            self._bound = (session, binding)
        return self._bound[1]


def onnx_n_threads(wanted: int | None) -> int:
    """`wanted`, or a thread per physical core that this process may use. InputError below 1."""
    if wanted is not None and wanted < 1:
        raise InputError(f"n_threads is {wanted}; it must be at least 1")
    return wanted or default_n_threads()
