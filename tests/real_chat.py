"""What the tests of a session on the real 135M model ask of it, and the masks that they switch."""

from __future__ import annotations

from pathlib import Path

from persona_edge.masks import PersonaSet
from persona_edge.runtime.values import Message, SamplingOptions
from tests.tiny_chat import personas_for

GREEDY = SamplingOptions(temperature=0, max_tokens=12)
QUESTION: list[Message] = [{"role": "user", "content": "Name the capital of France."}]
STORY = "Once upon a time there was a"


def random_personas(model_path: Path) -> PersonaSet:
    """Aye, Bee and Both: two random poles over two blocks of a model."""
    return personas_for(model_path, personas={"Aye": ("E",), "Bee": ("I",), "Both": ("E", "I")}, blocks=(1, 20))
