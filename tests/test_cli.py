"""The command line's frame: help without heavy imports, one line per error, exit codes, closed pipes, Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from persona_edge import __version__, cli
from persona_edge.errors import InputError, ModelError
from tests.program import PATIENCE, RUN_CLI


def run_with(monkeypatch: pytest.MonkeyPatch, command: click.Command, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program with `command` as its only command, `try`."""
    module = type(sys)("persona_edge_test_command")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "_COMMANDS", {"try": cli.LazyCommand(module.__name__, "command", "Try.")})
    result = CliRunner().invoke(cli.main, ["try", *arguments])
    return result.exit_code, result.stdout, result.stderr


def failing(error: BaseException) -> click.Command:
    @click.command()
    def fail() -> None:
        click.echo("before")
        raise error

    return fail


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom persona_edge.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'numpy', 'torch', 'transformers', 'llama_cpp', 'jinja2', 'huggingface_hub', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "ours = {name for name in sys.modules if name.startswith('persona_edge')}\n"
        "assert ours == {'persona_edge', 'persona_edge.cli', 'persona_edge.errors'}, ours\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert __version__ in result.stdout or "doctor" in result.stdout


def test_help_lists_every_command_without_importing_it() -> None:
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    for name in ("export", "chat", "inspect", "models", "doctor"):
        assert name in result.stdout


@pytest.mark.parametrize("name", ["models", "doctor"])
def test_lazy_commands_can_be_imported(name: str) -> None:
    assert CliRunner().invoke(cli.main, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (InputError("no such option"), 2, "no such option"),
        (ModelError("two\nlines   of text"), 1, "two lines of text"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (click.UsageError("what?"), 2, "what? (see persona-edge try --help)"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "/root/x: Permission denied"),
        (OSError("odd"), 1, "odd"),
        (MemoryError(), 1, "out of memory; close other programs or take a smaller model"),
    ],
)
def test_failure_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, exit_code: int, line: str
) -> None:
    assert run_with(monkeypatch, failing(error)) == (exit_code, "before\n", f"persona-edge: error: {line}\n")


def test_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("persona_edge_test_command")
    module.command = failing(ZeroDivisionError())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "_COMMANDS", {"try": cli.LazyCommand(module.__name__, "command", "Try.")})
    assert isinstance(CliRunner().invoke(cli.main, ["try"]).exception, ZeroDivisionError)


def test_command_leaves_with_the_exit_code_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.pass_context
    def leave(context: click.Context) -> None:
        context.exit(7)

    assert run_with(monkeypatch, leave) == (7, "", "")


def test_what_a_command_returns_is_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def count() -> int:
        return 3

    assert run_with(monkeypatch, count) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["modles"], "No such command 'modles'. (see persona-edge --help)"),
        (["models", "pull"], "Missing argument 'NAME...'. (see persona-edge models pull --help)"),
        (["models", "list", "--bad"], "No such option '--bad'. (see persona-edge models list --help)"),
    ],
)
def test_mistyped_command_line_is_one_line(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    # click words and quotes its message differently from version to version; the frame is ours.
    assert result.stderr.replace("option: --bad", "option '--bad'.") == f"persona-edge: error: {line}\n"


@pytest.mark.parametrize("arguments", [[], ["models"]])
def test_group_without_a_command_shows_its_help(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert "Commands:" in result.output
    assert "error" not in result.output


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_it.py").write_text("import package_that_is_not_there.part\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "_COMMANDS", {"try": cli.LazyCommand("needs_it", "command", "Try.")})
    result = CliRunner().invoke(cli.main, ["try"])
    assert result.exit_code == 1
    expected = "package_that_is_not_there is not installed; run pip install 'persona-edge[offline]'"
    assert result.stderr == f"persona-edge: error: {expected}\n"


def test_reader_that_closes_the_pipe_ends_it_quietly() -> None:
    process = subprocess.Popen(
        [*RUN_CLI, "models", "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(PATIENCE) == 1


def test_narrow_encoding_replaces_what_it_lacks() -> None:
    code = "from persona_edge import cli\n"
    code += "cli._COMMANDS = {'try': cli.LazyCommand('none', 'command', 'Try … ✓.')}\ncli.main(['--help'])\n"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert b"Try ? ?." in result.stdout
