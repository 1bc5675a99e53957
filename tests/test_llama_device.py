"""Weights that only ggml can address: the same bytes and the same text as in memory that the CPU writes.

No GPU is needed: plain CPU memory is taken for a device's, so that every read and write goes through ggml.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from persona_edge.errors import InputError, WeightAccessError
from persona_edge.machine import cpu_flags
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.runtime import llama_device, llama_weights
from persona_edge.runtime.llama_device import DeviceMirror, DeviceTensor
from persona_edge.runtime.llama_library import load_library
from persona_edge.runtime.llama_weights import LlamaModel, find_tensors, weights_digest
from persona_edge.runtime.placement import choose_placement
from persona_edge.runtime.session import PersonaRuntime, SamplingOptions
from tests.test_llama_weights import write_tiny_llama
from tests.tiny_chat import personas_for, write_model, write_model_and_pack

GREEDY = SamplingOptions(temperature=0, max_tokens=6)
STATES = (("INFP", 1.0), ("ENTJ", 1.0), ("ENTJ", 0.4), ("INFP", 0.7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_model_and_pack(path)
    return path


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the CPU cannot reach its own memory."""
    monkeypatch.setattr(llama_weights, "_is_in_reach", lambda model, buffer: False)
    monkeypatch.setattr(llama_device, "_DEVICES", ("CPU",))


def open_runtime(folder: Path) -> PersonaRuntime:
    return PersonaRuntime.open(folder / "tiny.gguf", folder / "tiny.mbti.maskpack", n_threads=1)


Found = list[tuple[str, str, np.ndarray]]


def walk(runtime: PersonaRuntime) -> Found:
    """What the weights are, say and compute in each of STATES, and at base before and after."""
    tokens, found = runtime.tokenize("what is this"), []
    steps: list[Callable[[], object]] = [runtime.base]
    steps += [lambda p=persona, s=strength: runtime.switch(p, s) for persona, strength in STATES]  # type: ignore[misc]
    for step in (*steps, runtime.base):
        step()
        found.append((runtime.weights_digest(), runtime.generate("a", GREEDY).text, runtime.logits(tokens)))
    return found


