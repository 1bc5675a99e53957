"""The documentation holds: its Python samples run, its commands and options exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from persona_edge.cli import main
from persona_edge.contrasts import load_contrasts
from persona_edge.maskpack import write_pack
from persona_edge.runtime import llama_backend
from tests.tiny_chat import personas_for

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "persona_edge" / "personas" / "README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PERSONAS: dict[str, tuple[str, ...]] = {"INFP": ("I", "N"), "ENTJ": ("E", "N")}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[str]:
    """The lines of code blocks that run persona-edge, continuation lines joined."""
    text = re.sub(r" *\\\n *", " ", page.read_text(encoding="utf-8"))
    return re.findall(r"^ *(?:\$ )?persona-edge (.*)$", text, re.MULTILINE)


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `words` name, and its arguments."""
    command: click.Command = main
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"no command {words[0]!r}"
        command, words = found, words[1:]
    return command, words


def all_options(command: click.Command) -> set[str]:
    """Every option of a command and of those below it."""
    options = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
    if isinstance(command, click.Group):
        context = click.Context(command)
        children = [command.get_command(context, name) for name in command.list_commands(context)]
        options = options.union(*(all_options(child) for child in children if child is not None))
    return options


@pytest.mark.model
def test_the_samples_of_embedding_run(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2_path)
    write_pack(tmp_path / "model.mbti16.maskpack", personas_for(smollm2_path, personas=PERSONAS))
    monkeypatch.chdir(tmp_path)
    # Threads that wait for each other crawl where tests run side by side; which default is chosen is tested elsewhere.
    monkeypatch.setattr(llama_backend, "default_n_threads", lambda: 1)
    page = ROOT / "docs" / "embedding.md"
    samples = blocks(page, "python")
    assert len(samples) >= 6
    exec(compile("\n".join(samples), str(page), "exec"), {"__name__": "sample"})
    printed = capsys.readouterr().out
    assert "('INFP', 'ENTJ')" in printed
    assert "24 tokens in" in printed
    assert "no persona 'nobody'; this pack has INFP, ENTJ" in printed


@pytest.mark.model
def test_the_sample_of_models_runs(smollm2_path: Path) -> None:
    (sample,) = blocks(ROOT / "docs" / "models.md", "python")
    names: dict[str, object] = {}
    exec(compile(sample, "models.md", "exec"), names)
    assert getattr(names["model"], "gguf_path", None) == smollm2_path


def test_the_calibration_set_of_own_personas_loads(tmp_path: Path) -> None:
    (sample,) = blocks(ROOT / "docs" / "own-personas.md", "jsonl")
    (tmp_path / "warm.jsonl").write_text(sample, encoding="utf-8")
    found = load_contrasts(tmp_path / "warm.jsonl")
    assert (found.axis, found.positive_pole, found.negative_pole, len(found)) == ("tone", "warm", "blunt", 2)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_command_lines_are_understood(page: Path) -> None:
    for line in command_lines(page):
        command, arguments = find_command(shlex.split(line, comments=True))
        command.make_context(command.name, arguments)  # raises for options and values that it does not take


def test_command_lines_are_found() -> None:
    assert sum(len(command_lines(page)) for page in PAGES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_that_are_mentioned_exist(page: Path) -> None:
    known = all_options(main) | {"--no-deps"}  # pip's
    mentioned = set(re.findall(r"`(?:[^`\n]* )?(--[a-z][a-z-]*)[^`\n]*`", page.read_text(encoding="utf-8")))
    assert mentioned <= known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:docs|persona_edge|runtime|exporters|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    others = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in others if f"({name})" not in index] == []
