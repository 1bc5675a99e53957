"""Tiny ONNX models, made by the real exporter from the tiny models of tests/tiny_models, once per test run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from persona_edge.exporters.to_onnx import write_onnx_model
from persona_edge.masks import Granularity, PersonaSet, Plane, Pole
from persona_edge.modeling import TorchModel
from persona_edge.onnx_model import OnnxModel, read_onnx_model
from tests.tiny_chat import random_plane
from tests.tiny_models import load, save_folder, save_gguf

__all__ = ["TinyOnnx", "personas_of", "tiny_llama", "tiny_onnx_cache"]


@dataclass(frozen=True)
class TinyOnnx:
    """A Hugging Face folder, the GGUF file and the ONNX folder of one llama, and its torch model (from the GGUF)."""

    original: Path
    gguf: Path
    folder: Path
    torch: TorchModel

    @property
    def model(self) -> OnnxModel:
        """The ONNX model, read."""
        return read_onnx_model(self.folder)


@cache
def _make(root: Path) -> TinyOnnx:
    original = save_folder(root / "tiny", "llama")
    gguf = save_gguf(root / "tiny.gguf", original)
    write_onnx_model(gguf, root / "tiny.onnx-int4")
    return TinyOnnx(original, gguf, root / "tiny.onnx-int4", load(gguf))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyOnnx:
    """A llama of two layers; converting it is what takes time."""
    return _make(tmp_path_factory.getbasetemp() / "tiny_onnx_models")


@pytest.fixture(autouse=True)
def tiny_onnx_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that the tests of a run share, so that a model is packed once."""
    cache_folder = tmp_path_factory.getbasetemp() / "tiny_onnx_cache"
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(cache_folder))
    return cache_folder


def personas_of(
    model: TorchModel, *, granularity: Granularity = 32, gates: Sequence[float] = (0.0, 1.5), share: float = 0.1
) -> PersonaSet:
    """Random masks over all tensors: poles E and I, personas of one and of both."""
    random = np.random.default_rng(3)
    identity = model.identity()

    def plane(gate: float) -> Plane:
        return random_plane(random, identity.tensors, gate=gate, share=share, granularity=granularity)

    poles = tuple(Pole(name, "EI", tuple(plane(gate) for gate in gates)) for name in ("E", "I"))
    return PersonaSet(identity, poles, {"E": ("E",), "I": ("I",), "both": ("E", "I")})
