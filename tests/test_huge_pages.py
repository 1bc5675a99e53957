"""Heap weights in huge pages: the advice is given in time, and where there is none to give, a model loads as ever."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from persona_edge.runtime import huge_pages
from persona_edge.runtime.huge_pages import new_parts
from persona_edge.runtime.llama_weights import LlamaModel, find_tensors, weights_digest


@pytest.mark.parametrize(
    ("now", "before", "new"),
    [
        ([(10, 20)], [], [(10, 20)]),
        ([(10, 20)], [(10, 20)], []),
        ([(10, 30)], [(10, 20)], [(20, 30)]),
        ([(10, 30)], [(20, 30)], [(10, 20)]),
        ([(10, 40)], [(15, 20), (25, 30)], [(10, 15), (20, 25), (30, 40)]),
        ([(10, 20), (50, 60)], [(0, 5), (15, 55)], [(10, 15), (55, 60)]),
        ([(10, 20)], [(0, 100)], []),
    ],
)
def test_what_is_new_is_what_was_not_there(
    now: list[tuple[int, int]], before: list[tuple[int, int]], new: list[tuple[int, int]]
) -> None:
    assert new_parts(now, before) == new


def huge_bytes(address: int) -> int:
    """How much of the mapping that `address` lies in is huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no mapping holds {address:#x}")


def largest_tensor(model: LlamaModel) -> tuple[int, int]:
    """Address and size of its memory."""
    data = max((tensor.data for tensor in find_tensors(model).values()), key=len)
    return data.ctypes.data, data.nbytes


def gives_huge_pages() -> bool:
    """Whether memory that is advised of becomes huge pages on this system, now."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/proc/self/smaps").exists():
        return False
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:] = b"\1" * len(memory)
        view = np.frombuffer(memory, np.uint8)
        found = huge_bytes(view.ctypes.data)
        del view
    return found >= 8 << 20


def test_heap_weights_lie_in_huge_pages(smollm2_path: Path) -> None:
    if not gives_huge_pages():
        pytest.skip("this system gives no huge pages")
    model = LlamaModel(smollm2_path, weights="heap")
    address, size = largest_tensor(model)
    assert huge_bytes(address) > 0.8 * size
    model.close()


def test_without_proc_the_model_loads_all_the_same(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for _ in range(2):
        model = LlamaModel(smollm2_path, weights="heap")
        digests.append(weights_digest(find_tensors(model).values()))
        model.close()
        monkeypatch.setattr(huge_pages, "_MAPS", Path("/nowhere/maps"))
    assert digests[0] == digests[1]


def test_elsewhere_than_on_linux_nothing_is_asked_for(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_now: object, _before: object) -> None:
        raise AssertionError("the advice was about to be given")

    monkeypatch.setattr(huge_pages, "new_parts", refuse)
    monkeypatch.setattr(sys, "platform", "darwin")
    LlamaModel(smollm2_path, weights="heap").close()
