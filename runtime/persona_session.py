"""A model you can talk to, whose personas switch in place: all of it that does not depend on the backend.

There are two kinds, `PersonaRuntime` (a GGUF file on llama.cpp) and `OnnxRuntime`; `open_runtime` opens either by its
file. Code that takes any of them asks for a `PersonaSession`.

A switch edits the weights in this process's memory: everything generated from this object follows, in all threads. Keys
and values computed with the old weights would contaminate the new persona, so a switch that changes weights empties
the KV cache, and the next generation evaluates its prompt again (`kv_cache` has the alternatives).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import GenerationError, InputError
from persona_edge.maskpack import MaskPack
from persona_edge.runtime.attached import AttachedPack
from persona_edge.runtime.backend import Backend
from persona_edge.runtime.chat_template import ChatTemplate
from persona_edge.runtime.fair_lock import FairLock
from persona_edge.runtime.generation import generate_pieces
from persona_edge.runtime.kv_cache import KvKeeper
from persona_edge.runtime.placement import Placement
from persona_edge.runtime.probabilities import log_p_of_targets, log_softmax
from persona_edge.runtime.programs import PersonaProgram
from persona_edge.runtime.values import Completion, KvPolicy, Message, SamplingOptions, SwitchReport

__all__ = ["PersonaSession"]

_DEFAULT_OPTIONS = SamplingOptions()


class PersonaSession(ABC):
    """A loaded model, an optional mask pack, and one conversation's KV cache.

    Methods may be called from several threads: each waits for at most one token (or one `logits` call) of another.
    After `close` every method raises GenerationError.
    """

    def __init__(
        self, backend: Backend, chat_template: str | None, *, seed: int, kv: KvPolicy, kv_megabytes: int
    ) -> None:
        """Takes over `backend` and closes it. `chat_template` is the model's own, Jinja; None when it has none."""
        self._backend, self._seed = backend, seed
        self._kv = KvKeeper(backend, kv, kv_megabytes)
        self._lock = FairLock()
        self._template = ChatTemplate(chat_template, backend.vocabulary.bos_text, backend.vocabulary.eos_text)
        self._attached: AttachedPack | None = None
        self._last_switch: SwitchReport | None = None
        self._n_generations = 0
        self._persona: str | None = None
        self._strength = 0.0
        self._is_open = True

    @property
    @abstractmethod
    def placement(self) -> Placement:
        """Where the weights lie, and why there."""

    @property
    @abstractmethod
    def has_gpu(self) -> bool:
        """Whether the backend in use finds a GPU, so that `n_gpu_layers` has an effect."""

    @abstractmethod
    def _attached_to(self, pack: MaskPack) -> AttachedPack:
        """`pack` on this model's weights, which are base. Raises what `attach` raises for a pack that does not fit."""

    @abstractmethod
    def _digest(self) -> str:
        """What `weights_digest` gives. The caller holds the lock."""

    @abstractmethod
    def _release(self) -> None:
        """Free the model; the backend is closed already. May be called again. The caller holds the lock."""

    def attach(self, pack: str | os.PathLike[str] | MaskPack) -> None:
        """Make the personas of `pack` available, in place of those of an earlier pack.

        Goes back to base, then checks that the pack belongs to these weights: architecture, shapes, and the signs of
        sampled weights. Raises PackError, ModelMismatchError or UnsupportedModelError; the earlier pack then stays.
        """
        opened = pack if isinstance(pack, MaskPack) else MaskPack.open(Path(pack))
        with self._lock:
            self._check_open()
            if self._persona is not None:
                self._edit(None, None, 0.0)
            self._attached = self._attached_to(opened)
            self._kv.forget_personas()

    @property
    def personas(self) -> tuple[str, ...]:
        """The personas of the attached pack; none without one."""
        return () if self._attached is None else tuple(self._attached.pack.personas)

    @property
    def persona(self) -> str | None:
        """The active persona; None for the unmodified model."""
        return self._persona

    @property
    def strength(self) -> float:
        """The active persona's strength, 0 to 1; 0 for the unmodified model."""
        return self._strength

    @property
    def n_ctx(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self._backend.n_ctx

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        return self._backend.vocabulary.n_tokens

    @property
    def last_switch(self) -> SwitchReport | None:
        """The latest switch; its `seconds_to_first_token` is filled in by the generation that follows."""
        return self._last_switch

    def switch(self, persona: str, strength: float = 1.0) -> SwitchReport:
        """Edit the weights to be `persona` at `strength` (0 to 1), whatever they are now. Undone by `base`.

        Names are case-insensitive. A generation in another thread is interrupted between two tokens and goes on in the
        new persona. Raises PersonaNotFoundError, InputError, PackError or UnsupportedModelError (a quantization that
        cannot be edited), with nothing written; a failure while writing leaves the unmodified model.
        """
        strength = _checked_strength(strength)
        with self._lock:
            self._check_open()
            if self._attached is None:
                raise InputError("no mask pack is attached, so there is no persona to switch to; attach one first")
            name = self._attached.name_of(persona)
            program = self._attached.program(name, strength)
            return self._edit(program, name, strength)

    def base(self) -> SwitchReport:
        """Restore every byte of the unmodified model. The inverse of `switch`."""
        with self._lock:
            self._check_open()
            return self._edit(None, None, 0.0)

    def generate(self, prompt: str, options: SamplingOptions = _DEFAULT_OPTIONS) -> Completion:
        """Continue `prompt` as plain text. Raises InputError when it is empty or longer than the context."""
        return _run_to_end(self._start(self.tokenize(prompt), options))

    def stream(self, prompt: str, options: SamplingOptions = _DEFAULT_OPTIONS) -> Generator[str, None, Completion]:
        """Like `generate`, piece by piece as tokens come. It may be closed, or left, at any point."""
        return self._start(self.tokenize(prompt), options)

    def chat(self, messages: Sequence[Message], options: SamplingOptions = _DEFAULT_OPTIONS) -> Completion:
        """Answer a conversation, by the model's own chat template. InputError for messages that it does not accept."""
        return _run_to_end(self._start(*self._rendered(messages, options)))

    def stream_chat(
        self, messages: Sequence[Message], options: SamplingOptions = _DEFAULT_OPTIONS
    ) -> Generator[str, None, Completion]:
        """Like `chat`, piece by piece as tokens come."""
        return self._start(*self._rendered(messages, options))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits at each position of `tokens`, (n_tokens, n_vocab) float32. The KV cache is empty before and after."""
        with self._lock:
            self._check_open()
            return self._backend.logits(tokens)

    def log_probabilities(self, tokens: Sequence[int], n_scored: int) -> NDArray[np.float64]:
        """Natural log-probability of each of the last `n_scored` of `tokens`, given those before it, (n_scored,).

        Other endings of the same beginning are cheap when they are asked for next: the beginning stays in the KV cache.
        Raises InputError unless 1 <= n_scored < len(tokens).
        """
        targets = np.array(tokens[len(tokens) - n_scored :], dtype=np.int64)
        with self._lock:
            self._check_open()
            return log_p_of_targets(self._backend.scored_logits(tokens, n_scored), targets)

    def log_distributions(self, tokens: Sequence[int], n_scored: int) -> NDArray[np.float32]:
        """Log-probabilities of the whole vocabulary for each of the last `n_scored` tokens, (n_scored, n_vocab)."""
        with self._lock:
            self._check_open()
            return np.concatenate([log_softmax(part) for part in self._backend.scored_logits(tokens, n_scored)])

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids; `add_special` adds BOS where the model wants it, `parse_special` reads control tokens' names."""
        with self._lock:
            self._check_open()
            return self._backend.vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)

    def tokenize_chat(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that `chat` answers, as token ids. InputError for messages that the template does not accept."""
        return self._rendered(messages, _DEFAULT_OPTIONS)[0]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens by their names."""
        with self._lock:
            self._check_open()
            return self._backend.vocabulary.detokenize(tokens)

    def weights_digest(self) -> str:
        """SHA-256 over the weights in use, all or those that a persona may change: equal digests mean equal weights."""
        with self._lock:
            self._check_open()
            return self._digest()

    def close(self) -> None:
        """Free the model. A generation that is under way raises GenerationError at its next token."""
        with self._lock:
            self._is_open = False
            self._attached = None
            self._backend.close()
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _edit(self, program: PersonaProgram | None, persona: str | None, strength: float) -> SwitchReport:
        """Apply `program`, or restore base for None; the KV cache and the state follow. The caller holds the lock."""
        started = perf_counter()
        n_units = n_bytes = 0
        edited_at = started
        if self._attached is not None:
            self._attached.check(program)
            try:
                n_units, n_bytes = self._attached.write(program)
                edited_at = perf_counter()
                if n_units:
                    self._kv.weights_changed((persona, strength) if strength else (None, 0.0))
            except BaseException:
                self._attached.write(None)
                self._persona, self._strength = None, 0.0
                self._kv.forget()
                raise
        self._persona, self._strength = persona, strength
        seconds, kv_seconds = edited_at - started, perf_counter() - edited_at
        report = SwitchReport(persona, strength, n_units, n_bytes, seconds, kv=self._kv.policy, kv_seconds=kv_seconds)
        self._last_switch = report
        return report

    def _rendered(self, messages: Sequence[Message], options: SamplingOptions) -> tuple[list[int], SamplingOptions]:
        prompt = self._template.render(messages)
        bos = self._backend.vocabulary.bos_text
        has_bos = bool(bos) and prompt.text.startswith(bos)
        tokens = self.tokenize(prompt.text, add_special=not has_bos)
        return tokens, replace(options, stop=options.stop + prompt.stop)

    def _start(self, tokens: list[int], options: SamplingOptions) -> Generator[str, None, Completion]:
        """Check the prompt now, generate when the result is iterated over."""
        if not tokens:
            raise InputError("the prompt is empty; give at least one word")
        if len(tokens) > self.n_ctx:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, but the context holds {self.n_ctx}; "
                "shorten it, or open the model with a larger n_ctx"
            )
        if options.seed is None:
            options = replace(options, seed=(self._seed + self._n_generations) % 2**32)
        self._n_generations += 1
        return generate_pieces(self._backend, self._lock, tokens, options, self._complete_last_switch)

    def _complete_last_switch(self, seconds_to_first_token: float) -> None:
        switch = self._last_switch
        if switch is not None and switch.seconds_to_first_token is None:
            waited = switch.seconds + switch.kv_seconds + seconds_to_first_token
            self._last_switch = replace(switch, seconds_to_first_token=waited)

    def _check_open(self) -> None:
        if not self._is_open:
            raise GenerationError("this session is closed; open the model again")


def _run_to_end(pieces: Generator[str, None, Completion]) -> Completion:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            completion: Completion = end.value
            return completion


def _checked_strength(strength: float) -> float:
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"strength is {strength!r}; it must be a number between 0 (base) and 1 (the whole persona)")
    return value
