"""`persona-edge inspect`: what it shows, JSON, checking against a model, and packs that no tool of ours would write."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_edge import cli
from persona_edge.maskpack import MaskPack, encode_pack, write_pack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, SignSample, TensorShape
from persona_edge.pack_description import describe, json_text, pack_lines
from tests.program import PATIENCE, RUN_CLI
from tests.tiny_chat import personas_for, write_model

REPORT: dict[str, Any] = {
    "tool": "persona-edge 0.1.0",
    "model": "tiny",
    "settings": {"method": "contrastive-fisher", "budget": None, "max_chat_kl": 0.15, "exclude": []},
    "poles": {
        "I": {
            "side": "negative",
            "budget_nats": 0.0021,
            "drift": {"perplexity_ratio": 1.013, "chat_kl": 0.1234, "web_kl": None},
            "held_out_base": {"n_contrasts": 21, "share_mean": 0.6},
            "held_out": {"n_contrasts": 21, "share_mean": 0.25},
        },
        "E": {"side": "positive", "held_out_base": {"share_mean": 0.5}, "held_out": {"share_mean": 0.75}},
    },
    "compositions": {"INFP": {"chat_kl": 0.5}, "ENTJ": {"chat_kl": 0.25}, "gone": {"chat_kl": 9}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs")
    model = write_model(path / "tiny.gguf")
    write_pack(path / "tiny.maskpack", personas_for(model, report=REPORT))
    return path


@pytest.fixture(scope="module")
def pack_path(folder: Path) -> str:
    return str(folder / "tiny.maskpack")


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["inspect", *arguments])


def shown(*arguments: str) -> str:
    result = inspect(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_it_shows_personas_planes_report_sizes_and_layers(pack_path: str) -> None:
    text = shown(pack_path)
    lines = text.splitlines()
    assert "for a llama model with 14 maskable tensors, 81,920 weights" in lines
    assert "6 personas, composed like INFP = I + N" in lines
    assert "  INFP ENTJ I E N night owl" in lines
    rows = {tuple(line.split()[:4]): line.split() for line in lines}
    summary = MaskPack.open(pack_path).summary()
    sizes = {(plane.pole, plane.index): plane for plane in summary.planes}
    for index, gate in enumerate(("0", "1.5")):
        row, size = rows["I", "EI", gate, "groups"], sizes["I", index]
        assert row[4:7] == [f"{size.n_positions}", f"{size.n_positions / 2560:.2%}", f"{size.n_bytes}"]
    quality = next(line for line in lines if line.startswith("I ") and "→" in line)
    assert quality.split() == ["I", "40%", "→", "75%", "21", "0.123", "1.013", "0.0021"]
    quality = next(line for line in lines if line.startswith("E ") and "→" in line)
    assert quality.split() == ["E", "50%", "→", "75%"]
    assert "composed: chat KL 0.250 (ENTJ) to 0.500 (INFP)" in lines
    assert any(line.split() == ["method", "contrastive-fisher"] for line in lines)
    assert not any(line.startswith(("budget ", "exclude")) for line in lines)
    assert "all 4 poles: what is gated, by block and tensor" in lines
    assert max(map(len, lines)) <= 80


def test_the_picture_can_be_chosen_or_left_out(pack_path: str) -> None:
    assert "what is gated" not in shown(pack_path, "--no-picture")
    assert "pole I: what is gated" in shown(pack_path, "--pole", "I")
    assert "persona night owl (E + I): what is gated" in shown(pack_path, "--persona", "Night Owl")
    assert "Percent of each tensor's weights." in shown(pack_path, "--layers")


def test_json_is_everything(pack_path: str) -> None:
    found = json.loads(shown(pack_path, "--json"))
    pack = MaskPack.open(pack_path)
    assert found["file"] == pack_path
    assert found["n_bytes"] == Path(pack_path).stat().st_size
    assert found["n_bytes"] == 48 + found["n_header_bytes"] + sum(s["n_bytes"] for s in found["sections"])
    assert found["personas"]["INFP"] == ["I", "N"]
    assert found["report"] == REPORT
    assert found["verified"] is None
    (first, *_) = found["poles"]
    assert (first["name"], first["axis"]) == ("E", "EI")
    plane = pack.pole("E").planes[0]
    assert first["planes"][0]["n_units"] == plane.n_positions
    assert first["planes"][0]["share_of_units"] == plane.n_positions / (81920 / 32)
    assert "shares_of_weights" not in first
    layers = json.loads(shown(pack_path, "--json", "--layers"))["poles"][0]["shares_of_weights"]
    assert set(layers) == {tensor.name for tensor in pack.identity.tensors}


def test_verify_tells_the_model_from_another(pack_path: str, folder: Path) -> None:
    text = shown(pack_path, "--verify", str(folder / "tiny.gguf"))
    n_samples = sum(len(s.positions) for s in MaskPack.open(pack_path).identity.sketch.values())
    assert f"belongs to {folder / 'tiny.gguf'}: {n_samples} of {n_samples} sampled signs agree" in text
    record = json.loads(shown(pack_path, "--json", "--verify", str(folder / "tiny.gguf")))
    assert record["verified"]["n_agreeing"] == n_samples
    other = write_model(folder / "other.gguf", seed=1)
    result = inspect(pack_path, "--verify", str(other))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("persona-edge: error: the pack was made from other weights: ")


def test_failures_are_one_line(pack_path: str, tmp_path: Path) -> None:
    data = Path(pack_path).read_bytes()
    bad = tmp_path / "bad.maskpack"
    contents = [b"", b"GGUF" * 100, data[:60], data[:-1], data + b"x", data[:-1] + bytes([data[-1] ^ 1])]
    for content in contents:
        bad.write_bytes(content)
        result = inspect(str(bad))
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(f"persona-edge: error: {bad}: ")
    for arguments in (
        [str(tmp_path / "none.maskpack")],
        [str(tmp_path)],
        [pack_path, "--pole", "X"],
        [pack_path, "--persona", "X", "--json"],
        [pack_path, "--verify", "no-such-model"],
    ):
        result = inspect(*arguments)
        assert result.exit_code in (1, 2)
        assert (result.stdout, result.stderr.count("\n")) == ("", 1)


def test_a_narrow_encoding_gets_ascii(pack_path: str) -> None:
    code = [*RUN_CLI, "inspect", pack_path]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "40% -> 75%" in done.stdout
    assert "##" in done.stdout
    assert "?" not in done.stdout


# Packs of other tools

SHAPES = (
    TensorShape("output.weight", 3, 5),
    TensorShape("blk.7.mixer.in_proj", 2, 64),
    TensorShape("blk.7.weight", 1, 32),
    TensorShape("blk.x.y", 1, 1),
)


def strange_pack(report: Mapping[str, Any]) -> MaskPack:
    """Odd names and shapes, negative gates, single weights, a long name, a persona called base."""
    weights = Plane(-1.0, {"output.weight": np.array([14], np.uint32), "blk.x.y": np.array([0], np.uint32)}, 1)
    groups = Plane(65504.0, {"blk.7.mixer.in_proj": np.array([3], np.uint32)})
    poles = (Pole("–" * 64, "轴", (weights, groups)), Pole("b", "轴", (groups,)))
    sketch = {"output.weight": SignSample(np.array([2], np.uint32), np.array([False]))}
    identity = ModelIdentity("mamba", SHAPES, sketch)
    personas = {"base": ("b",), "–" * 64: ("–" * 64, "b")}
    return MaskPack.from_bytes(encode_pack(PersonaSet(identity, poles, personas, report))[0])


KEYS = st.sampled_from(
    ["poles", "b", "drift", "chat_kl", "held_out", "share_mean", "side", "settings", "compositions", "base", "x\x1b[2J"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=100)
    | st.sampled_from(["positive", "negative"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_report_can_be_shown(report: dict[str, Any]) -> None:
    pack = strange_pack(report)
    text = "\n".join(pack_lines(pack, "x\x1b[2J.maskpack"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]", text)
    assert json.loads(json_text(describe(pack, tensors=True)))["report"] == json.loads(json.dumps(report))


def test_strange_names_and_shapes_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "strange.maskpack"
    write_pack(path, strange_pack({}).load())
    text = shown(str(path), "--layers")
    assert "output.weight: 6.67 %" in text
    assert "65504" in text
    assert "blk.x.y: 100 %" in text


def test_a_report_nested_deeply_is_cut(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(300):
        nested = [nested]
    path = tmp_path / "deep.maskpack"
    write_pack(path, strange_pack({"deep": nested}).load())
    assert "[[[[" in shown(str(path))
    assert json.loads(shown(str(path), "--json"))["report"] == {"deep": nested}
