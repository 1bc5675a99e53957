"""The whole line on the real 135M model, as a user goes it: export, Ctrl-C and resume, chat.

One export serves all tests (conftest.py). It is the real program on less data: a dozen of the shipped neutral prompts
and passages, short answers, and a checkpoint after every batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from persona_edge.maskpack import MaskPack
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import Message, SamplingOptions
from tests.workplace import LESS_DATA, Exported, Workplace, n_batches

pytestmark = pytest.mark.model

GREEDY = SamplingOptions(temperature=0, max_tokens=24)
QUESTION = "What does your desk look like?"
ASKED: list[Message] = [{"role": "user", "content": QUESTION}]


# Export


def test_ctrl_c_leaves_no_pack(exported: Exported) -> None:
    interrupted = exported.interrupted
    assert interrupted.returncode == 130, interrupted.stderr
    assert interrupted.stderr.splitlines()[-1] == "persona-edge: error: interrupted"
    assert "Traceback" not in interrupted.stderr
    assert exported.files_after_interrupt == ("smollm2.gguf", "tidiness.jsonl")


def test_a_resumed_export_computes_only_what_is_missing(exported: Exported, tmp_path: Path) -> None:
    first, second = n_batches(exported.interrupted), n_batches(exported.resumed)
    assert exported.resumed.returncode == 0, exported.resumed.stderr
    assert first >= 1
    again = exported.place.run(*exported.place.export_arguments("--output", tmp_path / "again"), prelude=LESS_DATA)
    assert again.returncode == 0, again.stderr
    assert n_batches(again) == 0
    assert (tmp_path / "again").read_bytes() == exported.place.pack.read_bytes()
    # The batch that was under way when Ctrl-C came may have been computed twice, none before it.
    statistics = len(list(exported.place.cache.rglob("*.safetensors")))
    assert statistics == 4  # web text, chat turns, contrasts by halves
    assert second >= statistics - 1
    assert not list(exported.place.cache.rglob("*.partial"))


def test_the_pack_says_what_it_is(packed: Workplace) -> None:
    pack = MaskPack.open(packed.pack)
    assert tuple(pack.personas) == ("tidy", "messy")
    assert pack.identity.architecture == "llama"
    assert len(pack.identity.tensors) == 30 * 7
    for plane in pack.summary().planes:
        assert plane.n_positions > 0
    masks = {name: pack.pole(name).planes[0].positions for name in ("tidy", "messy")}
    for tensor in masks["tidy"].keys() & masks["messy"].keys():
        assert not np.intersect1d(masks["tidy"][tensor], masks["messy"][tensor]).size


# The runtime


def test_base_to_a_to_b_to_base_is_where_it_began(packed: Workplace) -> None:
    with PersonaRuntime.open(packed.model, n_ctx=256, n_threads=1) as cold:
        cold_digest, cold_text = cold.weights_digest(), cold.chat(ASKED, GREEDY).text
    with PersonaRuntime.open(packed.model, packed.pack, n_ctx=256, n_threads=1) as runtime:
        texts, digests = [], []
        for persona in (None, "tidy", "messy", None):
            if persona is None:
                runtime.base()
            else:
                runtime.switch(persona)
            digests.append(runtime.weights_digest())
            texts.append(runtime.chat(ASKED, GREEDY).text)
    assert digests[0] == digests[3] == cold_digest
    assert texts[0] == texts[3] == cold_text
    assert len(set(digests)) == 3
    assert texts[1] != cold_text


def test_chat_finds_the_pack_beside_the_model(packed: Workplace) -> None:
    asked: list[str | Path] = ["--message", QUESTION, "--temperature", "0", "--max-tokens", "24", "--threads", "1"]
    base = packed.run("chat", "--model", packed.model, *asked)
    tidy = packed.run("chat", "--model", packed.model, "--persona", "tidy", *asked)
    for result in (base, tidy):
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
    assert tidy.stdout != base.stdout
