"""The command line's frame: one group whose commands are imported when they are run, and one place for errors.

`persona-edge --help` imports click and nothing else. Whatever goes wrong on purpose leaves here as one line on stderr,
`persona-edge: error: …`, and the error's exit code: 2 for what was typed, 130 for Ctrl-C, 1 for the rest. A reader
that closes the pipe ends the program quietly. No logic lives in `persona_edge.cli`: commands parse, call one function,
print.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TextIO

import click

from persona_edge import __version__
from persona_edge.errors import MissingDependencyError, PersonaEdgeError

__all__ = ["LazyCommand", "LazyGroup", "main"]

_PROGRAM = "persona-edge"


@dataclass(frozen=True)
class LazyCommand:
    """A command by the place it is defined in; `help` stands in for its docstring until it is imported."""

    module: str
    attribute: str
    help: str

    def load(self) -> click.Command:
        """Imports the command. Raises MissingDependencyError when a package that it needs is not installed."""
        try:
            command = getattr(importlib.import_module(self.module), self.attribute)
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.module}:{self.attribute} is not a command")
        return command


_COMMANDS: Mapping[str, LazyCommand] = {
    "export": LazyCommand("persona_edge.cli.export", "export", "Calibrate a model and write a mask pack of personas."),
    "chat": LazyCommand("persona_edge.cli.chat", "chat", "Talk to a model and switch its persona as you go."),
    "eval": LazyCommand(
        "persona_edge.cli.evaluate", "evaluate", "Measure what personas do to a model, and what they cost."
    ),
    "inspect": LazyCommand("persona_edge.cli.inspect", "inspect", "Show what a mask pack holds and how good it is."),
    "personas": LazyCommand("persona_edge.cli.personas", "personas", "List, show, check and write calibration sets."),
    "models": LazyCommand("persona_edge.cli.models", "models", "List, locate and fetch the models of the catalogue."),
    "doctor": LazyCommand(
        "persona_edge.cli.doctor", "doctor", "Check what is installed and what to do about the rest."
    ),
}


class _InterruptedError(PersonaEdgeError):
    """Ctrl-C, as the shell counts it."""

    exit_code: ClassVar[int] = 130


class LazyGroup(click.Group):
    """A click group over `_COMMANDS` that turns every expected failure into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a first use, not of the alphabet."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None when there is none of this name."""
        command = _COMMANDS.get(cmd_name)
        return command.load() if command is not None else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> None:
        """Runs the command and flushes what it printed, so that a closed pipe shows up here and not at exit."""
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            # Here and not in `main`: click would print an empty line of its own first.
            raise _InterruptedError("interrupted") from None
        # What a command returns is not passed on: `main` would take a number for an exit code.

    def main(  # type: ignore[override]  # click overloads it by standalone_mode, with the same parameters
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,  # click's own signature
    ) -> object:
        """Runs the program; with `standalone_mode` it always leaves by SystemExit."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        _print_anything(sys.stdout)
        _print_anything(sys.stderr)
        code: object
        try:
            code = super().main(args, prog_name or _PROGRAM, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            code = _report_usage(error)
        except PersonaEdgeError as error:
            code = _report(str(error), error.exit_code)
        except click.Abort:
            code = _report("interrupted", _InterruptedError.exit_code)
        except MemoryError:
            code = _report("out of memory; close other programs or take a smaller model", 1)
        except OSError as error:
            code = _report(_os_error(error), 1)
        sys.exit(code if isinstance(code, int) else 0)


def _report(message: str, exit_code: int) -> int:
    click.echo(f"{_PROGRAM}: error: {' '.join(message.split())}", err=True)
    return exit_code


def _report_usage(error: click.ClickException) -> int:
    context = error.ctx if isinstance(error, click.UsageError) else None
    # A group without a command shows its help; since click 8.2 that arrives as an error whose text is the help page.
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return _report(error.format_message() + hint, error.exit_code)


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error or type(error).__name__}"


def _missing(error: ModuleNotFoundError) -> MissingDependencyError:
    name = error.name or "a module"
    if name.partition(".")[0] == "persona_edge":
        return MissingDependencyError(f"{name} is not part of this installation; reinstall persona-edge")
    return MissingDependencyError(f"{name} is not installed; run pip install 'persona-edge[offline]'")


def _print_anything(stream: TextIO) -> None:
    """Lets a terminal or pipe with a narrow encoding show `?` where it lacks a character, instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


@click.command(_PROGRAM, cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=_PROGRAM)
def main() -> None:
    """Give a local language model a character, by masking a small share of its quantized weights in place."""
