"""The loop that turns a prompt into a text, one token at a time.

The lock is held for one token and never while the caller has control, so between two tokens another thread may switch
the persona. The loop notices, because its ticket no longer holds: the tokens so far are evaluated again under the new
weights and the text goes on from there in the new persona. The same makes two streams at once correct, though
slow: each drops what the other left in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from time import perf_counter

from persona_edge.runtime.backend import Backend
from persona_edge.runtime.fair_lock import FairLock
from persona_edge.runtime.text_stream import TextStream
from persona_edge.runtime.values import Completion, FinishReason, SamplingOptions

__all__ = ["generate_pieces"]


def generate_pieces(
    backend: Backend,
    lock: FairLock,
    prompt: Sequence[int],
    options: SamplingOptions,
    on_first_token: Callable[[float], None],
) -> Generator[str, None, Completion]:
    """Yields the text piece by piece, whole characters only; returns the whole.

    `prompt` has 1 to `n_ctx` tokens. `on_first_token` is called with the seconds since the first `next`. Closing the
    generator ends the generation; the cache then holds what was evaluated, for the next one to build on.
    """
    started = perf_counter()
    tokens, text = list(prompt), TextStream(options.stop)
    pieces: list[str] = []
    first_token_at = started
    reason: FinishReason | None = None
    ticket: int | None = None
    with backend.sampler(options, prompt) as next_token:
        while reason is None:
            with lock:
                ticket = backend.evaluate(tokens, ticket)
                token = next_token()
                ends = backend.vocabulary.is_end(token)
                new_bytes = backend.vocabulary.piece(token)
            if len(tokens) == len(prompt):
                first_token_at = perf_counter()
                on_first_token(first_token_at - started)
            if ends:
                reason = "stop"
                break
            tokens.append(token)
            piece = text.push(new_bytes)
            if piece:
                pieces.append(piece)
                yield piece
            reason = _reason_to_end(len(tokens), len(prompt), backend.n_ctx, options.max_tokens, text.stopped)
    rest = text.finish()
    if rest:
        pieces.append(rest)
        yield rest
    n_tokens = len(tokens) - len(prompt)
    seconds = perf_counter() - started
    return Completion("".join(pieces), len(prompt), n_tokens, first_token_at - started, seconds, reason)


def _reason_to_end(n_total: int, n_prompt: int, n_ctx: int, max_tokens: int, stopped: bool) -> FinishReason | None:
    if stopped:
        return "stop"
    if n_total - n_prompt >= max_tokens:
        return "length"
    if n_total > n_ctx:
        return "context"
    return None
