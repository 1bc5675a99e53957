"""Every way the whole line fails on the real 135M model: one line on stderr, an exit code, nothing written.

The model, and the pack of the one export that serves all tests, are those of test_end_to_end.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from persona_edge.errors import ModelMismatchError, UnsupportedModelError
from persona_edge.maskpack import write_pack
from persona_edge.runtime.session import PersonaRuntime
from tests.tiny_chat import personas_for
from tests.tiny_models import save_folder, save_gguf
from tests.workplace import CONTRASTS, HIDE, LESS_DATA, NO_ROOM, Workplace, check_one_line

pytestmark = pytest.mark.model


# What cannot be used


@pytest.mark.parametrize(
    ("arguments", "exit_code", "parts"),
    [
        (["export", "--model", "smollm3-135m", "--personas", "mbti16"], 1, ["no model 'smollm3-135m'", "smollm2-135m"]),
        (["export", "--model", "gone.gguf", "--personas", "mbti16"], 1, ["no such file", "gone.gguf"]),
        (["export", "--model", "smollm2-135m", "--personas", "mbti17"], 2, ["no persona set 'mbti17'", "mbti16"]),
        (["chat", "--model", "gone.gguf", "--message", "Hello"], 1, ["no such file", "gone.gguf"]),
    ],
)
def test_what_does_not_exist(place: Workplace, arguments: Sequence[str], exit_code: int, parts: Sequence[str]) -> None:
    before = place.files()
    check_one_line(place.run(*arguments), exit_code, *parts)
    assert place.files() == before


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["empty"]),
        ("\n\n", ["empty"]),
        ('{"prompt": "Why?", "positive": "So."}\n', ["line 1", "no 'negative'"]),
        (CONTRASTS + '{"prompt": "Why?", \n', ["line 10", "malformed JSON"]),
        (CONTRASTS + '{"prompt": "Why?", "positive": "So.", "negative": "So."}\n', ["line 10", "the same text"]),
        ("question;matching\n", ["line 1"]),
    ],
)
def test_calibration_files_that_are_none(place: Workplace, tmp_path: Path, content: str, parts: Sequence[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(content, encoding="utf-8")
    before = place.files()
    check_one_line(place.run("export", "--model", place.model, "--personas", file), 1, "mine.jsonl", *parts)
    assert place.files() == before


def test_no_such_persona_or_pack(packed: Workplace, tmp_path: Path) -> None:
    before = packed.files()
    check_one_line(packed.ask("--persona", "INFP"), 2, "'INFP'", "tidy, messy")
    check_one_line(packed.ask("--pack", tmp_path / "gone.maskpack"), 1, "gone.maskpack", "cannot be read")
    assert packed.files() == before


def damage_end(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def damage_front(data: bytes) -> bytes:
    return data[:20]


def flip_a_bit(data: bytes) -> bytes:
    at = len(data) * 3 // 4
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def add_a_byte(data: bytes) -> bytes:
    return data + b"\0"


@pytest.mark.parametrize("damage", [damage_end, damage_front, flip_a_bit, add_a_byte])
def test_damaged_packs(packed: Workplace, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    bad = tmp_path / "bad.maskpack"
    bad.write_bytes(damage(packed.pack.read_bytes()))
    check_one_line(packed.ask("--persona", "tidy", "--pack", bad), 1, "bad.maskpack")


# Packs and models that do not belong together


@pytest.mark.big
def test_the_pack_of_another_model(packed: Workplace, qwen_path: Path, tmp_path: Path) -> None:
    pack = tmp_path / "qwen.maskpack"
    write_pack(pack, personas_for(qwen_path, personas={"odd": ("E",)}, blocks=(0, 5)))
    with PersonaRuntime.open(qwen_path, n_ctx=64, n_threads=1) as qwen:
        qwen.attach(pack)  # its own model takes it
    check_one_line(packed.ask("--pack", pack, "--persona", "odd"), 1, "qwen2", "llama")
    check_one_line(packed.ask("--pack", pack), 1, "qwen2", "llama")


def test_another_model_of_the_same_shape(packed: Workplace, tmp_path: Path) -> None:
    import gguf

    other = tmp_path / "other.gguf"
    shutil.copyfile(packed.model, other)
    for tensor in gguf.GGUFReader(other, "r+").tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            tensor.data[:] = tensor.data[::-1].copy()  # its rows in reverse order: as many, as large, elsewhere
    with PersonaRuntime.open(other, n_ctx=64, n_threads=1) as runtime:
        before = runtime.weights_digest()
        with pytest.raises(ModelMismatchError, match="made from other weights"):
            runtime.attach(packed.pack)
        assert runtime.personas == ()
        assert runtime.weights_digest() == before
    check_one_line(packed.ask("--persona", "tidy", "--pack", packed.pack, model=other), 1, "other weights", "%")


def test_a_quantization_that_cannot_be_edited(packed: Workplace, tmp_path: Path) -> None:
    import llama_cpp

    ternary = tmp_path / "ternary.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_TQ1_0, True
    assert not llama_cpp.llama_model_quantize(bytes(packed.model), bytes(ternary), ctypes.byref(params))
    with (
        PersonaRuntime.open(ternary, n_ctx=64, n_threads=1) as runtime,
        pytest.raises(UnsupportedModelError, match=r"TQ1_0 cannot be edited; use a model quantized with one of"),
    ):
        runtime.attach(packed.pack)
    check_one_line(packed.ask("--persona", "tidy", "--pack", packed.pack, model=ternary), 1, "TQ1_0", "Q4_K")
    assert [path.name for path in tmp_path.iterdir()] == ["ternary.gguf"]


# What cannot be written


def test_a_folder_that_cannot_be_written(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"not a folder")
    (tmp_path / "locked").mkdir(mode=0o555)
    targets = [tmp_path / "file" / "x.maskpack", tmp_path / "missing" / "x.maskpack"]
    if os.geteuid():  # root may write anywhere
        targets.append(tmp_path / "locked" / "x.maskpack")
    before = place.files()
    for target in targets:
        result = place.run(*place.export_arguments("--output", target), prelude=LESS_DATA)
        check_one_line(result, 1, str(target), "nothing was written")
    assert place.files() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]


def test_a_full_disk(tmp_path: Path) -> None:
    """On a tiny model: what is left of a pack does not depend on the model's size, but an export's time does."""
    (tmp_path / "models").mkdir()
    place = Workplace.around("tiny", tmp_path / "models", tmp_path / "cache")
    save_gguf(place.model, save_folder(tmp_path / "original"))
    done = place.run(*place.export_arguments(), prelude=LESS_DATA)
    assert done.returncode == 0, done.stderr
    before, content = place.files(), place.pack.read_bytes()
    result = place.run(*place.export_arguments(), prelude=LESS_DATA + NO_ROOM)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"persona-edge: error: cannot write {place.pack}: ")
    assert "Traceback" not in result.stderr
    assert place.files() == before
    assert place.pack.read_bytes() == content


# What is not installed


@pytest.mark.parametrize(
    ("package", "command", "parts"),
    [
        ("torch", "export", ["torch", "pip install 'persona-edge[offline]'"]),
        ("transformers", "export", ["transformers", "pip install 'persona-edge[offline]'"]),
        ("llama_cpp llama_cpp_py_sync", "chat", ["llama-cpp-python", "pip install 'persona-edge[prebuilt]'"]),
    ],
)
def test_packages_that_are_missing(place: Workplace, package: str, command: str, parts: Sequence[str]) -> None:
    arguments = place.export_arguments() if command == "export" else ["chat", "--model", place.model, "--message", "Hi"]
    before = place.files()
    check_one_line(place.run(*arguments, prelude=HIDE.format(package=package)), 1, *parts)
    assert place.files() == before
