"""`persona-edge chat` in a real terminal: prompt, completion, Ctrl-C, and a whole chat on the real model."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from persona_edge.maskpack import write_pack
from tests.program import PATIENCE, RUN_CLI
from tests.tiny_chat import personas_for


class Terminal:
    """`persona-edge chat` on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._received = ""
        self._n_taken = 0
        self._main, child = pty.openpty()
        termios.tcsetwinsize(child, (24, 80))
        environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull, "PYTHONUNBUFFERED": "1"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [*RUN_CLI, "chat", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
        )
        os.close(child)

    @property
    def screen(self) -> str:
        """What was printed and not yet taken, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self._received)[self._n_taken :]

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> str:
        """The screen up to and with `pattern`, which is then taken off it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.screen)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} did not come: {self.screen!r}"
            if select.select([self._main], [], [], left)[0]:
                self._received += self._decoder.decode(os.read(self._main, 65536))
        self._n_taken += match.end()
        return str(match.string[: match.end()])

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def ends(self) -> int:
        """The exit code, once the program has left."""
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_terminal_has_a_prompt_completion_and_a_clean_end(terminal: Callable[..., Terminal], tiny_model: str) -> None:
    chat = terminal("--model", tiny_model, "--threads", "1", "--max-tokens", "8", "--seed", "1")
    greeting = chat.wait_for("base> ")
    assert "tiny.gguf with 6 personas from tiny.mbti.maskpack" in greeting
    chat.type("/per\tENT\t\n")
    assert "base → ENTJ at strength 1: " in chat.wait_for("ENTJ> ")
    chat.type("Hi\n")
    assert "cut after 8 tokens" in chat.wait_for("ENTJ> ")
    chat.type("/wrong\n")
    assert "no command /wrong" in chat.wait_for("ENTJ> ")
    chat.type("/stats\n")
    assert "first token after" in chat.wait_for("ENTJ> ")
    chat.type("\x04")
    assert chat.ends() == 0


def test_ctrl_c_stops_an_answer_and_at_the_prompt_leaves(terminal: Callable[..., Terminal], tiny_model: str) -> None:
    chat = terminal("--model", tiny_model, "--threads", "1", "--max-tokens", "1000000", "--context", "512")
    chat.wait_for("base> ")
    chat.type("/help\n")
    assert "Ctrl-C during an answer" in chat.wait_for("base> ")
    chat.interrupt()
    assert chat.ends() == 0


@pytest.mark.model
def test_a_whole_chat_on_the_real_model(terminal: Callable[..., Terminal], smollm2_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "smollm2.gguf"
    model.symlink_to(smollm2_path)
    pack = tmp_path / "smollm2.test.maskpack"
    write_pack(pack, personas_for(model, personas={"INFP": ("I", "N"), "ENTJ": ("E", "N")}, blocks=(3, 20)))
    chat = terminal("--model", str(model), "--persona", "infp", "--threads", "1", "--temperature", "0")
    assert "smollm2.gguf with 2 personas" in chat.wait_for("INFP> ")
    chat.type("Write a very long story about a lighthouse.\n")
    chat.wait_for("lighthouse.\n")  # the line that was typed
    chat.wait_for(r"\w+ \w+ ")
    chat.interrupt()
    assert "stopped" in chat.wait_for("INFP> ")
    chat.type("/persona ENTJ\n")
    assert re.search(r"INFP → ENTJ at strength 1: [\d,]+ units, \d.* written in ", chat.wait_for("ENTJ> "))
    chat.type("/compare base INFP: Say yes.\n")
    compared = chat.wait_for("ENTJ> ")
    assert [line.strip("─ ") for line in compared.splitlines() if line.startswith("──")] == [
        "base",
        "INFP",
        "switches, in place",
    ]
    assert max(map(len, compared.splitlines())) <= 80
    chat.type("/stats\n")
    assert "tokens/s" in chat.wait_for("ENTJ> ")
    chat.type("/quit\n")
    assert chat.ends() == 0
