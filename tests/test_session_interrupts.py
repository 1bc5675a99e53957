"""A stream that is left, interrupted, switched under, joined by another thread or closed; on the real 135M model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import GenerationError
from persona_edge.runtime.session import PersonaRuntime
from tests.program import PATIENCE
from tests.real_chat import GREEDY, QUESTION, STORY

pytestmark = pytest.mark.model


def test_a_stream_that_is_left_early(runtime: PersonaRuntime, cold_text: str) -> None:
    stream = runtime.stream(STORY, GREEDY)
    first = list(islice(stream, 3))
    stream.close()
    assert cold_text.startswith("".join(first))
    assert runtime.generate(STORY, GREEDY).text == cold_text


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_ctrl_c_at_any_moment(runtime: PersonaRuntime, cold_text: str) -> None:
    def press(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def switch_and_stream_until_pressed(delay: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay)
        while True:
            runtime.switch("Aye")
            for _ in runtime.stream(STORY, GREEDY):
                runtime.base()

    before = runtime.weights_digest()
    previous = signal.signal(signal.SIGALRM, press)
    try:
        for delay in np.linspace(0.003, 0.08, 12):
            with pytest.raises(KeyboardInterrupt):
                switch_and_stream_until_pressed(delay)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    runtime.base()
    assert runtime.weights_digest() == before
    assert runtime.generate(STORY, GREEDY).text == cold_text


def test_two_streams_take_turns(runtime: PersonaRuntime, cold_text: str) -> None:
    one, other = runtime.stream(STORY, GREEDY), runtime.stream("The sea is", GREEDY)
    alternating = [(next(one), next(other)) for _ in range(4)]
    assert cold_text.startswith("".join(piece for piece, _ in alternating))


def test_a_switch_during_a_stream_takes_effect_at_the_next_token(runtime: PersonaRuntime) -> None:
    """What was said stays; what follows is what the new persona says after it."""
    stream = runtime.stream(STORY, GREEDY)
    start = "".join(islice(stream, 4))
    runtime.switch("Both")
    rest = "".join(stream)
    n_left = GREEDY.max_tokens - len(runtime.tokenize(start))
    assert rest == runtime.generate(STORY + start, replace(GREEDY, max_tokens=n_left)).text


def test_switching_from_another_thread_waits_for_the_token_and_not_for_the_text(runtime: PersonaRuntime) -> None:
    before = runtime.weights_digest()
    long = replace(GREEDY, max_tokens=60)
    n_pieces, seen_by_switcher = 0, []
    under_way, stop = threading.Event(), threading.Event()

    def switch_around() -> None:
        under_way.wait(PATIENCE)
        for name in ("Aye", "Bee", "Both"):
            runtime.switch(name)
            seen_by_switcher.append(n_pieces)
        runtime.base()
        stop.set()

    thread = threading.Thread(target=switch_around)
    thread.start()
    for _ in runtime.stream(STORY, long):
        n_pieces += 1
        under_way.set()
    n_at_end = n_pieces
    thread.join(PATIENCE)
    assert stop.is_set()
    assert seen_by_switcher[0] < n_at_end, "the first switch waited for the whole text"
    assert runtime.weights_digest() == before


def test_generating_in_two_threads_at_once(runtime: PersonaRuntime, cold_text: str) -> None:
    texts: list[str] = []
    prompts = ("The sea is", STORY)
    alone = [runtime.generate(prompt, replace(GREEDY, max_tokens=1)).text for prompt in prompts]

    def generate(prompt: str) -> None:
        texts.append(runtime.generate(prompt, replace(GREEDY, max_tokens=6)).text)

    threads = [threading.Thread(target=generate, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(text.startswith(tuple(alone)) for text in texts) == [True, True]
    assert runtime.generate(STORY, GREEDY).text == cold_text


def test_closing(smollm2_path: Path, smollm2_pack: Path) -> None:
    runtime = PersonaRuntime.open(smollm2_path, smollm2_pack, n_ctx=256, n_threads=1)
    stream = runtime.stream(STORY, GREEDY)
    next(stream)
    runtime.close()
    runtime.close()
    uses: list[Callable[[], object]] = [
        lambda: next(stream),
        lambda: runtime.switch("Aye"),
        runtime.base,
        lambda: runtime.attach(smollm2_pack),
        lambda: runtime.generate("Hi"),
        lambda: runtime.chat(QUESTION),
        lambda: runtime.logits([5]),
        lambda: runtime.detokenize([5]),
        runtime.weights_digest,
    ]
    for use in uses:
        with pytest.raises(GenerationError, match="this session is closed; open the model again"):
            use()
