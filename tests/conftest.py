"""Fixtures that several test modules share: the real models and the public evaluation data.

Models come through the catalogue, as a user's would: from the cache when they are there, otherwise fetched once. A test
that needs what this machine cannot get is skipped with the reason.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from persona_edge.catalogue import resolve_model
from persona_edge.errors import PersonaEdgeError


def _model(name: str) -> Path:
    try:
        return resolve_model(name).require_gguf()
    except PersonaEdgeError as error:
        pytest.skip(f"{name} cannot be had: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 and Q8_0, 98 MB."""
    return _model("smollm2-135m")


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q5_0, Q8_0, Q6_K and Q4_K, 491 MB."""
    return _model("qwen2.5-0.5b")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M (base), Q5_0, Q4_K, Q8_0 and Q6_K, 253 MB."""
    return _model("gemma3-270m")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The public evaluation data, which is not part of this repository."""
    named = os.environ.get("PERSONA_EDGE_DATA")
    if not named:
        pytest.skip("PERSONA_EDGE_DATA is not set to the folder of the evaluation data")
    folder = Path(named).expanduser()
    if not folder.is_dir():
        pytest.skip(f"PERSONA_EDGE_DATA={named} is not a folder")
    return folder
