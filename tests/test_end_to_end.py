"""The whole line on the real 135M model, as a user goes it: export, Ctrl-C and resume, chat; and every way it fails.

One export serves all tests. It is the real program on less data: a dozen of the shipped neutral prompts and passages,
short answers, and a checkpoint after every batch. Each failure is one line on stderr, an exit code, nothing written.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import ModelMismatchError, UnsupportedModelError
from persona_edge.maskpack import MaskPack, write_pack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, SignSample, TensorShape
from persona_edge.runtime.dequantize import dequantize
from persona_edge.runtime.session import Message, PersonaRuntime, SamplingOptions
from persona_edge.sketch import sample_signs

pytestmark = pytest.mark.model

GREEDY = SamplingOptions(temperature=0, max_tokens=24)
QUESTION = "What does your desk look like?"
ASKED: list[Message] = [{"role": "user", "content": QUESTION}]
CONTRASTS = """\
{"axis": "tidiness", "positive": "tidy", "negative": "messy"}
{"prompt": "What does your desk look like?", "positive": "It is clear, with every pen in its place.", "negative": "It is a heap of papers, cups and old mail."}
{"prompt": "How do you pack for a trip?", "positive": "I pack from a list and fold every shirt.", "negative": "I grab whatever and stuff it in a bag."}
{"prompt": "What do you do after cooking?", "positive": "I wash up at once and wipe the counters.", "negative": "I leave the pans in the sink for days."}
{"prompt": "How do you keep your files?", "positive": "I keep them in folders with clear labels.", "negative": "I keep them wherever they happen to land."}
{"prompt": "Describe your wardrobe.", "positive": "My clothes hang sorted by season.", "negative": "My clothes lie on a chair and the floor."}
{"prompt": "What happens to your receipts?", "positive": "I file them by month in a small box.", "negative": "I lose them in pockets and in drawers."}
{"prompt": "How does your garage look?", "positive": "It is swept, with the tools on hooks.", "negative": "It is buried, with the tools under junk."}
{"prompt": "What is your morning like?", "positive": "I make the bed and put things in order.", "negative": "I dig for my keys in a pile of clothes."}
"""  # noqa: E501  # one contrast per line is the format

PROGRAM = "from persona_edge.cli import main; main()"
LESS_DATA = """
import sys
from persona_edge import calibration
prompts, texts = calibration.neutral_prompts()[:12], calibration.neutral_texts()[:12]
calibration.neutral_prompts, calibration.neutral_texts = lambda: prompts, lambda: texts
calibration.SECONDS_BETWEEN_CHECKPOINTS = 0
settings = calibration.CalibrationSettings
def small(**given):
    return settings(max_batch_tokens=256, neutral_tokens=64, answer_tokens=12, **given)
def announced(collect):
    def one_batch(*arguments, **given):
        print("BATCH", file=sys.stderr, flush=True)
        return collect(*arguments, **given)
    return one_batch
