"""`persona-edge personas`: what list, show, check and new print, what new writes, and failures in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from persona_edge import cli, new_set
from persona_edge.contrasts import load_contrasts
from persona_edge.persona_sets import shipped_sets
from tests.tiny_chat import write_model

CONTRASTS = [
    {"prompt": f"Prompt {name}?", "positive": f"Warm {name}.", "negative": f"Blunt {name}."} for name in ("1", "2", "4")
]
CARD = {"spec": "chara_card_v2", "data": {"name": "Bram", "description": "{{char}} is an old sailor who grumbles."}}


def personas(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["personas", *map(str, arguments)], env={"COLUMNS": "72"})


def shown(*arguments: str | Path) -> str:
    result = personas(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def problem(*arguments: str | Path) -> str:
    """The one line that a command fails with."""
    result = personas(*arguments)
    assert result.exit_code in (1, 2)
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
    return result.stderr.removeprefix("persona-edge: error: ")


def jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    header = {"axis": "tone", "positive": "warm", "negative": "blunt", "positive_description": "You are kind."}
    return jsonl(tmp_path / "tone.jsonl", header, *CONTRASTS)


def test_list_names_every_set_with_its_poles_and_size() -> None:
    lines = shown("list").splitlines()
    assert [line.split()[0] for line in lines] == ["set", *(shipped.name for shipped in shipped_sets())]
    (ei,) = (line for line in lines if line.startswith("mbti-ei "))
    assert re.search(r"\bEI +E/I +\d+ +where energy comes from", ei)
    (everyday,) = (line for line in lines if line.startswith("everyday "))
    assert re.search(r" concise, formal, warm, optimistic and 8 more +concise/expansive, formal/casual, ", everyday)


class TestShow:
    def test_contrasts_of_both_sides_with_counts(self, tone: Path) -> None:
        calibration, held_out = load_contrasts(tone).split()
        text = shown("show", tone, "--contrasts", "2")
        lines = text.splitlines()
        assert lines[0] == "personas: warm, blunt"
        counts = f"3 contrasts, {len(calibration)} to calibrate on and {len(held_out)} held out"
        assert f"tone: warm against blunt; {counts}" in lines
        assert "warm: You are kind." in lines
        assert text.count("  warm   Warm ") == text.count("  blunt  Blunt ") == 2

    def test_a_shipped_set_fits_the_terminal(self) -> None:
        text = shown("show", "mbti-jp", "--contrasts", "2", "--seed", "3")
        assert max(map(len, text.splitlines())) <= 72
        assert text != shown("show", "mbti-jp", "--contrasts", "2", "--seed", "4")

    def test_control_characters_and_long_names(self, tmp_path: Path) -> None:
        header = {"axis": "x\x1b[2J", "positive": "p" * 60, "negative": "n"}
        contrast = {"prompt": "\x1b]0;title\x07?", "positive": "a\u202eb", "negative": "c"}
        text = shown("show", jsonl(tmp_path / "odd.jsonl", header, contrast))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert "p" * 60 in text
        assert "    ab" in text.splitlines()


class TestCheck:
    def test_a_good_set(self) -> None:
        assert shown("check", "mbti-jp").splitlines()[-1] == "keeps all rules"

    def test_findings_are_lines_and_an_exit_code(self, tone: Path) -> None:
        result = personas("check", tone)
        assert result.exit_code == 1
        lines = result.stdout.splitlines()
        assert lines[0] == "tone: warm against blunt"
        assert "error: amount: 3 contrasts; write at least 40" in lines
        assert any(line.startswith("error: names: a pole is called by its name: blunt, warm") for line in lines)
        assert lines[-1].endswith("errors, 0 warnings")

    def test_options_move_the_limits(self, tone: Path) -> None:
        lines = personas("check", tone, "--contrasts", "2", "--any-length").stdout.splitlines()
        rules = {line.split(": ")[1] for line in lines if line.startswith("error: ")}
        assert rules == {"names", "openings", "telling words"}

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        assert "cannot be read" in problem("check", tmp_path / "none.jsonl")
        assert "no persona set 'none'" in problem("check", "none")
        assert "line 2: no 'negative'" in problem(
            "check", jsonl(tmp_path / "bad.jsonl", CONTRASTS[0], {"prompt": "a", "positive": "b"})
        )


class TestNewFromAnswers:
    def test_csv_becomes_jsonl_with_named_poles(self, tmp_path: Path) -> None:
        source, output = tmp_path / "power.csv", tmp_path / "lead.jsonl"
        source.write_text('question,matching,not_matching\n"Lead, now?", Yes I will. ,No I will not.\n')
        text = shown("new", output, "--from", source, "--axis", "power", "--positive", "leads", "--negative", "follows")
        assert "1 contrast written to" in text
        assert f"persona-edge export --model MODEL --personas {output}" in text
        assert "error: amount: 1 contrast; write at least 40" in text
        found = load_contrasts(output)
        assert (found.axis, found.positive_pole, found.negative_pole) == ("power", "leads", "follows")
        assert found.contrasts[0].positive == "Yes I will."

    def test_names_and_descriptions_that_are_not_given_stay(self, tone: Path, tmp_path: Path) -> None:
        output = tmp_path / "other.jsonl"
        shown("new", output, "--from", tone, "--negative", "curt")
        found, before = load_contrasts(output), load_contrasts(tone)
        assert (found.axis, found.positive_pole, found.negative_pole) == ("tone", "warm", "curt")
        assert (found.contrasts, found.positive_description) == (before.contrasts, "You are kind.")

    def test_what_exists_is_not_replaced_unasked(self, tone: Path, tmp_path: Path) -> None:
        output = jsonl(tmp_path / "mine.jsonl", *CONTRASTS[:1])
        before = output.read_bytes()
        assert "mine.jsonl exists; choose another name" in problem("new", output, "--from", tone)
        assert output.read_bytes() == before
        shown("new", output, "--from", tone, "--overwrite")
        assert len(load_contrasts(output)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "say what to make the set from, in one way"),
        ("--from TONE --card CARD", "say what to make the set from, in one way"),
        ("--card CARD --positive-description gruff", "say what to make the set from, in one way"),
        ("--from TONE --positive blunt", "both poles are called 'blunt'"),
        ("--from none.jsonl", "none.jsonl: cannot be read"),
        ("--card none.json --model m", "none.json: cannot be read"),
        ("--card TONE --model m", "malformed JSON"),
        ("--card CARD", "pass --model"),
        ("--card CARD --model no-such-model", "no-such-model"),
        ("--card CARD --model m --negative bram", "both poles are called 'Bram'"),
        ("--card CARD --model m --contrasts 1000", "1000 contrasts asked for, and 156 prompts"),
        ("--card CARD --model m --prompts TONE", "no 'prompt'"),
        ("--positive gruff --model m", "say what to make the set from"),
        ("--positive-description gruff --model m", "needs a name and a description"),
        ("--negative-description gruff --model m", "needs a name and a description"),
        ("--positive a --positive-description b --negative-description c --model m", "pass --negative"),
        ("--positive a --positive-description b --model m --axis ''", "the axis"),
    ],
)
def test_options_that_cannot_be_used(tone: Path, tmp_path: Path, options: str, message: str) -> None:
    card = jsonl(tmp_path / "card.json", CARD)
    words = ["" if word == "''" else word for word in options.split()]
    arguments = [{"TONE": str(tone), "CARD": str(card)}.get(word, word) for word in words]
    output = tmp_path / "new.jsonl"
    assert message in problem("new", output, *arguments)
    assert not output.exists()


@pytest.mark.parametrize(("name", "message"), [("new.txt", "does not end in .jsonl"), ("a/b.jsonl", "no folder")])
def test_outputs_that_cannot_be_written(tone: Path, tmp_path: Path, name: str, message: str) -> None:
    assert message in problem("new", tmp_path / name, "--from", tone)


def test_a_model_that_talks_nonsense_writes_no_set(tmp_path: Path) -> None:
    model, card = write_model(tmp_path / "tiny.gguf"), jsonl(tmp_path / "card.json", CARD)
    prompts = jsonl(tmp_path / "prompts.jsonl", {"prompt": "Tea?"})
    result = personas(
        *("new", tmp_path / "bram.jsonl", "--card", card, "--model", model, "--threads", "1", "--prompts", prompts)
    )
    assert result.exit_code == 1
    assert "none of 3 pairs of answers is usable" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "bram.jsonl").exists()


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "bram.jsonl"

    def interrupted(*_: object) -> None:
        (tmp_path / "bram.jsonl.journal").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(new_set, "new_set", interrupted)
    result = personas("new", output, "--card", "card.json", "--model", "m")
    assert result.exit_code == 130
    assert "the answers so far are kept; the same command goes on from there" in result.stderr


@pytest.mark.model
def test_a_card_becomes_a_set(smollm2_path: Path, tmp_path: Path) -> None:
    card, output = jsonl(tmp_path / "card.json", CARD), tmp_path / "bram.jsonl"
    text = shown("new", output, "--card", card, "--model", smollm2_path, "--contrasts", "1", "--threads", "1")
    assert "pairs of answers tried; dropped: " in text or "pair of answers tried" in text
    assert "1 contrast written to" in text
    assert "bram: Bram against neutral" in text
    found = load_contrasts(output)
    assert found.positive_description == "You are Bram. Bram is an old sailor who grumbles."
    assert found.negative_description == "You are a helpful assistant."
