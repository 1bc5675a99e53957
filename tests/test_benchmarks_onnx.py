"""The ONNX benchmark: every stage runs on a tiny model, and its page shows what was measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import onnx_backend, record
from persona_edge.maskpack import write_pack
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told on Linux")
def test_every_stage_of_a_tiny_model(tiny_llama: TinyOnnx, tmp_path: Path) -> None:
    personas = replace(personas_of(tiny_llama.torch), personas={"INFP": ("E",), "ENTJ": ("I",)})
    write_pack(tmp_path / "tiny.maskpack", personas)
    graph = tiny_llama.folder / "model.onnx"
    job = onnx_backend.Job(tiny_llama.gguf, graph, tmp_path / "tiny.maskpack", 2, 2, 2, 40, 1)
    result = onnx_backend.measure(job)
    base, *masked = cast(list[dict[str, Any]], result.values["parity"])
    assert [row["persona"] for row in masked] == ["INFP", "ENTJ"]
    for row in masked:
        assert row["agreement"]["kl_divergence"] < row["kl_from_base"] / 5
    assert base["agreement"]["n_positions"] >= 30
    page = record.markdown(result, record.conditions([]))
    for words in ("INFP → ENTJ", "decode: a second default session", "prefill: ours, INFP", "private", "mask pack"):
        assert words in page
