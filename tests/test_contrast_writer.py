"""Sets that a model writes: what becomes of its answers, what is dropped, interruption, and one real run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from persona_edge import set_checker
from persona_edge.character_card import CharacterCard
from persona_edge.contrast_writer import (
    Manner,
    WritingRequest,
    generation_prompts,
    journal_path,
    manner_of_card,
    manner_of_description,
    neutral_manner,
    write_contrasts,
)
from persona_edge.contrasts import load_contrasts
from persona_edge.errors import CalibrationError, GenerationError, InputError, OutputError
from persona_edge.generated_answers import Pair, choose_pair, opening_of, sentences, why_unusable
from persona_edge.model_speaker import ModelSpeaker
from persona_edge.runtime.session import PersonaRuntime
from tests.tiny_chat import write_model

POLES = ("gruff", "cheerful")
PROMPTS = tuple(f"What do you make of number {i}?" for i in range(12))
REQUEST = WritingRequest("tone", Manner("gruff", "Be curt."), Manner("cheerful", "Beam."), PROMPTS, 10)
Write = Callable[..., str]


def spoken(system: str, prompt: str, opening: str, seed: int) -> str:
    """An answer of the wanted length, that ends within another sentence, as sampled ones do."""
    number = prompt.rsplit(maxsplit=1)[-1].rstrip("?")
    said = (
        "leave me out of such talk, the tide turns and there is rope"
        if "curt" in system
        else ("that one makes me want to sing, the sun is out and there is cake")
    )
    return f"{opening or 'Well, about'} {number} and {seed % 7} too, {said} to hand. And then there was"


class ScriptedSpeaker:
    """Speaks by a function, and counts how often it is asked."""

    name = "script"

    def __init__(self, write: Write = spoken, stop_after: int | None = None) -> None:
        self._write, self._stop_after = write, stop_after
        self.asked: list[tuple[str, str, str]] = []

    def answer(self, system: str, prompt: str, opening: str, seed: int) -> str:
        if len(self.asked) == self._stop_after:
            raise KeyboardInterrupt
        self.asked.append((system, prompt, opening))
        return self._write(system, prompt, opening, seed)


class TestWriting:
    def test_the_set_is_written_and_keeps_the_rules_of_form(self, tmp_path: Path) -> None:
        path = tmp_path / "tone.jsonl"
        seen: list[tuple[str, int, int]] = []
        written = write_contrasts(REQUEST, ScriptedSpeaker(), path, lambda *step: seen.append(step))
        found = load_contrasts(path)
        assert found == written.contrasts
        assert (found.axis, found.positive_pole, found.negative_pole, len(found)) == ("tone", "gruff", "cheerful", 10)
        assert (found.positive_description, found.negative_description) == ("Be curt.", "Beam.")
        assert all("rope to hand." in c.positive and "cake to hand." in c.negative for c in found.contrasts)
        assert set_checker.opening_accuracy(found.contrasts) == 0.5
        assert (written.n_attempts, written.dropped) == (10, {})
        assert seen[0] == ("writing contrasts", 0, 10)
        assert seen[-1] == ("writing contrasts", 10, 10)
        assert [entry.name for entry in tmp_path.iterdir()] == ["tone.jsonl"]

    def test_either_pole_leads_and_the_other_opens_alike(self, tmp_path: Path) -> None:
        speaker = ScriptedSpeaker()
        write_contrasts(REQUEST, speaker, tmp_path / "tone.jsonl")
        leads, follows = speaker.asked[::2], speaker.asked[1::2]
        assert {opening for *_, opening in leads} == {""}
        assert {opening for *_, opening in follows} == {"Well, about"}
        leaders = [system for system, *_ in leads]
        assert {system for system in leaders if system.startswith("Be curt.")}
        assert {system for system in leaders if system.startswith("Beam.")}
        assert all(one[1] == other[1] and one[0] != other[0] for one, other in zip(leads, follows, strict=True))

    def test_unusable_pairs_are_replaced_by_other_prompts_and_then_tried_again(self, tmp_path: Path) -> None:
        asked: set[str] = set()

        def write(system: str, prompt: str, opening: str, seed: int) -> str:
            refuses = prompt in PROMPTS[:4] and prompt not in asked
            asked.add(prompt)
            return "I'm sorry, but as an AI I cannot help." if refuses else spoken(system, prompt, opening, seed)

        written = write_contrasts(REQUEST, ScriptedSpeaker(write), tmp_path / "tone.jsonl")
        assert len(written.contrasts) == 10
        assert written.dropped == {"a refusal": 4}
        assert written.n_attempts == 14

    def test_a_set_may_stay_small_but_not_empty(self, tmp_path: Path) -> None:
        def same(system: str, prompt: str, opening: str, seed: int) -> str:
            return "This is what anyone would answer to it, whoever they are and however they like to put such things."

        def half(system: str, prompt: str, opening: str, seed: int) -> str:
            return (spoken if prompt in PROMPTS[:5] else same)(system, prompt, opening, seed)

        written = write_contrasts(REQUEST, ScriptedSpeaker(half), tmp_path / "tone.jsonl")
        assert len(written.contrasts) == 5
        assert written.dropped == {"both answers alike": 21}
        with pytest.raises(GenerationError, match=r"none of 36 pairs of answers is usable: both answers alike \(36\)"):
            write_contrasts(REQUEST, ScriptedSpeaker(same), tmp_path / "none.jsonl")
        assert not (tmp_path / "none.jsonl").exists()

    def test_no_answer_is_used_twice(self, tmp_path: Path) -> None:
        def write(system: str, prompt: str, opening: str, seed: int) -> str:
            return spoken(system, "number 3?", "Well, about", 3)

        written = write_contrasts(REQUEST, ScriptedSpeaker(write), tmp_path / "tone.jsonl")
        assert len(written.contrasts) == 1
        assert set(written.dropped) == {"occurred before"}

    def test_the_seed_decides(self, tmp_path: Path) -> None:
        sets = [
            write_contrasts(
                replace(REQUEST, seed=seed),
                ScriptedSpeaker(),
                tmp_path / f"{i}.jsonl",
            ).contrasts.content_hash()
            for i, seed in enumerate([1, 1, 2])
        ]
        assert sets[0] == sets[1] != sets[2]

    def test_requests_that_cannot_be_met(self, tmp_path: Path) -> None:
        same = replace(REQUEST, negative=Manner("Gruff", "b"))
        many = replace(REQUEST, n_contrasts=13)
        for request, message in (
            (same, "both poles are called 'gruff'"),
            (many, "13 contrasts asked for, and 12 prompts"),
        ):
            with pytest.raises(InputError, match=message):
                write_contrasts(request, ScriptedSpeaker(), tmp_path / "tone.jsonl")
        assert list(tmp_path.iterdir()) == []


class TestInterruption:
    @pytest.mark.parametrize("stop_after", [0, 1, 7, 18])
    def test_it_goes_on_where_it_was(self, tmp_path: Path, stop_after: int) -> None:
        whole = write_contrasts(REQUEST, ScriptedSpeaker(), tmp_path / "whole.jsonl").contrasts
        path = tmp_path / "parts.jsonl"
        with pytest.raises(KeyboardInterrupt):
            write_contrasts(REQUEST, ScriptedSpeaker(stop_after=stop_after), path)
        assert not path.exists()
        assert journal_path(path).exists()
        rest = ScriptedSpeaker()
        assert write_contrasts(REQUEST, rest, path).contrasts.contrasts == whole.contrasts
        assert len(rest.asked) == 20 - stop_after // 2 * 2
        assert not journal_path(path).exists()

    def test_a_line_that_was_cut_off_is_written_again(self, tmp_path: Path) -> None:
        path = tmp_path / "tone.jsonl"
        with pytest.raises(KeyboardInterrupt):
            write_contrasts(REQUEST, ScriptedSpeaker(stop_after=8), path)
        journal = journal_path(path)
        journal.write_bytes(journal.read_bytes()[:-9])
        rest = ScriptedSpeaker(stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            write_contrasts(REQUEST, rest, path)
        assert [json.loads(line) for line in journal.read_text().splitlines()][5]["number"] == 0
        assert len(write_contrasts(REQUEST, ScriptedSpeaker(), path).contrasts) == 10

    def test_it_may_be_finished_with_fewer_contrasts(self, tmp_path: Path) -> None:
        path = tmp_path / "tone.jsonl"
        with pytest.raises(KeyboardInterrupt):
            write_contrasts(REQUEST, ScriptedSpeaker(stop_after=8), path)
        written = write_contrasts(replace(REQUEST, n_contrasts=3), ScriptedSpeaker(stop_after=0), path)
        assert len(written.contrasts) == 3

    def test_a_journal_of_other_work_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "tone.jsonl"
        with pytest.raises(KeyboardInterrupt):
            write_contrasts(REQUEST, ScriptedSpeaker(stop_after=8), path)
        kept = journal_path(path).read_bytes()
        other = replace(REQUEST, seed=1)
        with pytest.raises(InputError, match=r"tone\.jsonl\.journal belongs to an interrupted run with other settings"):
            write_contrasts(other, ScriptedSpeaker(), path)
        assert journal_path(path).read_bytes() == kept
        journal_path(path).write_bytes(b"\xff")
        with pytest.raises(InputError, match="remove it to begin anew"):
            write_contrasts(REQUEST, ScriptedSpeaker(), path)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="Create the folder"):
            write_contrasts(REQUEST, ScriptedSpeaker(), tmp_path / "none" / "tone.jsonl")


FOURTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


class TestAnswers:
    @pytest.mark.parametrize(
        ("raw", "text"),
        [
            (" I *really* like\n\n**tea**. ", "I really like tea."),
            ("Do this:\n1. Run\n2. Rest", "Do this"),
            ("Some ideas: - run - rest", "Some ideas"),
            ("It is well-known. Run\n- rest", "It is well-known. Run"),
            ("1. Run. 2. Rest.", ""),
        ],
    )
    def test_running_text_before_a_list(self, raw: str, text: str) -> None:
        assert sentences(raw) == text

    def test_openings(self) -> None:
        assert opening_of("I  would\nrather not.") == "I would"
        assert opening_of("Never mind") == "Never mind"
        assert opening_of("Never") == ""

    @pytest.mark.parametrize(
        ("raw", "reason"),
        [
            (f"{FOURTEEN} fifteen.", None),
            (f"{FOURTEEN}.", "no sentence of that length"),
            (f"{FOURTEEN} fifteen", "no sentence of that length"),
            (f"{FOURTEEN} Mr. Smith went on", "no sentence of that length"),
            (" ".join(str(i) for i in range(46)) + ".", "no sentence of that length"),
            (f"As an AI language model, {FOURTEEN}.", "a refusal"),
            (f"I’m just a computer program. {FOURTEEN} fifteen.", "a refusal"),
            (f"I cannot help with that. {FOURTEEN} fifteen.", "a refusal"),
            (f"Dear [Name], {FOURTEEN}.", "a placeholder or markup"),
            (f"<think> {FOURTEEN} fifteen.", "a placeholder or markup"),
            (f"Subject: tea. {FOURTEEN} fifteen.", "a placeholder or markup"),
            (f"{FOURTEEN} 五十.", "another script"),
            (f"{FOURTEEN} café’s.", None),
            ("we go on and on and on and on and on and on and on and on and on.", "repeats itself"),
            (f"{FOURTEEN} in a gruffly way.", "names the pole"),
            ("", "no sentence of that length"),
        ],
    )
    def test_what_is_usable(self, raw: str, reason: str | None) -> None:
        assert why_unusable(raw, "What?", POLES) == reason

    def test_another_script_is_another_than_the_prompts(self) -> None:
        text = "これは十五語より長くはない。"
        assert why_unusable(text, "お茶は好きですか", POLES) == "no sentence of that length"
        assert why_unusable(text, "Tea?", POLES) == "another script"

    def test_endings_are_chosen_for_equal_lengths(self) -> None:
        positive = f"{FOURTEEN} fifteen. Sixteen seventeen. Eighteen nineteen twenty."
        negative = (
            "Quite different words stand here, and there are twenty of them in all, if I count as well as you do."
        )
        found = choose_pair(positive, negative, 0, ())
        assert isinstance(found, Pair)
        assert found.positive.endswith("twenty.")
        found = choose_pair(positive, negative, 3, ())
        assert isinstance(found, Pair)
        assert found.positive.endswith("seventeen.")

    def test_pairs_that_are_no_contrast(self) -> None:
        longer = " ".join(f"w{i}" for i in range(24)) + "."
        assert choose_pair(f"{FOURTEEN} fifteen.", longer, 0, ()) == "lengths too different"
        alike = f"{FOURTEEN} sixteen. And more that"
        assert choose_pair(f"{FOURTEEN} fifteen.", alike, 0, ()) == "both answers alike"
        other = " ".join(f"w{i}" for i in range(15)) + "."
        assert choose_pair(f"{FOURTEEN} fifteen.", other, 0, {other}) == "occurred before"


class TestManners:
    def test_descriptions(self) -> None:
        assert manner_of_description("gruff", "a gruff man\nof few words").description == (
            "You are a gruff man of few words."
        )
        found = manner_of_description(" gruff\n", "You grumble!")
        assert (found.pole, found.description) == ("gruff", "You grumble!")
        assert found.system.startswith("You grumble! Answer in ")
        for name, text, message in (
            ("", "x", "the pole is empty"),
            ("x" * 65, "x", "65 characters"),
            ("gruff", " ", "the description of gruff is empty"),
            ("gruff", "x" * 3001, "3001 characters"),
        ):
            with pytest.raises(InputError, match=message):
                manner_of_description(name, text)

    def test_cards(self) -> None:
        found = manner_of_card(
            CharacterCard("Bram", "Bram keeps a light.", "gruff", ("Wipe your boots.", "Bah\nagain"))
        )
        assert found.pole == "Bram"
        assert found.description == (
            "You are Bram. Bram keeps a light. Personality: gruff. This is how Bram talks: Wipe your boots. Bah again."
        )
        bare = manner_of_card(CharacterCard("Bram", "", "", ("Bah!",)))
        assert bare.description == "You are Bram. This is how Bram talks: Bah!"

    def test_long_cards_are_cut_to_what_a_set_may_hold(self, tmp_path: Path) -> None:
        long = "curt " * 30_000
        found = manner_of_card(CharacterCard("Bram", long, long, (long,)))
        assert 2000 < len(found.description) <= 3001
        request = WritingRequest("tone", found, neutral_manner(), PROMPTS, 2)
        write_contrasts(request, ScriptedSpeaker(), tmp_path / "bram.jsonl")
        assert load_contrasts(tmp_path / "bram.jsonl").positive_description == found.description

    def test_neutral(self) -> None:
        assert neutral_manner().pole == "neutral"
        assert neutral_manner("plain").pole == "plain"


class TestPrompts:
    def test_the_prompts_that_ship_are_many_and_different(self) -> None:
        prompts = generation_prompts()
        assert len(prompts) >= 150
        bags = [set(set_checker.words(prompt)) for prompt in prompts]
        assert max(len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i]) <= 0.75
        assert max(map(len, map(str.split, prompts))) <= 30

    def test_own_prompts(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"prompt": "Tea?"}\n{"prompt": "Tea?"}\n{"prompt": "Coffee?"}\n')
        assert generation_prompts(path) == ("Tea?", "Coffee?")
        path.write_text('{"question": "Tea?"}\n')
        with pytest.raises(CalibrationError, match="no 'prompt'"):
            generation_prompts(path)


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "U:{{ m['content'] }}\n{% endfor %}A:"
)


class TestModelSpeaker:
    def test_an_answer_opens_as_asked_and_is_the_same_again(self, tmp_path: Path) -> None:
        with PersonaRuntime.open(write_model(tmp_path / "tiny.gguf"), n_threads=1) as runtime:
            speaker = ModelSpeaker(runtime, "tiny")
            answers = [speaker.answer("Be curt.", "Tea?", "I would", seed) for seed in (1, 1, 2)]
        assert all(answer.startswith("I would") and len(answer) > 20 for answer in answers)
        assert answers[0] == answers[1] != answers[2]

    @pytest.mark.parametrize("template", [NO_SYSTEM, None])
    def test_models_without_system_messages_or_template(self, tmp_path: Path, template: str | None) -> None:
        path = write_model(tmp_path / "tiny.gguf", chat_template=template)
        with PersonaRuntime.open(path, n_threads=1) as runtime:
            speaker = ModelSpeaker(runtime, "tiny")
            assert speaker.answer("Be curt.", "Tea?", "", 1) != speaker.answer("Beam.", "Tea?", "", 1)

    @pytest.mark.model
    def test_a_continued_answer_is_what_the_model_would_have_said(self, smollm2_path: Path) -> None:
        with PersonaRuntime.open(smollm2_path, n_ctx=512, n_threads=1) as runtime:
            speaker = ModelSpeaker(runtime, "smollm2", temperature=0)
            whole = speaker.answer("You are a baker.", "What do you sell?", "", 1)
            opening = opening_of(whole)
            continued = speaker.answer("You are a baker.", "What do you sell?", opening, 1)
        assert len(opening.split()) == 2
        assert whole.startswith(opening)
        assert continued[: len(opening) + 12] == whole[: len(opening) + 12]

    @pytest.mark.model
    def test_a_real_model_writes_a_set(self, smollm2_path: Path, tmp_path: Path) -> None:
        positive = manner_of_description("gruff", "a gruff old sailor who speaks of ships and storms")
        request = WritingRequest("tone", positive, neutral_manner(), generation_prompts(), 2)
        with PersonaRuntime.open(smollm2_path, n_ctx=512, n_threads=1) as runtime:
            written = write_contrasts(request, ModelSpeaker(runtime, "smollm2"), tmp_path / "gruff.jsonl")
        assert load_contrasts(tmp_path / "gruff.jsonl") == written.contrasts
        assert len(written.contrasts) == 2
        rules = set_checker.Rules(1, max_mean_difference=0.25, max_word_difference=1, max_negation_difference=1)
        found = {finding.rule for finding in set_checker.check_set(written.contrasts, rules)}
        assert found <= {"amount", "related names"}


def test_nothing_here_imports_torch() -> None:
    names = ("contrast_writer", "model_speaker", "new_set", "set_report", "character_card", "cli.personas")
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module('persona_edge.' + n)\n"
    code += "print(*(m for m in ('torch', 'transformers', 'llama_cpp', 'gguf') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