@pytest.mark.parametrize("stretch", [50, 1000, llama_device.STRETCH])
def test_the_same_as_in_plain_memory(
    folder: Path, stretch: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(llama_device, "STRETCH", stretch)
    file_hash = hashlib.sha256((folder / "tiny.gguf").read_bytes()).digest()
    with open_runtime(folder) as runtime:
        expected = walk(runtime)
    request.getfixturevalue("on_device")
    with open_runtime(folder) as runtime:
        assert all(isinstance(tensor, DeviceTensor) for tensor in runtime._tensors.values())
        for (digest, text, logits), (expected_digest, expected_text, expected_logits) in zip(
            walk(runtime), expected, strict=True
        ):
            assert (digest, text) == (expected_digest, expected_text)
            assert np.array_equal(logits, expected_logits)
    assert len({digest for digest, _, _ in expected}) == 5
    assert hashlib.sha256((folder / "tiny.gguf").read_bytes()).digest() == file_hash


def test_only_stretches_with_an_edit_are_sent(folder: Path, on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_device, "STRETCH", 512)
    sent: list[tuple[str, int, int]] = []
    write = DeviceTensor.write

    def spy(tensor: DeviceTensor, start: int, stop: int) -> None:
        sent.append((tensor.name, start, stop))
        write(tensor, start, stop)

    monkeypatch.setattr(DeviceTensor, "write", spy)
    with open_runtime(folder) as runtime:
        before = {name: tensor.data.copy() for name, tensor in runtime._tensors.items()}
        runtime.switch("I", 0.5)
        edited = {name: np.flatnonzero(t.data != before[name]) for name, t in runtime._tensors.items()}
        for name, at in edited.items():
            covered = [range(start, stop) for tensor, start, stop in sent if tensor == name]
            assert all(any(byte in span for span in covered) for byte in at.tolist())
        assert sum(stop - start for _, start, stop in sent) < sum(data.size for data in before.values())
        assert {name for name, _, _ in sent} == {name for name, at in edited.items() if at.size}
        sent.clear()
        runtime.switch("i", 0.5)
        runtime.base()
        assert sent


@pytest.mark.parametrize("n_before", [0, 1, 7])
def test_an_interrupted_switch_leaves_base(
    folder: Path, on_device: None, monkeypatch: pytest.MonkeyPatch, n_before: int
) -> None:
    monkeypatch.setattr(llama_device, "STRETCH", 512)
    write = DeviceTensor.write
    n_left = n_before

    def interrupted(tensor: DeviceTensor, start: int, stop: int) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == -1:
            raise KeyboardInterrupt
        write(tensor, start, stop)

    with open_runtime(folder) as runtime:
        base = runtime.weights_digest()
        runtime.switch("ENTJ")
        entj = runtime.weights_digest()
        with monkeypatch.context() as patch:
            patch.setattr(DeviceTensor, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                runtime.switch("INFP")
        assert runtime.persona is None
        assert runtime.weights_digest() == base
        runtime.switch("ENTJ")
        assert runtime.weights_digest() == entj


def test_the_parts_of_a_split_model(tmp_path: Path, on_device: None) -> None:
    whole = LlamaModel(write_tiny_llama(tmp_path / "whole.gguf"))
    write_tiny_llama(tmp_path / "tiny.gguf", n_parts=2)
    split = LlamaModel(tmp_path / "tiny-00001-of-00002.gguf")
    tensors = find_tensors(split)
    assert weights_digest(tensors.values()) == weights_digest(find_tensors(whole).values())
    assert all(np.array_equal(t.data, t.read()) for t in tensors.values() if isinstance(t, DeviceTensor))
    DeviceMirror(tensors)


def test_a_device_with_other_bytes_than_the_file_is_refused(folder: Path, on_device: None) -> None:
    model = LlamaModel(folder / "tiny.gguf")
    tensors = find_tensors(model)
    tensor = tensors["blk.1.ffn_up.weight"]
    assert isinstance(tensor, DeviceTensor)
    tensor.data[-1] ^= 1
    tensor.write(0, tensor.data.size)
    tensor.data[-1] ^= 1
    with pytest.raises(
        WeightAccessError, match=r"blk\.1\.ffn_up\.weight on the device is not what is in the file; open"
    ):
        DeviceMirror(tensors)


def test_a_buffer_of_an_unknown_kind_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_weights, "_is_in_reach", lambda model, buffer: False)
    with pytest.raises(
        WeightAccessError, match=r"lies in a CPU buffer, whose weights cannot be edited; .*n_gpu_layers=0"
    ):
        open_runtime(folder)


def test_gpu_layers_without_a_gpu_change_nothing(folder: Path) -> None:
    with PersonaRuntime.open(folder / "tiny.gguf", n_threads=1) as runtime:
        if runtime.has_gpu:
            pytest.skip("this machine has a GPU")
        expected = runtime.generate("a", GREEDY).text
    for n_layers in (1, -1):
        with PersonaRuntime.open(folder / "tiny.gguf", n_threads=1, n_gpu_layers=n_layers) as runtime:
            assert runtime.generate("a", GREEDY).text == expected


def test_layers_on_a_gpu_are_not_mapped() -> None:
    assert choose_placement("auto", 5_000_000_000, 10).text == "in the heap: some layers are on the GPU"
    for weights in ("mmap", "repacked"):
        with pytest.raises(InputError, match=f"weights='{weights}' does not go with GPU layers"):
            choose_placement(weights, 1, 10)


# Repacked


def test_a_switch_of_repacked_weights_is_loading_the_edited_file(tmp_path: Path) -> None:
    """A file with the bytes of the masked weights, loaded repacked, computes the same to the bit."""
    path = write_model(tmp_path / "model.gguf", quantization=gguf.GGMLQuantizationType.Q4_0)
    pack = MaskPack.from_bytes(encode_pack(personas_for(path))[0])
    with PersonaRuntime.open(path, pack, n_threads=1, weights="heap") as runtime:
        runtime.switch("INFP")
        masked = bytearray(path.read_bytes())
        for tensor in runtime._model.parts[0].tensors:
            masked[tensor.offset : tensor.offset + tensor.n_bytes] = runtime._tensors[tensor.name].data.tobytes()
        digest, tokens = runtime.weights_digest(), runtime.tokenize("what is this")
    (tmp_path / "masked.gguf").write_bytes(masked)
    with PersonaRuntime.open(tmp_path / "masked.gguf", n_threads=1, weights="repacked") as baked:
        if not any(isinstance(tensor, DeviceTensor) for tensor in baked._tensors.values()):
            pytest.skip("this llama.cpp repacks nothing on this processor")
        expected = baked.logits(tokens)
    with PersonaRuntime.open(path, pack, n_threads=1, weights="repacked") as runtime:
        base, base_logits = runtime.weights_digest(), runtime.logits(tokens)
        runtime.switch("ENTJ")
        runtime.switch("INFP")
        assert np.array_equal(runtime.logits(tokens), expected)
        assert runtime.weights_digest() == digest
        runtime.base()
        assert np.array_equal(runtime.logits(tokens), base_logits)
        assert runtime.weights_digest() == base != digest


def test_repacking_for_amx_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = load_library().api
    monkeypatch.setattr(api, "llama_print_system_info", lambda: b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ")
    with pytest.raises(
        WeightAccessError, match="with AMX repacked weights cannot be edited; open it with weights='auto"
    ):
        PersonaRuntime.open(folder / "tiny.gguf", weights="repacked")


def test_ours_runs_whatever_stock_llama_cpp_python_does_on_this_processor(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    """Stock repacks what it can. Some virtual machines announce AMX and end that process; only there may it crash."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    path = str(folder / "tiny.gguf")
    stock = f"import llama_cpp\nllama_cpp.Llama({path!r}, n_ctx=64, verbose=False).create_completion('a', max_tokens=2)"
    ours = (
        "from persona_edge.runtime.session import PersonaRuntime, SamplingOptions\n"
        f"PersonaRuntime.open({path!r}, n_ctx=64).generate('a', SamplingOptions(max_tokens=2))"
    )
    codes = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120).returncode
        for code in (stock, ours)
    ]
    record_property("stock llama-cpp-python", codes[0])
    assert codes[1] == 0
    assert codes[0] == 0 or any(flag.startswith("amx") for flag in cpu_flags() or ())
