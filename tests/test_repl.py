"""The chat's logic on a real, tiny model: the conversation, every command, comparisons, interrupts, a full context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_edge.chat_values import Answer, ChatSettings
from persona_edge.errors import GenerationError, InputError, PersonaNotFoundError
from persona_edge.repl import Repl
from persona_edge.repl_commands import HELP
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import Message, SamplingOptions
from tests.tiny_chat import N_CONTEXT, PERSONAS, RecordedOutput, write_model, write_model_and_pack

OPTIONS = SamplingOptions(max_tokens=12, temperature=1.0)
SETTINGS = ChatSettings(OPTIONS, seed=5)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_pack(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared(model_path: Path) -> Iterator[PersonaRuntime]:
    with PersonaRuntime.open(model_path, model_path.with_name("tiny.mbti.maskpack"), n_threads=1) as runtime:
        yield runtime


@pytest.fixture
def runtime(shared: PersonaRuntime) -> PersonaRuntime:
    shared.base()
    return shared


class Chat:
    """A chat, what it printed, and what the model was asked."""

    def __init__(
        self, runtime: PersonaRuntime, monkeypatch: pytest.MonkeyPatch, settings: ChatSettings = SETTINGS
    ) -> None:
        self.output = RecordedOutput()
        self.asked: list[list[Message]] = []
        self.runtime = runtime
        stream = runtime.stream_chat

        def listen(messages: list[Message], options: SamplingOptions) -> Iterator[str]:
            pieces = stream(messages, options)
            self.asked.append(list(messages))
            return pieces

        monkeypatch.setattr(runtime, "stream_chat", listen)
        self.repl = Repl(runtime, self.output, settings)

    def say(self, *lines: str) -> Answer:
        for line in lines:
            assert self.repl.feed(line)
        return self.output.answers[-1]

    def roles(self) -> str:
        """Of the last prompt: s(ystem), u(ser), a(ssistant)."""
        return "".join(message["role"][0] for message in self.asked[-1])


@pytest.fixture
def chat(runtime: PersonaRuntime, monkeypatch: pytest.MonkeyPatch) -> Chat:
    return Chat(runtime, monkeypatch)


# Conversation


def test_an_answer_is_what_the_model_says_without_the_space_around_it(chat: Chat) -> None:
    answer = chat.say("How are you?")
    completion = chat.runtime.chat(chat.asked[0], replace(OPTIONS, seed=5))
    assert answer.text == completion.text.strip()
    assert chat.output.texts("pieces") == [answer.text]
    assert answer.completion is not None
    assert (answer.completion.n_tokens, answer.seed, answer.persona, answer.switch) == (12, 5, None, None)


def test_a_question_goes_on_from_the_turns_before_it(chat: Chat) -> None:
    first = chat.say("One")
    second = chat.say("", "   ", "Two")
    assert [m["content"] for m in chat.asked[-1]] == ["One", first.text, "Two"]
    assert (first.seed, second.seed) == (5, 6)


def test_the_conversation_survives_every_switch_and_reset_forgets_it(chat: Chat) -> None:
    chat.say("One", "/persona INFP", "Two", "/strength 0.5", "/base", "Three")
    assert chat.roles() == "uauau"
    chat.say("/reset", "Four")
    assert chat.roles() == "u"


def test_a_system_prompt_stands_first_until_it_is_removed(chat: Chat) -> None:
    chat.say("/system Be brief.", "One")
    assert (chat.roles(), chat.asked[-1][0]["content"]) == ("su", "Be brief.")
    chat.say("/system", "/system -", "/system", "Two")
    assert chat.roles() == "uau"
    assert chat.output.texts("show") == ["Be brief.", "no system prompt"]


def test_two_slashes_send_one(chat: Chat) -> None:
    assert chat.say("//etc is a folder").question == "/etc is a folder"


def test_the_oldest_turns_go_when_the_context_is_full(chat: Chat) -> None:
    words = "a" * (N_CONTEXT // 3)
    for _ in range(4):
        chat.say(words)
    assert chat.roles() == "uau"
    notes = chat.output.texts("note")
    assert notes == ["the context is full: forgot the oldest 1 of 2 turns"] * 2
    assert not chat.output.texts("problem")


def test_a_question_longer_than_the_context_is_a_problem_and_loses_nothing(chat: Chat) -> None:
    chat.say("One")
    chat.say("b" * N_CONTEXT)
    assert "but the context holds" in chat.output.texts("problem")[0]
    chat.say("Two")
    assert chat.roles() == "uau"


def test_a_template_that_refuses_the_messages_is_a_problem_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x:"
    with PersonaRuntime.open(write_model(tmp_path / "m.gguf", chat_template=refusing), n_threads=1) as runtime:
        chat = Chat(runtime, monkeypatch)
        chat.say("One", "/system S", "Two", "/system -", "Three")
        assert "no system role" in chat.output.texts("problem")[0]
        assert chat.roles() == "uau"


# Switching


def test_persona_switches_and_base_goes_back(chat: Chat) -> None:
    base = chat.runtime.weights_digest()
    answer = chat.say("/persona infp", "Hi")
    assert (answer.persona, answer.strength, chat.repl.speaker) == ("INFP", 1.0, "INFP")
    assert answer.switch is not None
    assert answer.switch.before is None
    assert answer.switch.report.n_units_written > 0
    assert answer.switch.report.seconds_to_first_token is not None
    assert chat.runtime.weights_digest() != base
    assert chat.say("And?").switch is None  # it did not wait for a switch
    assert chat.say("/base", "Hi").persona is None
    assert chat.repl.speaker == "base"
    assert chat.runtime.weights_digest() == base
    assert [note.split(":")[0] for note in chat.output.texts("note")] == ["base → INFP at strength 1", "INFP → base"]


def test_persona_alone_lists_them_and_marks_the_active_one(chat: Chat) -> None:
    chat.repl.feed("/persona night owl")
    chat.repl.feed("/persona")
    shown = chat.output.texts("show")[0]
    assert shown.replace("*", " ").split() == " ".join(PERSONAS).split()
    assert "*night owl" in shown
    assert shown.count("*") == 1


def test_persona_base_is_base(chat: Chat) -> None:
    chat.repl.feed("/persona ENTJ")
    chat.repl.feed("/persona Base")
    assert chat.runtime.persona is None


def test_strength_acts_now_and_on_the_next_persona(chat: Chat) -> None:
    chat.repl.feed("/strength 0.25")
    assert chat.runtime.persona is None
    assert chat.say("/persona INFP", "Hi").strength == 0.25
    assert chat.say("/strength 0.5", "Hi").strength == 0.5
    assert chat.say("/persona ENTJ", "Hi").strength == 0.5
    chat.repl.feed("/strength")
    assert chat.output.texts("show") == ["strength 0.5"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/nonsense", "no command /nonsense; /help lists them, and // sends a line that begins with a slash"),
        ("/", "no command /; /help lists them, and // sends a line that begins with a slash"),
        ("/Persona INFP", "no command /Persona; /help lists them"),
        ("/persona INTP", "no persona 'INTP'; there are base, INFP, ENTJ, I, E, N, night owl"),
        ("/strength 2", "strength is '2'; it must be a number between 0 (base) and 1"),
        ("/strength much", "strength is 'much'; it must be a number"),
        ("/strength nan", "strength is 'nan'; it must be a number"),
        ("/compare INFP, XYZ", "no persona 'XYZ'; there are"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(chat: Chat, line: str, problem: str) -> None:
    chat.say("One", "/persona ENTJ", "/strength 0.5")
    digest = chat.runtime.weights_digest()
    assert chat.repl.feed(line)
    assert chat.output.texts("problem")[0].startswith(problem)
    assert chat.repl.n_problems == 1
    assert chat.runtime.weights_digest() == digest
    assert (chat.say("Two").strength, chat.roles()) == (0.5, "uau")


def test_without_a_pack_a_persona_says_how_to_get_one(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PersonaRuntime.open(model_path, n_threads=1) as runtime:
        chat = Chat(runtime, monkeypatch, replace(SETTINGS, no_pack="run this"))
        chat.say("/persona INFP", "/persona", "/base", "Hi")
    assert chat.output.texts("problem") == ["no persona 'INFP': run this"]
    assert chat.output.texts("show") == ["no personas: no mask pack is attached"]


# Comparing


def test_compare_asks_each_and_comes_back(chat: Chat) -> None:
    chat.say("One", "/persona ENTJ", "/strength 0.5")
    digest = chat.runtime.weights_digest()
    chat.say("/compare base INFP night owl: What now?")
    answers = chat.output.answers[1:]
    assert [(a.persona, a.strength, a.question) for a in answers] == [
        (None, 0.0, "What now?"),
        ("INFP", 0.5, "What now?"),
        ("night owl", 0.5, "What now?"),
    ]
    assert len({a.text for a in answers}) == 3
    assert len({a.seed for a in answers}) == 1
    assert all([m["content"] for m in asked][-1] == "What now?" and len(asked) == 3 for asked in chat.asked[1:])
    steps = [(s.before, s.report.persona) for s in chat.output.switches]
    assert steps == [("ENTJ", None), (None, "INFP"), ("INFP", "night owl"), ("night owl", "ENTJ")]
    assert all(s.report.n_units_written > 0 for s in chat.output.switches)
    assert all(s.report.seconds_to_first_token for s in chat.output.switches[:-1])
    assert (chat.runtime.weights_digest(), chat.repl.speaker) == (digest, "ENTJ")
    chat.say("Two")
    assert [m["content"] for m in chat.asked[-1]] == ["One", chat.output.answers[0].text, "Two"]


def test_compare_alone_asks_the_last_question_of_base_and_the_active_persona(chat: Chat) -> None:
    chat.say("/persona INFP", "One", "/compare")
    assert [(a.persona, a.question) for a in chat.output.answers[1:]] == [(None, "One"), ("INFP", "One")]
    assert chat.asked[1] == chat.asked[2] == chat.asked[0]  # where it stood, not after its own answer


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["/persona INFP", "/compare"], "there is no question to compare yet"),
        (["One", "/compare"], "there is no active persona to compare with base"),
        (["One", "/reset", "/compare I"], "there is no question to compare yet"),
    ],
)
def test_compare_says_what_it_lacks(chat: Chat, lines: list[str], problem: str) -> None:
    for line in lines:
        chat.repl.feed(line)
    assert chat.output.texts("problem")[0].startswith(problem)


def test_in_a_comparing_chat_every_question_is_compared(
    runtime: PersonaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(runtime, monkeypatch, replace(SETTINGS, compare=("base", "infp", "base")))
    assert chat.repl.speaker == "base,INFP"
    chat.say("One", "Two")
    assert [(a.persona, a.question) for a in chat.output.answers] == [
        (None, "One"),
        ("INFP", "One"),
        (None, "Two"),
        ("INFP", "Two"),
    ]
    assert all(len(asked) == 1 for asked in chat.asked)
    with pytest.raises(PersonaNotFoundError, match="no persona 'who'"):
        Repl(runtime, RecordedOutput(), replace(SETTINGS, compare=("who",)))


# Reports, help, completion


def test_stats_before_anything_and_after(chat: Chat) -> None:
    chat.repl.feed("/stats")
    chat.say("/persona INFP", "Hi", "/stats")
    before, after = chat.output.texts("show")
    assert before.count("none yet") == 2
    assert f"of {N_CONTEXT} tokens" in before
    answer = chat.output.answers[0]
    assert answer.completion is not None
    assert answer.switch is not None
    assert f"{answer.switch.report.n_units_written:,} units" in after
    assert "first token after" in after
    assert "12 tokens, the first after" in after
    assert "tokens/s" in after
    assert f"{answer.completion.n_prompt_tokens + 12:,} of {N_CONTEXT} tokens" in after


def test_help_names_every_command_and_fits_a_terminal(chat: Chat) -> None:
    chat.repl.feed("/help")
    assert chat.output.texts("show") == [HELP]
    for command in [*chat.repl._commands, "/quit"]:
        assert f"\n{command}" in f"\n{HELP}"
    assert max(map(len, HELP.splitlines())) <= 80


@pytest.mark.parametrize("line", ["/quit", " /quit ", "/exit"])
def test_quit_ends_the_chat(chat: Chat, line: str) -> None:
    assert not chat.repl.feed(line)


@pytest.mark.parametrize(
    ("before", "word", "expected"),
    [
        ("", "/st", ["/strength", "/stats"]),
        ("", "/q", ["/quit"]),
        ("", "IN", []),
        ("/persona ", "in", ["INFP"]),
        ("/compare INFP ", "b", ["base"]),
        ("/system ", "I", []),
    ],
)
def test_completion(chat: Chat, before: str, word: str, expected: list[str]) -> None:
    assert chat.repl.complete(before, word) == expected


# Interrupts and failures


class Interrupting(RecordedOutput):
    """Presses Ctrl-C when the answer has this many pieces."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def answer_piece(self, text: str) -> None:
        super().answer_piece(text)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_answer_stays_in_the_conversation_as_far_as_it_came(
    runtime: PersonaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(runtime, monkeypatch)
    chat.repl._output = output = Interrupting(after=3)
    with pytest.raises(KeyboardInterrupt):
        chat.repl.feed("One")
    (stopped,) = output.answers
    assert stopped.completion is None
    assert stopped.text == output.texts("pieces")[0] != ""
    chat.repl.feed("Two")
    assert [m["content"] for m in chat.asked[-1]] == ["One", stopped.text, "Two"]
    assert output.answers[-1].completion is not None


def test_an_interrupted_comparison_comes_back_to_the_persona_that_was(
    runtime: PersonaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(runtime, monkeypatch)
    chat.repl.feed("/persona INFP")
    digest = runtime.weights_digest()
    chat.repl._output = Interrupting(after=3)
    with pytest.raises(KeyboardInterrupt):
        chat.repl.feed("/compare base ENTJ: One")
    assert (runtime.weights_digest(), chat.repl.speaker) == (digest, "INFP")
    chat.repl.feed("Two")
    assert chat.roles() == "u"


def test_a_model_that_fails_leaves_the_chat_alive(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.say("One")

    def failing(*_: Any) -> int:
        raise GenerationError("no numbers any more")

    with monkeypatch.context() as broken:
        broken.setattr(chat.runtime._backend, "sample", failing)
        chat.repl.feed("Two")
    assert chat.output.texts("problem") == ["no numbers any more"]
    assert chat.output.answers[-1].completion is None
    chat.say("Three")
    assert chat.roles() == "uau"


def test_an_empty_question_is_refused(chat: Chat) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        chat.repl.ask(" ")
