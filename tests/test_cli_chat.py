"""`persona-edge chat` as a program: messages, pipes, JSON, choosing the pack, failures in one line, a real terminal."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from persona_edge import cli
from persona_edge.chat_output import TextOutput
from persona_edge.chat_values import Answer
from persona_edge.find_packs import find_pack, packs_beside
from persona_edge.maskpack import write_pack
from tests.tiny_chat import personas_for, write_model, write_model_and_pack

RUN_CLI = [sys.executable, "-c", "from persona_edge.cli import main; main()"]
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_model_and_pack(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return str(folder / "tiny.gguf")


def run(*arguments: str, model: str, text: str = "", seed: str = "1") -> Result:
    common = ["chat", "--model", model, "--threads", "1", "--seed", seed, "--max-tokens", "20"]
    return CliRunner().invoke(cli.main, [*common, *arguments], input=text)


def records(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# One question


def test_message_prints_the_answer_only(model: str) -> None:
    plain = run("--persona", "infp", "--message", "Hi", model=model)
    (record,) = records(run("--persona", "infp", "--message", "Hi", "--json", model=model))
    assert (plain.exit_code, plain.stderr) == (0, "")
    assert plain.stdout == CONTROLS.sub("", record["text"]) + "\n"
    assert run("--message", "Hi", model=model).stdout != plain.stdout


def test_messages_are_turns_of_one_conversation(model: str) -> None:
    together = records(run("--message", "One", "--message", "/stats", "--json", model=model))
    alone = records(run("--message", "/stats", "--json", model=model))
    assert [record["question"] for record in together] == ["One", "/stats"]
    assert together[1]["n_prompt_tokens"] > alone[0]["n_prompt_tokens"]


def test_json_has_what_was_measured(model: str) -> None:
    first, second = records(run("--persona", "ENTJ", "--strength", "0.5", "--json", model=model, text="One\nTwo\n"))
    assert (first["persona"], first["strength"], first["seed"], second["seed"]) == ("ENTJ", 0.5, 1, 2)
    assert first["n_tokens"] == 20
    assert first["finish_reason"] == "length"
    assert 0 < first["seconds_to_first_token"] <= first["seconds"]
    assert first["tokens_per_second"] > 0
    switch = first["switch"]
    assert (switch["from"], switch["persona"], switch["strength"]) == (None, "ENTJ", 0.5)
    assert switch["n_units_written"] > 0
    assert 0 < switch["seconds"] < switch["seconds_to_first_token"]
    assert second["switch"] is None


def test_a_seed_repeats_the_answers_and_without_one_they_differ(model: str) -> None:
    lines = {run("--message", "Hi", model=model, seed=seed).stdout for seed in ("1", "1", "2")}
    assert len(lines) == 2
    chat = ["chat", "--model", model, "--threads", "1", "--message", "Hi", "--temperature", "2"]
    assert len({CliRunner().invoke(cli.main, chat).stdout for _ in range(2)}) == 2


def test_system_prompt_reaches_the_model(model: str) -> None:
    (without,) = records(run("--message", "Hi", "--json", model=model))
    (with_system,) = records(run("--message", "Hi", "--system", "x" * 40, "--json", model=model))
    assert with_system["n_prompt_tokens"] - without["n_prompt_tokens"] >= 40


def test_compare_shows_each_answer_and_the_switches(model: str) -> None:
    result = run("--compare", "base, infp,ENTJ", "--message", "What now?", model=model)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "What now?"
    headings = [line.strip("─ ") for line in lines if line.startswith("── ")]
    assert headings == ["base", "INFP", "ENTJ", "switches, in place"]
    switches = [line.split("  ")[1] for line in lines[-3:]]
    assert switches == ["base → INFP", "INFP → ENTJ", "ENTJ → base"]
    assert all(re.search(r" \d[\d.]* (µs|ms|s) +[\d,]+ units +\d[\d.]* (B|kB)", line) for line in lines[-3:])
    assert max(map(len, lines)) <= 80


def test_compare_in_json_is_a_record_per_answer(model: str) -> None:
    found = records(run("--compare", "INFP,base", "--message", "One", "--message", "Two", "--json", model=model))
    assert [(r["question"], r["persona"]) for r in found] == [
        ("One", "INFP"),
        ("One", None),
        ("Two", "INFP"),
        ("Two", None),
    ]
    assert len({r["n_prompt_tokens"] for r in found}) == 1


# Pipes


def test_a_pipe_prints_answers_and_carries_out_commands(model: str) -> None:
    text = "One\n\n/persona INFP\nOne\n/nonsense\n/persona\nTwo\n/quit\nThree\n"
    result = run(model=model, text=text)
    assert result.exit_code == 2
    assert "base> " not in result.output
    problems = [line for line in result.stderr.splitlines() if "nonsense" in line]
    assert problems == ["no command /nonsense; /help lists them, and // sends a line that begins with a slash"]
    assert "base → INFP at strength 1: " in result.stderr
    assert "*INFP" in result.stdout
    expected = records(run("--json", model=model, text="One\n/persona INFP\nOne\nTwo\n"))
    for record in expected:
        assert CONTROLS.sub("", record["text"]) + "\n" in result.stdout
    assert [record["persona"] for record in expected] == [None, "INFP", "INFP"]


def test_no_control_character_of_the_model_reaches_the_output(model: str) -> None:
    arguments = ["--message", "Hi", "--max-tokens", "400", "--temperature", "5"]
    (record,) = records(run(*arguments, "--json", model=model))
    assert CONTROLS.search(record["text"])
    for more in ([], ["--compare", "base,INFP"]):
        shown = run(*arguments, *more, model=model)
        assert shown.exit_code == 0
        assert not CONTROLS.search(shown.output)
    raw = run(*arguments, "--json", model=model)
    assert not CONTROLS.search(raw.stdout)


def test_bytes_that_are_no_utf8_are_no_reason_to_fail(model: str) -> None:
    common = [*RUN_CLI, "chat", "--model", model, "--threads", "1", "--max-tokens", "5", "--json"]
    done = subprocess.run(common, input=b"caf\xe9\n", capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["question"] == "caf\ufffd"
    done = subprocess.run([*common, "--message", b"caf\xe9"], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_answers_come_while_the_pipe_stays_open(model: str) -> None:
    common = [*RUN_CLI, "chat", "--model", model, "--threads", "1", "--max-tokens", "5", "--json"]
    with subprocess.Popen(common, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for question in ("One", "Two"):
            process.stdin.write(question + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["question"] == question
        process.stdin.close()
        assert process.wait(30) == 0


def test_ctrl_c_in_a_pipe_ends_it_with_the_answer_so_far(model: str) -> None:
    common = [*RUN_CLI, "chat", "--model", model, "--threads", "1", "--json"]
    with subprocess.Popen(
        common, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("One\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "persona-edge: error: interrupted\n"


# Choosing the pack


def test_packs_beside_are_those_of_this_model_newest_first(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.Q4.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    names = ["a.one.maskpack", "a.Q4.two.maskpack", "a.three.maskpack", "b.four.maskpack", "five.maskpack"]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(0, 10**18 - age))
    assert [p.name for p in packs_beside(tmp_path / "a.gguf")] == ["a.one.maskpack", "a.three.maskpack"]
    assert [p.name for p in packs_beside(tmp_path / "a.Q4.gguf")] == ["a.Q4.two.maskpack"]
    assert packs_beside(tmp_path / "c.gguf") == ()


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A model with three packs: old and new hold INFP, the newest holds only XYZ."""
    model = write_model(tmp_path / "m.gguf")
    personas: dict[str, dict[str, tuple[str, ...]]] = {
        "old": {"INFP": ("I", "N"), "OLD": ("I",)},
        "new": {"INFP": ("I", "N")},
        "newest": {"XYZ": ("E",)},
    }
    for age, (name, held) in enumerate(personas.items()):
        path = tmp_path / f"m.{name}.maskpack"
        write_pack(path, personas_for(model, personas=held))
        os.utime(path, ns=(0, 10**18 + age))
    return model


