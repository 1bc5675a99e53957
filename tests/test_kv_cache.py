"""The KV cache after a switch: a snapshot gives what evaluating anew gives, to the bit, and `keep` goes on as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.errors import InputError
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.runtime import llama_backend
from persona_edge.runtime.session import KvPolicy, PersonaRuntime, SamplingOptions
from persona_edge.runtime.switcher import Switcher
from tests.tiny_chat import personas_for, write_model_and_pack

GREEDY = SamplingOptions(temperature=0, max_tokens=6)
PROMPT = "one conversation, longer than what is evaluated at once: " * 6  # a token per byte
OTHER = "another conversation " * 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_model_and_pack(path)
    return path


class Watched:
    """A session on the tiny model that counts the tokens it evaluates."""

    def __init__(self, runtime: PersonaRuntime) -> None:
        self.runtime = runtime
        self.n_evaluated = 0
        self._decode = runtime._backend._decode
        runtime._backend._decode = self._count  # type: ignore[method-assign]

    def _count(self, chunk: Sequence[int], outputs: range) -> None:
        self.n_evaluated += len(chunk)
        self._decode(chunk, outputs)

    def last_logits(self, prompt: str) -> NDArray[np.float32]:
        """What the next token after `prompt` would be chosen from."""
        backend = self.runtime._backend
        backend.evaluate(self.runtime.tokenize(prompt))
        row = backend._api.llama_get_logits_ith(backend._handle, -1)
        return np.array(np.ctypeslib.as_array(row, (self.runtime.n_vocab,)))

    def evaluated_by(self, prompt: str) -> int:
        """How many tokens generating from `prompt` evaluates before the first token."""
        before = self.n_evaluated
        self.runtime.generate(prompt, SamplingOptions(max_tokens=1))
        return self.n_evaluated - before


@contextmanager
def watched(folder: Path, kv: KvPolicy, megabytes: int = 256) -> Iterator[Watched]:
    pack = folder / "tiny.mbti.maskpack"
    with PersonaRuntime.open(folder / "tiny.gguf", pack, n_threads=1, kv=kv, kv_megabytes=megabytes) as runtime:
        yield Watched(runtime)


def test_a_snapshot_gives_the_logits_of_evaluating_anew(folder: Path) -> None:
    found = {}
    for kv in ("reprefill", "snapshot"):
        with watched(folder, kv) as session:
            for persona in ("INFP", "ENTJ"):
                session.runtime.switch(persona)
                session.runtime.generate(PROMPT, GREEDY)
            session.runtime.switch("INFP")
            before = session.n_evaluated
            found[kv] = session.last_logits(PROMPT), session.n_evaluated - before
            session.runtime.base()
            session.runtime.switch("ENTJ")
            assert not np.array_equal(session.last_logits(PROMPT), found[kv][0])
    n_tokens = len(PROMPT.encode())
    assert np.array_equal(found["reprefill"][0], found["snapshot"][0])
    assert found["reprefill"][1] == n_tokens
    assert found["snapshot"][1] == n_tokens - 256


def test_a_conversation_goes_on_as_if_there_had_been_no_switch(folder: Path) -> None:
    logits = []
    for detour in (False, True):
        with watched(folder, "snapshot") as session:
            session.runtime.switch("INFP")
            said = PROMPT + session.runtime.generate(PROMPT, GREEDY).text
            if detour:
                session.runtime.switch("ENTJ")
                session.runtime.generate(said + " and you?", GREEDY)
                session.runtime.switch("INFP")
            logits.append(session.last_logits(said + " go on"))
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.model
def test_a_snapshot_of_the_real_model(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_backend, "_BATCH", 32)
    pack = MaskPack.from_bytes(encode_pack(personas_for(smollm2_path, blocks=(2,)))[0])
    prompt, logits = "The old lighthouse keeper climbed the stairs. " * 7, []
    for kv in ("reprefill", "snapshot"):
        with PersonaRuntime.open(smollm2_path, pack, n_ctx=128, n_threads=1, kv=kv) as runtime:
            session = Watched(runtime)
            for persona in ("INFP", "ENTJ", "INFP"):
                runtime.switch(persona)
                before = session.n_evaluated
                row = session.last_logits(prompt)
            logits.append(row)
            assert (session.n_evaluated - before < 32) is (kv == "snapshot")
    assert np.array_equal(logits[0], logits[1])


def test_each_conversation_and_each_strength_has_its_own(folder: Path) -> None:
    with watched(folder, "snapshot") as session:
        switch = session.runtime.switch
        for persona, strength, prompt in (
            ("INFP", 1.0, PROMPT),
            ("ENTJ", 1.0, PROMPT),
            ("INFP", 1.0, OTHER),
            ("INFP", 0.5, OTHER),
            ("ENTJ", 1.0, OTHER),
        ):
            switch(persona, strength)
            assert session.evaluated_by(prompt) == len(prompt.encode())
        switch("INFP")
        assert session.evaluated_by(OTHER) == len(OTHER.encode()) - 256
        switch("ENTJ", 0.2)
        switch("INFP", 0.5)
        assert session.evaluated_by(PROMPT) == len(PROMPT.encode())
        switch("ENTJ", 0.2)
        switch("INFP")
        assert session.evaluated_by(PROMPT) == len(PROMPT.encode()) - 256


def test_base_is_a_persona_too_and_strength_zero_is_base(folder: Path) -> None:
    with watched(folder, "snapshot") as session:
        session.evaluated_by(PROMPT)
        session.runtime.switch("INFP")
        session.runtime.switch("ENTJ", 0)
        assert session.evaluated_by(PROMPT) == len(PROMPT.encode()) - 256


def test_a_longer_state_replaces_its_own_beginning(folder: Path) -> None:
    with watched(folder, "snapshot") as session:
        for prompt in (PROMPT, PROMPT + "more", PROMPT + "more and more"):
            session.evaluated_by(prompt)
            session.runtime.switch("INFP")
            session.runtime.base()
        assert len(session.runtime._kv._states) == 1


def test_memory_is_bounded_and_the_least_recently_used_goes_first(folder: Path) -> None:
    with watched(folder, "snapshot") as session:
        keeper = session.runtime._kv
        session.evaluated_by(PROMPT)
        session.runtime.switch("INFP")
        one = keeper.n_bytes
        assert one > 256 * 2 * 64 * 2 * 2  # keys and values of 256 tokens, two layers of 64, in 16 bits
        keeper._n_bytes_max = int(2.5 * one)
        session.evaluated_by(PROMPT)
        session.runtime.switch("ENTJ")
        session.evaluated_by(PROMPT)
        session.runtime.base()
        session.evaluated_by(PROMPT)  # base's is used, so INFP's is the oldest
        session.runtime.switch("E")
        session.evaluated_by(PROMPT)
        session.runtime.base()
        assert keeper.n_bytes <= keeper._n_bytes_max
        assert [key[0] for key in keeper._states] == [(None, 0.0), ("E", 1.0)]


def test_no_memory_is_evaluating_anew(folder: Path) -> None:
    with watched(folder, "snapshot", megabytes=0) as session:
        session.evaluated_by(PROMPT)
        session.runtime.switch("INFP")
        session.runtime.base()
        assert session.evaluated_by(PROMPT) == len(PROMPT.encode())
        assert session.runtime._kv.n_bytes == 0


def test_a_state_that_cannot_be_loaded_is_evaluating_anew(folder: Path) -> None:
    with watched(folder, "snapshot") as session:
        expected = session.last_logits(PROMPT)
        session.runtime.switch("INFP")
        session.runtime.base()
        [state] = session.runtime._kv._states.values()
        state.data[:16] ^= 0xFF
        before = session.n_evaluated
        assert np.array_equal(session.last_logits(PROMPT), expected)
        assert session.n_evaluated - before == len(PROMPT.encode())


def test_keeping_goes_on_without_reading_again(folder: Path) -> None:
    with watched(folder, "keep") as session:
        session.runtime.generate(PROMPT, GREEDY)
        cached = session.runtime._backend.cached_tokens
        session.runtime.switch("INFP")
        assert session.runtime._backend.cached_tokens == cached
        kept = session.last_logits(PROMPT)
        assert session.evaluated_by(PROMPT + "x") < 64
    with watched(folder, "reprefill") as session:
        session.runtime.switch("INFP")
        assert not np.array_equal(session.last_logits(PROMPT), kept)  # approximate


@pytest.mark.parametrize(("kv", "n_more"), [("reprefill", 300), ("snapshot", 300), ("keep", 0)])
def test_a_switch_in_the_middle_of_a_text(folder: Path, kv: KvPolicy, n_more: int) -> None:
    with watched(folder, kv) as session:
        stream = session.runtime.stream(PROMPT, GREEDY)
        list(islice(stream, 2))
        before = session.n_evaluated
        session.runtime.switch("INFP")
        rest = list(stream)
        assert rest
        assert n_more <= session.n_evaluated - before <= n_more + 64


@pytest.mark.parametrize("kv", ["reprefill", "snapshot", "keep"])
def test_what_a_switch_reports(folder: Path, kv: KvPolicy) -> None:
    with watched(folder, kv) as session:
        session.runtime.generate(PROMPT, GREEDY)
        report = session.runtime.switch("INFP")
        assert report.kv == kv
        assert 0 <= report.kv_seconds < 10
        completion = session.runtime.generate(PROMPT, GREEDY)
        after = session.runtime.last_switch
        assert after is not None
        waited = report.seconds + report.kv_seconds + completion.seconds_to_first_token
        assert after.seconds_to_first_token == pytest.approx(waited)


def test_after_a_failure_no_state_is_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Switcher.apply

    def failing(*arguments: object) -> None:
        apply(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with watched(folder, "snapshot") as session:
        expected = session.last_logits(PROMPT)
        session.runtime.switch("INFP")
        session.evaluated_by(PROMPT)
        with monkeypatch.context() as patch:
            patch.setattr(Switcher, "apply", failing)
            with pytest.raises(KeyboardInterrupt):
                session.runtime.switch("ENTJ")
        assert session.runtime._kv.n_bytes == 0
        assert np.array_equal(session.last_logits(PROMPT), expected)


def test_another_pack_has_other_personas(folder: Path) -> None:
    with watched(folder, "snapshot") as session:
        for persona in ("INFP", "ENTJ"):
            session.evaluated_by(PROMPT)
            session.runtime.switch(persona)
        session.runtime.attach(folder / "tiny.mbti.maskpack")
        assert [key[0] for key in session.runtime._kv._states] == [(None, 0.0)]


@pytest.mark.parametrize(
    ("bad", "message"), [({"kv": "half"}, "kv is 'half'"), ({"kv_megabytes": -1}, "is -1; it must")]
)
def test_policies_that_are_none(folder: Path, bad: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PersonaRuntime.open(folder / "tiny.gguf", **bad)  # type: ignore[arg-type]
