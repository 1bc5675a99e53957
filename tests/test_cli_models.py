"""`persona-edge models`: listing, locating and fetching."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from persona_edge.catalogue import load_catalogue
from persona_edge.cli import main
from persona_edge.cli.progress import ProgressLine, bytes_text

LOCAL = """
name = "mine"
title = "Mine"
architecture = "llama"
parameters = 1_500_000_000
kind = "base"
licence = "MIT"

[[source]]
kind = "path"
path = "mine.gguf"
quantization = "Q8_0"
size = 9
verified = false
"""


@pytest.fixture(autouse=True)
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue entry for a file on this machine, and an empty cache."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.toml").write_text(LOCAL)
    (tmp_path / "own" / "mine.gguf").write_bytes(b"GGUF\x03more")
    monkeypatch.setenv("PERSONA_EDGE_CATALOGUE", str(tmp_path / "own"))
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "own" / "mine.gguf"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def test_list_shows_every_model_and_where_it_is() -> None:
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == [
        "name",
        "parameters",
        "architecture",
        "quantization",
        "kind",
        "size",
        "licence",
        "packs",
        "where",
    ]
    rows = {line.split()[0]: line for line in lines[1:] if line and not line.startswith("~")}
    assert set(rows) == set(load_catalogue())
    assert rows["mine"].split() == ["mine", "1.5B", "llama", "Q8_0", "base", "0", "kB", "MIT", "-", "local"]
    assert rows["qwen2.5-14b"].endswith("needs download")
    assert "~9.0 GB" in rows["qwen2.5-14b"]
    assert "98 MB" in rows["smollm2-135m"]


def test_list_as_json_holds_the_whole_catalogue(own_model: Path) -> None:
    listed = {model["name"]: model for model in json.loads(run("list", "--json").stdout)}
    assert set(listed) == set(load_catalogue())
    assert listed["mine"]["path"] == str(own_model)
    assert listed["mine"]["where"] == "local"
    default = listed["smollm2-135m"]
    assert default["licence"] == "Apache-2.0"
    assert default["sources"][0]["verified"] is True
    assert [Path(pack).name for pack in default["packs"]] == ["SmolLM2-135M-Instruct.Q4_1.mbti16.maskpack"]
    assert all(Path(pack).is_file() for pack in default["packs"])
    assert listed["mine"]["packs"] == []
    assert default["originals"] == [{"repo": "HuggingFaceTB/SmolLM2-135M-Instruct", "path": None, "verified": False}]


def test_path_prints_only_the_path(own_model: Path) -> None:
    result = run("path", "mine")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{own_model}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["path", "mien"], "no model 'mien'; did you mean mine?; persona-edge models list shows all"),
        (["path", "llama3-8b"], "llama3-8b is not on this machine; run persona-edge models pull llama3-8b"),
        (["pull", "mine", "lama3-8b"], "no model 'lama3-8b'; did you mean llama3-8b"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"persona-edge: error: {message}")
    assert result.stderr.count("\n") == 1


def test_path_of_a_file_that_is_no_gguf(own_model: Path) -> None:
    own_model.write_bytes(b"not a gguf")
    result = run("path", "mine")
    assert result.exit_code == 1
    assert "not a GGUF file" in result.stderr


def test_pull_prints_paths_and_no_progress_into_a_pipe(own_model: Path) -> None:
    result = run("pull", "mine", "MINE", "--verify")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{own_model}\n{own_model}\n", "")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (98_362_432, "98 MB"),
        (999_999_999, "1.0 GB"),
        (4_920_000_000, "4.9 GB"),
    ],
)
def test_sizes_read_as_downloads_do(n_bytes: int, text: str) -> None:
    assert bytes_text(n_bytes) == text


def test_progress_rewrites_one_line_and_wipes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    with ProgressLine() as progress:
        progress("unseen", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with ProgressLine() as progress:
        progress("a", 5_000_000, 10_000_000)
        progress("a", 5_000_001, 10_000_000)
        progress("a step with a long name", 0, None)
    clear = "\r\x1b[K"
    assert capsys.readouterr().err == f"{clear}a: 5 MB of 10 MB, 5{clear}a step with a long {clear}"
