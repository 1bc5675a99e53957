"""`persona-edge chat` as a program: messages, pipes, JSON, and characters that no terminal should get."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

from click.testing import CliRunner

from persona_edge import cli
from tests.program import CONTROLS, PATIENCE, RUN_CLI, answer_records, run_chat, started

# One question


def test_message_prints_the_answer_only(tiny_model: str) -> None:
    plain = run_chat("--persona", "infp", "--message", "Hi", model=tiny_model)
    (record,) = answer_records(run_chat("--persona", "infp", "--message", "Hi", "--json", model=tiny_model))
    assert (plain.exit_code, plain.stderr) == (0, "")
    assert plain.stdout == CONTROLS.sub("", record["text"]) + "\n"
    assert run_chat("--message", "Hi", model=tiny_model).stdout != plain.stdout


def test_messages_are_turns_of_one_conversation(tiny_model: str) -> None:
    together = answer_records(run_chat("--message", "One", "--message", "/stats", "--json", model=tiny_model))
    alone = answer_records(run_chat("--message", "/stats", "--json", model=tiny_model))
    assert [record["question"] for record in together] == ["One", "/stats"]
    assert together[1]["n_prompt_tokens"] > alone[0]["n_prompt_tokens"]


def test_json_has_what_was_measured(tiny_model: str) -> None:
    first, second = answer_records(
        run_chat("--persona", "ENTJ", "--strength", "0.5", "--json", model=tiny_model, text="One\nTwo\n")
    )
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


def test_a_seed_repeats_the_answers_and_without_one_they_differ(tiny_model: str) -> None:
    lines = {run_chat("--message", "Hi", model=tiny_model, seed=seed).stdout for seed in ("1", "1", "2")}
    assert len(lines) == 2
    chat = ["chat", "--model", tiny_model, "--threads", "1", "--message", "Hi", "--temperature", "2"]
    assert len({CliRunner().invoke(cli.main, chat).stdout for _ in range(2)}) == 2


def test_system_prompt_reaches_the_model(tiny_model: str) -> None:
    (without,) = answer_records(run_chat("--message", "Hi", "--json", model=tiny_model))
    (with_system,) = answer_records(run_chat("--message", "Hi", "--system", "x" * 40, "--json", model=tiny_model))
    assert with_system["n_prompt_tokens"] - without["n_prompt_tokens"] >= 40


def test_compare_shows_each_answer_and_the_switches(tiny_model: str) -> None:
    result = run_chat("--compare", "base, infp,ENTJ", "--message", "What now?", model=tiny_model)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "What now?"
    headings = [line.strip("─ ") for line in lines if line.startswith("── ")]
    assert headings == ["base", "INFP", "ENTJ", "switches, in place"]
    switches = [line.split("  ")[1] for line in lines[-3:]]
    assert switches == ["base → INFP", "INFP → ENTJ", "ENTJ → base"]
    assert all(re.search(r" \d[\d.]* (µs|ms|s) +[\d,]+ units +\d[\d.]* (B|kB)", line) for line in lines[-3:])
    assert max(map(len, lines)) <= 80


def test_compare_in_json_is_a_record_per_answer(tiny_model: str) -> None:
    found = answer_records(
        run_chat("--compare", "INFP,base", "--message", "One", "--message", "Two", "--json", model=tiny_model)
    )
    assert [(r["question"], r["persona"]) for r in found] == [
        ("One", "INFP"),
        ("One", None),
        ("Two", "INFP"),
        ("Two", None),
    ]
    assert len({r["n_prompt_tokens"] for r in found}) == 1


# Pipes


def test_a_pipe_prints_answers_and_carries_out_commands(tiny_model: str) -> None:
    text = "One\n\n/persona INFP\nOne\n/nonsense\n/persona\nTwo\n/quit\nThree\n"
    result = run_chat(model=tiny_model, text=text)
    assert result.exit_code == 2
    assert "base> " not in result.output
    problems = [line for line in result.stderr.splitlines() if "nonsense" in line]
    assert problems == ["no command /nonsense; /help lists them, and // sends a line that begins with a slash"]
    assert "base → INFP at strength 1: " in result.stderr
    assert "*INFP" in result.stdout
    expected = answer_records(run_chat("--json", model=tiny_model, text="One\n/persona INFP\nOne\nTwo\n"))
    for record in expected:
        assert CONTROLS.sub("", record["text"]) + "\n" in result.stdout
    assert [record["persona"] for record in expected] == [None, "INFP", "INFP"]


def test_no_control_character_of_the_model_reaches_the_output(tiny_model: str) -> None:
    arguments = ["--message", "Hi", "--max-tokens", "400", "--temperature", "5"]
    (record,) = answer_records(run_chat(*arguments, "--json", model=tiny_model))
    assert CONTROLS.search(record["text"])
    for more in ([], ["--compare", "base,INFP"]):
        shown = run_chat(*arguments, *more, model=tiny_model)
        assert shown.exit_code == 0
        assert not CONTROLS.search(shown.output)
    raw = run_chat(*arguments, "--json", model=tiny_model)
    assert not CONTROLS.search(raw.stdout)


def test_bytes_that_are_no_utf8_are_no_reason_to_fail(tiny_model: str) -> None:
    common = [*RUN_CLI, "chat", "--model", tiny_model, "--threads", "1", "--max-tokens", "5", "--json"]
    done = subprocess.run(common, input=b"caf\xe9\n", capture_output=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["question"] == "caf\ufffd"
    done = subprocess.run([*common, "--message", b"caf\xe9"], capture_output=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_answers_come_while_the_pipe_stays_open(tiny_model: str) -> None:
    with started("chat", "--model", tiny_model, "--threads", "1", "--max-tokens", "5", "--json") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for question in ("One", "Two"):
            process.stdin.write(question + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["question"] == question
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def test_ctrl_c_in_a_pipe_ends_it_with_the_answer_so_far(tiny_model: str) -> None:
    with started("chat", "--model", tiny_model, "--threads", "1", "--json") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("One\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == "persona-edge: error: interrupted\n"


def test_chat_does_not_import_the_offline_half(tiny_model: str) -> None:
    code = (
        "import sys\nfrom persona_edge.cli import main\n"
        f"try: main(['chat', '--model', {tiny_model!r}, '--threads', '1', '--persona', 'INFP', '--message', 'Hi'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'gguf', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
