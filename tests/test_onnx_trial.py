"""The doctor's question to ONNX Runtime, asked for real and with its possible answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from persona_edge.doctor import check_onnx_switch
from persona_edge.probes import ONNX_PROBE, ProbeResult, run_probe
from persona_edge.runtime import onnx_mapping
from persona_edge.runtime.onnx_trial import try_mechanisms
from tests.tiny_onnx import tiny_onnx_cache

__all__ = ["tiny_onnx_cache"]


def test_the_probe_names_a_mechanism_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path))
    check = check_onnx_switch(run_probe(ONNX_PROBE))
    assert check.status == "ok"
    assert check.detail.startswith("mapped:" if sys.platform == "linux" else "scales:")
    assert not list(tmp_path.iterdir())


def test_a_fallback_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_mapping, "MAPS", tmp_path / "none")
    folder = tmp_path / "trial"
    folder.mkdir()
    chosen = try_mechanisms(folder)
    assert chosen.editor.mechanism == "scales"
    check = check_onnx_switch(ProbeResult({"mechanism": "scales", "notes": list(chosen.notes)}))
    assert check.status == "ok"
    assert "does not tell where files are mapped" in check.detail


def test_a_broken_installation_is_a_warning_with_a_remedy() -> None:
    for probe in (ProbeResult(failure="its process died of SIGILL"), ProbeResult({"problem": "no onnx"})):
        check = check_onnx_switch(probe)
        assert (check.status, "persona-edge[onnx]" in check.remedy) == ("warn", True)
