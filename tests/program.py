"""The program as a user starts it: in a process of its own, or `persona-edge chat` within this one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from click.testing import CliRunner, Result

from persona_edge import cli

PATIENCE: Final = 180.0
"""Seconds: what has not happened by then never will, however busy the machine is."""
PROGRAM: Final = "from persona_edge.cli import main; main()"
# Tests that a shell runs in the background would ignore Ctrl-C, and so would their children.
LISTEN_TO_CTRL_C: Final = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
RUN_CLI: Final = [sys.executable, "-c", LISTEN_TO_CTRL_C + PROGRAM]
RUN_WITHOUT_TORCH: Final = [
    *RUN_CLI[:-1],
    f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n{PROGRAM}",
]
CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@contextmanager
def started(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """The program with a pipe to each of its streams; killed when the test ends before it does."""
    pipe = subprocess.PIPE
    command = [*RUN_CLI, *arguments]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run_chat(*arguments: str, model: str, text: str = "", seed: str = "1") -> Result:
    """`persona-edge chat` on `model` with short answers; `text` is its input."""
    common = ["chat", "--model", model, "--threads", "1", "--seed", seed, "--max-tokens", "20"]
    return CliRunner().invoke(cli.main, [*common, *arguments], input=text)


def answer_records(result: Result) -> list[dict[str, Any]]:
    """What `persona-edge chat --json` printed."""
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
