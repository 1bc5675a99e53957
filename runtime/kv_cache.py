"""What becomes of the KV cache when the weights change: forgotten, put aside for the persona's return, or kept.

Keys and values that one persona computed would colour the next one.

    reprefill   forget them; the next generation evaluates its whole prompt again
    snapshot    the same, but put a copy aside: a persona that returns finds what it had evaluated of the conversation
    keep        go on with them: no wait, and approximate; what was said so far stays as the other persona saw it

Snapshots belong to a persona at a strength, hold one state per conversation, and the least recently used go first when
they exceed their share of memory. Which of them fits is decided when the next prompt is known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from persona_edge.errors import InputError
from persona_edge.runtime.backend import Cache, CacheState
from persona_edge.runtime.values import KvPolicy

__all__ = ["KvKeeper", "WeightsKey", "common_beginning"]

WeightsKey = tuple[str | None, float]
"""Which weights computed a state: persona and strength; (None, 0.0) is the unmodified model."""


class KvKeeper:
    """Carries out one policy on one backend's cache. The caller says when the weights changed, and locks."""

    def __init__(self, cache: Cache, policy: KvPolicy = "reprefill", megabytes: int = 256) -> None:
        """`megabytes` is what all snapshots may take together. InputError for an unknown policy or a negative size."""
        if policy not in ("reprefill", "snapshot", "keep"):
            raise InputError(f"kv is {policy!r}; it must be 'reprefill', 'snapshot' or 'keep'")
        if megabytes < 0:
            raise InputError(f"kv_megabytes is {megabytes}; it must be 0 or more")
        self.policy: KvPolicy = policy
        self._cache, self._n_bytes_max = cache, megabytes * 1_000_000
        self._weights: WeightsKey = (None, 0.0)
        self._states: OrderedDict[tuple[WeightsKey, tuple[int, ...]], CacheState] = OrderedDict()
        if policy == "snapshot":
            cache.recall = self._recall

    @property
    def n_bytes(self) -> int:
        """What the snapshots take now."""
        return sum(state.data.nbytes for state in self._states.values())

    def weights_changed(self, now: WeightsKey) -> None:
        """The cache was filled by other weights than those in force from here on."""
        before, self._weights = self._weights, now
        if self.policy == "keep":
            return
        if self.policy == "snapshot":
            self._put_aside(before)
        self._cache.clear()

    def forget(self) -> None:
        """Empty the cache and drop every snapshot: a switch failed half-way, and the weights are base again."""
        self._states.clear()
        self._cache.clear()
        self._weights = (None, 0.0)

    def forget_personas(self) -> None:
        """Drop the snapshots of all but base: the same names may now mean other weights."""
        for key in [key for key in self._states if key[0] != (None, 0.0)]:
            del self._states[key]

    def _put_aside(self, weights: WeightsKey) -> None:
        state = self._cache.save_state()
        if state is None or state.data.nbytes > self._n_bytes_max:
            return
        for key, older in list(self._states.items()):  # the same conversation, further back
            if key[0] == weights and state.tokens[: len(older.tokens)] == older.tokens:
                del self._states[key]
        self._states[weights, state.tokens] = state
        while self.n_bytes > self._n_bytes_max:
            self._states.popitem(last=False)

    def _recall(self, tokens: Sequence[int]) -> None:
        """Load the state that these weights computed and that has most in common with `tokens`, if that helps."""
        mine = [(common_beginning(key[1], tokens), key) for key in self._states if key[0] == self._weights]
        n_common, best = max(mine, default=(0, None), key=lambda found: found[0])
        if best is not None and n_common > common_beginning(self._cache.cached_tokens, tokens):
            self._states.move_to_end(best)
            self._cache.load_state(self._states[best])


def common_beginning(cached: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(cached), len(wanted))
    if list(cached[:shorter]) == list(wanted[:shorter]):
        return shorter
    return next(i for i in range(shorter) if cached[i] != wanted[i])
