"""Code written for a PersonaSession takes a GGUF file and an ONNX folder alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_edge.maskpack import write_pack
from persona_edge.runtime.onnx_session import OnnxRuntime
from persona_edge.runtime.open_runtime import open_runtime
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.session import Message, PersonaRuntime, SamplingOptions
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]

KINDS: list[type[PersonaSession]] = [PersonaRuntime, OnnxRuntime]
QUESTION: list[Message] = [{"role": "user", "content": "A quiet evening?"}]


def _answer(session: PersonaSession, persona: str) -> str:
    """What a user's function for either backend looks like."""
    digest = session.weights_digest()
    assert session.switch(persona).n_units_written > 0
    assert session.weights_digest() != digest
    text = session.chat(QUESTION, SamplingOptions(max_tokens=5, temperature=0)).text
    session.base()
    assert session.weights_digest() == digest
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_one_function_takes_either_backend(tiny_llama: TinyOnnx, tmp_path: Path, kind: type[PersonaSession]) -> None:
    write_pack(tmp_path / "tiny.maskpack", personas_of(tiny_llama.torch))
    model = tiny_llama.gguf if kind is PersonaRuntime else tiny_llama.folder
    with open_runtime(model, tmp_path / "tiny.maskpack", n_ctx=64, n_threads=1) as session:
        assert type(session) is kind
        assert _answer(session, "both")


@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_adds_nothing_but_how_it_is_opened(kind: type[PersonaSession]) -> None:
    own = {name for name in dir(kind) if not name.startswith("_")} - set(dir(PersonaSession))
    assert own == {"open"}
    assert kind.__bases__ == (PersonaSession,)
