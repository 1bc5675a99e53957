"""ONNX models that are not quantized: exported, attached and switched like the others, and equal to PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from persona_edge.exporters.to_onnx import onnx_folder, write_onnx_model
from persona_edge.masked_model import masked
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import Granularity
from persona_edge.runtime.onnx_session import OnnxRuntime
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]

TOKENS = list(range(20, 52))


@pytest.fixture(scope="module")
def folder(tiny_llama: TinyOnnx, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF's weights as float32."""
    folder = tmp_path_factory.mktemp("float") / "tiny.onnx-fp32"
    model = write_onnx_model(tiny_llama.gguf, folder, "fp32")
    assert all(matrix.scales is None for matrix in model.matrices())
    return folder


@pytest.mark.parametrize("granularity", [32, 1])
def test_masked_in_float32_is_masked_pytorch(tiny_llama: TinyOnnx, folder: Path, granularity: Granularity) -> None:
    personas = personas_of(tiny_llama.torch, granularity=granularity)
    pack = MaskPack.from_bytes(encode_pack(personas)[0])
    with OnnxRuntime.open(folder, pack, n_ctx=64, n_threads=1) as runtime:
        assert runtime.mechanism in ("images", "session")
        found: dict[str | None, bytes] = {}
        for name in (None, "E", "both", "I", None):
            runtime.base() if name is None else runtime.switch(name)
            planes = [plane for pole in personas.resolve(name) for plane in pole.planes] if name else []
            with masked(tiny_llama.torch, planes), torch.no_grad():
                expected = tiny_llama.torch.model(torch.tensor([TOKENS])).logits[0].numpy()
            logits = runtime.logits(TOKENS)
            np.testing.assert_allclose(logits[:, : expected.shape[1]], expected, atol=2e-4)
            assert found.setdefault(name, logits.tobytes()) == logits.tobytes()
        assert len(set(found.values())) == 4


def test_the_folder_s_name_says_float() -> None:
    assert onnx_folder(Path("a.gguf"), "fp32").name == "a.onnx-fp32"
