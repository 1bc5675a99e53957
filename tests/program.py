"""The program as a user starts it: in a process of its own, or `persona-edge chat` within this one."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Final

from click.testing import CliRunner, Result

from persona_edge import cli

PROGRAM: Final = "from persona_edge.cli import main; main()"
RUN_CLI: Final = [sys.executable, "-c", PROGRAM]
RUN_WITHOUT_TORCH: Final = [
    *RUN_CLI[:-1],
    f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n{PROGRAM}",
]
CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def run_chat(*arguments: str, model: str, text: str = "", seed: str = "1") -> Result:
    """`persona-edge chat` on `model` with short answers; `text` is its input."""
    common = ["chat", "--model", model, "--threads", "1", "--seed", seed, "--max-tokens", "20"]
    return CliRunner().invoke(cli.main, [*common, *arguments], input=text)


def answer_records(result: Result) -> list[dict[str, Any]]:
    """What `persona-edge chat --json` printed."""
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