def test_the_newest_pack_that_holds_all_that_is_wanted_is_taken(several: Path) -> None:
    found = find_pack(several, ["INFP"], "m")
    assert found.path.name == "m.new.maskpack"
    assert found.note == "using m.new.maskpack, the newest of 2 packs with INFP; --pack chooses another"
    assert find_pack(several, ["infp", "OLD"], "m").note is None
    assert find_pack(several, [], "m").path.name == "m.newest.maskpack"
    result = run("--persona", "INFP", "--message", "Hi", model=str(several))
    assert (result.exit_code, result.stderr) == (0, f"{found.note}\n")


def test_a_damaged_pack_is_passed_over_as_long_as_another_serves(several: Path) -> None:
    damaged = several.with_name("m.new.maskpack")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = find_pack(several, ["INFP"], "m")
    assert found.path.name == "m.old.maskpack"
    assert found.note is not None
    assert "passed over a damaged pack" in found.note
    assert str(damaged) in found.note


def test_a_pack_that_nobody_asked_for_does_not_keep_the_model_from_talking(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", seed=1)
    write_pack(tmp_path / "m.mbti.maskpack", personas_for(write_model(tmp_path / "other.gguf", seed=2)))
    result = run(model=str(model), text="Hi\n/persona INFP\n")
    assert result.stdout.endswith("\n")
    assert "m.mbti.maskpack was left out: the pack was made from other weights" in result.stderr
    assert "no persona 'INFP': the pack was made from other weights" in result.stderr
    assert result.exit_code == 2


def failure(*arguments: str, model: str) -> str:
    """The one line on stderr of a call that fails before anything is printed."""
    result = run(*arguments, "--message", "Hi", model=model)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.startswith("persona-edge: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("persona-edge: error: ").strip()


def test_no_pack_names_the_command_that_makes_one(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "my model.gguf"))
    command = f"persona-edge export --model '{model}' --personas"
    for persona, made_with in (("INFP", "mbti16"), ("i", "mbti16"), ("pirate", "CONTRASTS.jsonl")):
        assert failure("--persona", persona, model=model) == (
            f"no mask pack next to {model}; make one with: {command} {made_with} (or pass --pack)"
        )


def test_a_pack_without_the_persona_lists_what_it_has(model: str, folder: Path) -> None:
    line = failure("--persona", "INTJ", model=model)
    assert line.startswith("no persona 'INTJ' in tiny.mbti.maskpack, which has INFP, ENTJ, I, E, N, night owl; ")
    assert line.endswith("--personas mbti16")
    pack = folder / "tiny.mbti.maskpack"
    line = failure("--compare", "base,INTJ", "--pack", str(pack), model=model)
    assert line == f"no persona 'INTJ' in {pack}; it has INFP, ENTJ, I, E, N, night owl"


def test_failures_are_one_line(model: str, tmp_path: Path, folder: Path) -> None:
    pack = (folder / "tiny.mbti.maskpack").read_bytes()
    bad = tmp_path / "bad.maskpack"
    assert f"{bad}: cannot be read" in failure("--pack", str(bad), model=model)
    for data in (b"", pack[:100], pack[:-5], pack[:-5] + bytes([pack[-5] ^ 1]) + pack[-4:]):
        bad.write_bytes(data)
        assert str(bad) in failure("--pack", str(bad), "--persona", "INFP", model=model)
    other = str(write_model(tmp_path / "other.gguf", seed=3))
    whole = str(folder / "tiny.mbti.maskpack")
    assert "the pack was made from other weights" in failure("--pack", whole, model=other)
    assert "no such file" in failure(model=str(tmp_path / "none.gguf"))
    assert "the question is empty" in failure("--message", " ", model=model)
    assert "temperature is -1.0" in failure("--temperature", "-1", model=model)
    assert "max_tokens is 0" in failure("--max-tokens", "0", model=model)
    assert "seed is -1" in failure("--seed", "-1", model=model)
    assert "n_threads is 0" in failure("--threads", "0", model=model)
    assert "n_ctx is 0" in failure("--context", "0", model=model)
    assert "strength" in failure("--strength", "1.5", model=model)
    assert "but the context holds 256" in failure("--context", "256", "--message", "a" * 300, model=model)


def test_chat_does_not_import_the_offline_half(model: str) -> None:
    code = (
        "import sys\nfrom persona_edge.cli import main\n"
        f"try: main(['chat', '--model', {model!r}, '--threads', '1', '--persona', 'INFP', '--message', 'Hi'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'gguf', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


# How it looks


def test_narrow_encodings_get_plain_marks() -> None:
    class Narrow(StringIO):
        encoding = "ascii"

    out = Narrow()
    TextOutput(out, out).show("a → b in 5 µs ── …")
    assert out.getvalue() == "a -> b in 5 us -- ...\n"


def test_colour_needs_a_terminal_and_no_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    def shown() -> str:
        out = Terminal()
        TextOutput(out, out, interactive=True).note("note \x1b[31m")
        return out.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown() == "\x1b[2mnote [31m\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "note [31m\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert shown() == "note [31m\n"


def test_an_empty_answer_is_said_to_be_one_where_answers_are_compared() -> None:
    out = StringIO()
    output = TextOutput(out, out)
    output.comparison_begins("Q")
    output.answer_begins("INFP", 1.0)
    output.answer_ends(Answer("INFP", 1.0, "Q", "", 0, None, None))
    assert "(no answer)" in out.getvalue()


# A real terminal


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

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
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
        return self.process.wait(30)

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


def test_a_terminal_has_a_prompt_completion_and_a_clean_end(terminal: Callable[..., Terminal], model: str) -> None:
    chat = terminal("--model", model, "--threads", "1", "--max-tokens", "8", "--seed", "1")
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


def test_ctrl_c_stops_an_answer_and_at_the_prompt_leaves(terminal: Callable[..., Terminal], model: str) -> None:
    chat = terminal("--model", model, "--threads", "1", "--max-tokens", "1000000", "--context", "512")
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