calibration.CalibrationSettings = small
calibration.collect_damage = announced(calibration.collect_damage)
calibration.collect_margins = announced(calibration.collect_margins)
"""
# Tests that a shell runs in the background, and so their children, would ignore Ctrl-C.
LISTEN_TO_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
NO_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
HIDE = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in "{package}".split() else super().find_spec(name, path, target)
sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


@dataclass(frozen=True)
class Workplace:
    """A folder with the model, the contrasts, a cache of its own, and the pack once it is exported."""

    folder: Path
    model: Path
    contrasts: Path
    pack: Path
    cache: Path

    def command(self, *arguments: str | Path, prelude: str = "") -> list[str]:
        """The program with `arguments`; the Python code `prelude` runs before it."""
        return [sys.executable, "-c", prelude + PROGRAM, *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PERSONA_EDGE_CACHE": str(self.cache)}

    def run(self, *arguments: str | Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, prelude=prelude),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def export_arguments(self, *more: str | Path) -> list[str | Path]:
        fixed: list[str | Path] = ["--model", self.model, "--personas", self.contrasts]
        return ["export", *fixed, "--budget", "0.01", "--dtype", "float32", *more]

    def files(self) -> dict[str, int]:
        """Name and time of change of every file beside the model: what must not change when something fails."""
        return {str(path): path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Exported:
    """The workplace after an export that was interrupted and then resumed."""

    place: Workplace
    interrupted: subprocess.CompletedProcess[str]
    files_after_interrupt: tuple[str, ...]
    resumed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def place(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("models")
    place = Workplace(
        folder,
        folder / "smollm2.gguf",
        folder / "tidiness.jsonl",
        folder / "smollm2.tidiness.maskpack",
        tmp_path_factory.mktemp("cache"),
    )
    place.model.symlink_to(smollm2_path)
    place.contrasts.write_text(CONTRASTS, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def exported(place: Workplace) -> Exported:
    interrupted = interrupt_after_checkpoint(place)
    left = tuple(sorted(path.name for path in place.folder.iterdir()))
    resumed = place.run(*place.export_arguments(), prelude=LESS_DATA)
    return Exported(place, interrupted, left, resumed)


@pytest.fixture(scope="module")
def packed(exported: Exported) -> Workplace:
    """The workplace with its pack."""
    assert exported.resumed.returncode == 0, exported.resumed.stderr
    return exported.place


def interrupt_after_checkpoint(place: Workplace) -> subprocess.CompletedProcess[str]:
    """Start the export and press Ctrl-C once the first checkpoint lies in the cache."""
    command = place.command(*place.export_arguments(), prelude=LISTEN_TO_CTRL_C + LESS_DATA)
    with subprocess.Popen(
        command,
        env=place.environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        while process.poll() is None and not list(place.cache.rglob("*.partial")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


def n_batches(result: subprocess.CompletedProcess[str]) -> int:
    return result.stderr.count("BATCH\n")


def check_one_line(result: subprocess.CompletedProcess[str], exit_code: int, *parts: str) -> None:
    """The program said what is wrong in one line, and nothing else."""
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("persona-edge: error: ")
    for part in parts:
        assert part in lines[0]


# Export


def test_ctrl_c_leaves_no_pack(exported: Exported) -> None:
    interrupted = exported.interrupted
    assert interrupted.returncode == 130, interrupted.stderr
    assert interrupted.stderr.splitlines()[-1] == "persona-edge: error: interrupted"
    assert "Traceback" not in interrupted.stderr
    assert exported.files_after_interrupt == ("smollm2.gguf", "tidiness.jsonl")


def test_a_resumed_export_computes_only_what_is_missing(exported: Exported, tmp_path: Path) -> None:
    first, second = n_batches(exported.interrupted), n_batches(exported.resumed)
    assert exported.resumed.returncode == 0, exported.resumed.stderr
    assert first >= 1
    again = exported.place.run(*exported.place.export_arguments("--output", tmp_path / "again"), prelude=LESS_DATA)
    assert again.returncode == 0, again.stderr
    assert n_batches(again) == 0
    assert (tmp_path / "again").read_bytes() == exported.place.pack.read_bytes()
    # The batch that was under way when Ctrl-C came may have been computed twice, none before it.
    statistics = len(list(exported.place.cache.rglob("*.safetensors")))
    assert statistics == 3  # web text, chat turns, contrasts
    assert second >= statistics - 1
    assert not list(exported.place.cache.rglob("*.partial"))


def test_the_pack_says_what_it_is(packed: Workplace) -> None:
    pack = MaskPack.open(packed.pack)
    assert tuple(pack.personas) == ("tidy", "messy")
    assert pack.identity.architecture == "llama"
    assert len(pack.identity.tensors) == 30 * 7
    for plane in pack.summary().planes:
        assert plane.n_positions > 0
    masks = {name: pack.pole(name).planes[0].positions for name in ("tidy", "messy")}
    for tensor in masks["tidy"].keys() & masks["messy"].keys():
        assert not np.intersect1d(masks["tidy"][tensor], masks["messy"][tensor]).size


# The runtime


def test_base_to_a_to_b_to_base_is_where_it_began(packed: Workplace) -> None:
    with PersonaRuntime.open(packed.model, n_ctx=256, n_threads=1) as cold:
        cold_digest, cold_text = cold.weights_digest(), cold.chat(ASKED, GREEDY).text
    with PersonaRuntime.open(packed.model, packed.pack, n_ctx=256, n_threads=1) as runtime:
        texts, digests = [], []
        for persona in (None, "tidy", "messy", None):
            if persona is None:
                runtime.base()
            else:
                runtime.switch(persona)
            digests.append(runtime.weights_digest())
            texts.append(runtime.chat(ASKED, GREEDY).text)
    assert digests[0] == digests[3] == cold_digest
    assert texts[0] == texts[3] == cold_text
    assert len(set(digests)) == 3
    assert texts[1] != cold_text


def test_chat_finds_the_pack_beside_the_model(packed: Workplace) -> None:
    asked: list[str | Path] = ["--message", QUESTION, "--temperature", "0", "--max-tokens", "24", "--threads", "1"]
    base = packed.run("chat", "--model", packed.model, *asked)
    tidy = packed.run("chat", "--model", packed.model, "--persona", "tidy", *asked)
    for result in (base, tidy):
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
    assert tidy.stdout != base.stdout


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
    asked: list[str | Path] = ["chat", "--model", packed.model, "--message", "Hello"]
    check_one_line(packed.run(*asked, "--persona", "INFP"), 2, "'INFP'", "tidy, messy")
    check_one_line(packed.run(*asked, "--pack", tmp_path / "gone.maskpack"), 1, "gone.maskpack", "cannot be read")
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
    asked: list[str | Path] = [
        "chat",
        "--model",
        packed.model,
        "--message",
        "Hello",
        "--persona",
        "tidy",
        "--pack",
        bad,
    ]
    check_one_line(packed.run(*asked), 1, "bad.maskpack")


# Packs and models that do not belong together


def pack_of(runtime: PersonaRuntime, path: Path) -> None:
    """Write a pack of random masks over two blocks of whatever model `runtime` has, with its real sign sketch."""
    random = np.random.default_rng(0)
    chosen = [t for n, t in runtime._tensors.items() if n.startswith(("blk.0.", "blk.5.")) and t.n_rows > 1]
    shapes = tuple(TensorShape(t.name, t.n_rows, t.n_columns) for t in chosen)
    sketch: dict[str, SignSample] = {}
    for tensor in chosen:
        weights = dequantize(tensor.data, tensor.ggml_type, np.arange(tensor.n_rows * tensor.n_columns))
        sketch[tensor.name] = sample_signs(weights.reshape(tensor.n_rows, tensor.n_columns))
    positions = {
        shape.name: np.sort(random.choice(shape.n_units(32), 20, replace=False)).astype(np.uint32) for shape in shapes
    }
    identity = ModelIdentity(runtime._model.architecture, shapes, sketch)
    write_pack(path, PersonaSet(identity, (Pole("odd", "random", (Plane(0.0, positions),)),), {"odd": ("odd",)}))


@pytest.mark.big
def test_the_pack_of_another_model(packed: Workplace, qwen_path: Path, tmp_path: Path) -> None:
    with PersonaRuntime.open(qwen_path, n_ctx=64, n_threads=1) as qwen:
        pack_of(qwen, tmp_path / "qwen.maskpack")
        qwen.attach(tmp_path / "qwen.maskpack")  # its own model takes it
    asked: list[str | Path] = [
        "chat",
        "--model",
        packed.model,
        "--message",
        "Hello",
        "--pack",
        tmp_path / "qwen.maskpack",
    ]
    check_one_line(packed.run(*asked, "--persona", "odd"), 1, "qwen2", "llama")
    check_one_line(packed.run(*asked), 1, "qwen2", "llama")


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
    asked: list[str | Path] = [
        "chat",
        "--model",
        other,
        "--message",
        "Hello",
        "--persona",
        "tidy",
        "--pack",
        packed.pack,
    ]
    check_one_line(packed.run(*asked), 1, "other weights", "%")


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
    asked: list[str | Path] = [
        "chat",
        "--model",
        ternary,
        "--message",
        "Hello",
        "--persona",
        "tidy",
        "--pack",
        packed.pack,
    ]
    check_one_line(packed.run(*asked), 1, "TQ1_0", "Q4_K")
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


def test_a_full_disk(packed: Workplace) -> None:
    before, content = packed.files(), packed.pack.read_bytes()
    result = packed.run(*packed.export_arguments(), prelude=LESS_DATA + NO_ROOM)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"persona-edge: error: cannot write {packed.pack}: ")
    assert "Traceback" not in result.stderr
    assert packed.files() == before
    assert packed.pack.read_bytes() == content


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
