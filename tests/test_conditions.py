"""What a stored result says about where it was measured."""

from __future__ import annotations

from importlib import metadata

import pytest

from persona_edge.conditions import Conditions, conditions
from persona_edge.runtime.kernels import default_kernels


def test_folders_are_left_out_of_the_command() -> None:
    found = conditions(["persona-edge", "eval", "--pack=/home/me/a b.maskpack", "--output", "/tmp/x/effect", "a/b"])
    assert found.command == "persona-edge eval '--pack=a b.maskpack' --output effect b"


def test_the_versions_are_those_of_what_is_installed() -> None:
    found = conditions().versions
    installed = {distribution.metadata["Name"].lower().replace("_", "-") for distribution in metadata.distributions()}
    backends = {"numpy", "llama-cpp-python", "llama-cpp-py-sync", "onnxruntime", "onnxruntime-genai", "torch"}
    assert found.keys() & backends == installed & backends
    assert all(found[name] == metadata.version(name) for name in installed & backends)
    assert list(found)[:3] == ["persona-edge", "kernels", "python"]


@pytest.mark.parametrize(("name", "expected"), [("numpy", "in NumPy"), ("c", "in C")])
def test_the_kernels_are_told_since_one_kind_is_far_slower(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "c":
        pytest.importorskip("persona_edge.runtime._kernels", reason="the C kernels did not compile here")
    monkeypatch.setenv("PERSONA_EDGE_KERNELS", name)
    default_kernels.cache_clear()
    assert conditions().versions["kernels"] == expected
    monkeypatch.undo()
    default_kernels.cache_clear()


def test_a_machine_of_unknown_memory_is_told_without_it() -> None:
    found = Conditions("c", "d", "a processor", 2, None, "a system", {"python": "3.11", "numpy": "2"})
    assert found.machine == "a processor, 2 cores; a system; python 3.11, numpy 2"
