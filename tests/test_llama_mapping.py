"""Weights mapped from the file: its bytes, edits that stay in the process, and the heap where it cannot be.

A tiny model shows everything but how few pages an edit takes; that is counted on the real 135M model.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from persona_edge.errors import InputError, WeightAccessError
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.runtime import llama_mapping, placement
from persona_edge.runtime.llama_files import FileTensor, ModelPart, read_parts
from persona_edge.runtime.llama_mapping import make_private, mapped_spans, why_not_here
from persona_edge.runtime.llama_weights import LlamaModel, find_tensors, weights_digest
from persona_edge.runtime.placement import WeightsMode, choose_placement
from persona_edge.runtime.session import PersonaRuntime, SamplingOptions
from tests.test_llama_weights import write_tiny_llama
from tests.tiny_chat import personas_for, write_model, write_model_and_pack

pytestmark = pytest.mark.skipif(why_not_here() is not None, reason="mapped weights cannot be edited on this system")

SMAPS = Path("/proc/self/smaps_rollup")
GREEDY = SamplingOptions(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_model_and_pack(path)
    return path


@pytest.fixture
def mapped(folder: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(folder / "tiny.gguf", weights="mmap")
    yield model
    model.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_runtime(folder: Path, weights: WeightsMode) -> PersonaRuntime:
    return PersonaRuntime.open(folder / "tiny.gguf", folder / "tiny.mbti.maskpack", n_threads=1, weights=weights)


def test_memory_is_the_file_and_writable(mapped: LlamaModel) -> None:
    assert mapped.placement.kind == "mmap"
    tensors = find_tensors(mapped)
    in_file = {str(t.name): t.data for t in gguf.GGUFReader(mapped.path).tensors}
    assert tensors.keys() == in_file.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.data, in_file[name].reshape(-1).view(np.uint8))
    in_graph = find_tensors(mapped, lookup="graph")
    assert {n: t.data.ctypes.data for n, t in tensors.items()} == {n: t.data.ctypes.data for n, t in in_graph.items()}


def test_every_byte_can_be_edited_and_the_file_does_not_change(mapped: LlamaModel) -> None:
    before, hash_before = weights_digest(find_tensors(mapped).values()), sha256(mapped.path)
    for tensor in find_tensors(mapped).values():
        tensor.data[:] ^= 0xFF
    assert weights_digest(find_tensors(mapped).values()) != before
    assert sha256(mapped.path) == hash_before
    for tensor in find_tensors(mapped).values():
        tensor.data[:] ^= 0xFF
    assert weights_digest(find_tensors(mapped).values()) == before


def test_two_models_on_one_file_are_edited_apart(mapped: LlamaModel) -> None:
    other = LlamaModel(mapped.path, weights="mmap")
    before = weights_digest(find_tensors(other).values())
    find_tensors(mapped)["output.weight"].data[:] = 0
    assert weights_digest(find_tensors(other).values()) == before
    other.close()


def test_a_session_is_the_same_in_the_heap_and_mapped(folder: Path) -> None:
    found = []
    hash_before = sha256(folder / "tiny.gguf")
    for weights in ("heap", "mmap"):
        with open_runtime(folder, weights) as runtime:
            assert runtime.placement.kind == weights
            base = runtime.weights_digest()
            runtime.switch("INFP")
            tokens = runtime.tokenize("what is this")
            found.append((base, runtime.weights_digest(), runtime.generate("a", GREEDY), runtime.logits(tokens)))
            runtime.base()
            assert runtime.weights_digest() == base
    (base, infp, text, logits), (base_mapped, infp_mapped, text_mapped, logits_mapped) = found
    assert (base, infp, text.text) == (base_mapped, infp_mapped, text_mapped.text)
    assert base != infp
    assert np.array_equal(logits, logits_mapped)
    assert sha256(folder / "tiny.gguf") == hash_before


def test_the_parts_of_a_split_model(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf", n_parts=2)
    first = tmp_path / "tiny-00001-of-00002.gguf"
    heap, mapped = LlamaModel(first, weights="heap"), LlamaModel(first, weights="mmap")
    for tensor in find_tensors(mapped).values():
        tensor.data[0] += 1
        tensor.data[0] -= 1
    assert weights_digest(find_tensors(mapped).values()) == weights_digest(find_tensors(heap).values())


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux lists mappings in /proc")
def test_closing_unmaps_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "once.gguf")
    model = LlamaModel(path, weights="mmap")
    assert str(path) in Path("/proc/self/maps").read_text()
    model.close()
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.model
@pytest.mark.skipif(not SMAPS.exists(), reason="Linux counts private pages in /proc")
def test_a_switch_copies_the_pages_that_it_touches_and_no_others(smollm2_path: Path) -> None:
    def private_dirty() -> int:
        fields = dict(line.split(":") for line in SMAPS.read_text().splitlines()[1:])
        return int(fields["Private_Dirty"].split()[0]) * 1024

    pack = MaskPack.from_bytes(encode_pack(personas_for(smollm2_path, blocks=(3,)))[0])
    start = private_dirty()
    with PersonaRuntime.open(smollm2_path, pack, n_ctx=32, n_threads=1, weights="mmap") as runtime:
        runtime.generate("Hi", SamplingOptions(max_tokens=1))
        block = sum(t.data.size for name, t in runtime._tensors.items() if name.startswith("blk.3."))
        opened = private_dirty()
        assert opened - start < smollm2_path.stat().st_size // 2, "the weights themselves were copied"
        runtime.switch("INFP")
        grown = private_dirty() - opened
        assert block // 2 < grown < 3 * block + 4_000_000


# Where it cannot be


def test_a_system_that_refuses_gets_the_heap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(llama_mapping, "_write_copy_windows" if sys.platform == "win32" else "_map_private", refuse)
    monkeypatch.setattr(placement, "_LARGE", 0)
    with open_runtime(folder, "auto") as runtime:
        assert runtime.placement.kind == "heap"
        assert runtime.placement.is_fallback
        assert "(the system refuses it: Permission denied)" in runtime.placement.text
        before = runtime.weights_digest()
        runtime.switch("INFP")
        assert runtime.weights_digest() != before
    with pytest.raises(
        WeightAccessError, match=r"tiny\.gguf cannot be edited: the system .*; open it with weights='he"
    ):
        open_runtime(folder, "mmap")


def test_a_system_where_it_is_not_known_how(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    monkeypatch.setattr(placement, "_LARGE", 0)
    reason = "it is not known how on plan9"
    assert why_not_here() == reason
    assert choose_placement("auto", 1).text == f"in the heap: mapped weights cannot be edited here ({reason})"
    with pytest.raises(WeightAccessError, match=f"edited here: {reason}; open the model with weights='heap'"):
        choose_placement("mmap", 1)
    with pytest.raises(WeightAccessError, match=reason):
        make_private(())


def test_a_file_that_was_exchanged_since(mapped: LlamaModel, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copyfile(mapped.path, path)
    model = LlamaModel(path, weights="mmap")
    addresses = {name: tensor.data.ctypes.data for name, tensor in find_tensors(model).items()}
    spans = mapped_spans(read_parts(model.library, path), addresses)
    make_private(spans)
    (tmp_path / "short").write_bytes(b"GGUF")
    write_model(tmp_path / "other", seed=1)
    for other, message in (("other", "in memory is not what is in the file now"), ("short", "is shorter now")):
        (tmp_path / other).replace(path)
        with pytest.raises(WeightAccessError, match=rf"model\.gguf {message}"):
            make_private(spans)
    path.unlink()
    with pytest.raises(WeightAccessError, match="the system refuses it: No such file"):
        make_private(spans)
    assert weights_digest(find_tensors(model).values()) == weights_digest(find_tensors(mapped).values())
    model.close()


def test_tensors_that_do_not_lie_as_in_the_file() -> None:
    page = llama_mapping._PAGE
    part = ModelPart(Path("m.gguf"), (FileTensor("a", 100, 50), FileTensor("b", 200, 50)))
    [span] = mapped_spans([part], {"a": 7 * page + 100, "b": 7 * page + 200})
    assert (span.address, span.offset, span.n_bytes) == (7 * page, 0, page)
    assert mapped_spans([part], {}) == ()
    for wrong in ({"a": 7 * page + 100, "b": 7 * page + 201}, {"a": 7 * page + 101}):
        with pytest.raises(WeightAccessError, match=r"m\.gguf does not lie in memory as it does in the file"):
            mapped_spans([part], wrong)


def test_spans_are_whole_pages_around_the_tensors() -> None:
    page = llama_mapping._PAGE
    part = ModelPart(Path("m.gguf"), (FileTensor("a", 3 * page + 8, page), FileTensor("b", 9 * page, 2 * page)))
    [span] = mapped_spans([part], {"a": 103 * page + 8, "b": 109 * page})
    assert (span.address, span.offset, span.n_bytes) == (103 * page, 3 * page, 8 * page)


# Which is chosen


def test_small_models_go_to_the_heap_and_large_ones_stay_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "available_memory", lambda: None)
    assert choose_placement("auto", 98_000_000).text == (
        "in the heap: 98 MB are copied quickly, and no switch meets a page fault"
    )
    assert choose_placement("auto", 4_700_000_000).text == (
        "mapped from the file, copied page by page when edited: "
        "4.7 GB load without a copy and are shared between processes"
    )
    monkeypatch.setattr(placement, "available_memory", lambda: 150_000_000)
    assert choose_placement("auto", 98_000_000).kind == "mmap"
    assert choose_placement("heap", 4_700_000_000).kind == "heap"
    assert choose_placement("mmap", 1).kind == "mmap"


def test_no_such_place() -> None:
    with pytest.raises(InputError, match="weights is 'disk'; it must be 'auto', 'heap', 'mmap' or 'repacked'"):
        choose_placement("disk", 1)  # type: ignore[arg-type]
