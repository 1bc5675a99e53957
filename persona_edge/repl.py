"""The chat: lines in, answers and results out, without a terminal.

A line is a question, or a command when it begins with `/` (`//` sends a line that begins with a slash). `Repl.feed`
carries one line out and tells a `ChatOutput` what happens, piece by piece; how that looks is the output's business.

A switch keeps the conversation's text, not the model's memory of it: the new persona reads the conversation anew before
it answers, because keys and values of the old one would colour it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from persona_edge.chat_values import BASE, Answer, ChatOutput, ChatSettings, Speaker, Switch, speaker_name
from persona_edge.errors import InputError, PersonaEdgeError
from persona_edge.repl_commands import (
    HELP,
    comparison_request,
    completions,
    find_speaker,
    personas_text,
    stats_text,
    switch_text,
)
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.values import Completion, Message, SamplingOptions

__all__ = ["Repl"]

Pieces = Generator[str, None, Completion]


class Repl:
    """A conversation with a model whose personas switch. It changes `runtime`'s persona, and does not close it."""

    def __init__(self, runtime: PersonaSession, output: ChatOutput, settings: ChatSettings) -> None:
        """Raises PersonaNotFoundError when `settings.compare` names what the pack does not hold."""
        self._runtime, self._output, self._settings = runtime, output, settings
        self._strength, self._system = settings.strength, settings.system
        self._compare = self._speakers(settings.compare)
        self._turns: list[Message] = []
        self._question: str | None = None
        self._n_questions = 0
        self._answer: Answer | None = None
        self._switch: Switch | None = None
        self.n_problems = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/persona": self._do_persona,
            "/strength": self._do_strength,
            "/base": lambda _: self._announce(self.switch(None)),
            "/compare": self._do_compare,
            "/stats": self._do_stats,
            "/system": self._do_system,
            "/reset": self._do_reset,
            "/help": lambda _: self._output.show(HELP),
        }

    @property
    def speaker(self) -> str:
        """Who answers next: a persona or `base`, several when each question is compared."""
        return ",".join(map(speaker_name, self._compare or [self._runtime.persona]))

    def feed(self, line: str) -> bool:
        """Carry out one line; False when it ends the chat.

        What goes wrong on purpose becomes a `problem` and loses nothing. KeyboardInterrupt passes, after what there is
        of the answer has joined the conversation.
        """
        text = line.strip()
        if text in ("/quit", "/exit"):
            return False
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._carry_out(text)
            elif text:
                self.ask(text.removeprefix("/"))
        except PersonaEdgeError as error:
            self.n_problems += 1
            self._output.problem(str(error))
        return True

    def ask(self, question: str) -> None:
        """Answer `question` as the active persona, or compare if the settings say so; InputError, GenerationError."""
        if self._compare:
            self.compare(question, self._compare)
            return
        self._count(question)
        self._stream(question, self._turns, remember=True)

    def compare(self, question: str, speakers: Sequence[Speaker]) -> None:
        """Answer `question` as each of `speakers`; then all is as it was before.

        It is asked after the conversation so far; the question asked last, where it stood in the conversation.
        """
        asked_last = len(self._turns) > 1 and self._turns[-2]["content"] == question
        earlier = self._turns[:-2] if asked_last else self._turns
        self._count(question)
        before = self._runtime.persona, self._runtime.strength
        switches: list[Switch] = []
        self._output.comparison_begins(question)
        try:
            for speaker in speakers:
                switches.append(self.switch(speaker))
                self._stream(question, earlier, remember=False)
                switches[-1] = self._switch or switches[-1]  # now with its time to the first token
        finally:
            switches.append(self.switch(*before))
            self._output.comparison_ends([s for s in switches if s.before != s.report.persona])

    def choose(self, name: str) -> Switch:
        """Become the persona that `name` means, whatever its letter case, or the model itself for `base`."""
        return self.switch(self._speaker(name))

    def switch(self, speaker: Speaker, strength: float | None = None) -> Switch:
        """Become `speaker`, at the chat's strength unless given; PersonaNotFoundError, InputError."""
        before = self._runtime.persona
        if speaker is None:
            report = self._runtime.base()
        else:
            report = self._runtime.switch(speaker, self._strength if strength is None else strength)
        self._switch = Switch(before, report)
        return self._switch

    def complete(self, before: str, word: str) -> list[str]:
        """What `word`, typed after `before`, could become."""
        return completions(before, word, [*self._commands, "/quit"], [BASE, *self._runtime.personas])

    def _carry_out(self, text: str) -> None:
        name, *argument = text.split(maxsplit=1)
        command = self._commands.get(name)
        if command is None:
            raise InputError(f"no command {name}; /help lists them, and // sends a line that begins with a slash")
        command(argument[0] if argument else "")

    def _do_persona(self, name: str) -> None:
        if name:
            self._announce(self.choose(name))
        else:
            self._output.show(personas_text(self._runtime.personas, self._runtime.persona))

    def _do_strength(self, argument: str) -> None:
        active = self._runtime.persona
        if not argument:
            self._output.show(f"strength {self._strength:g}")
            return
        strength = _strength(argument)
        if active is not None:
            self._announce(self.switch(active, strength))
        else:
            self._output.note(f"strength {strength:g} for the next persona")
        self._strength = strength

    def _do_compare(self, argument: str) -> None:
        names, question = comparison_request(argument, self._runtime.personas)
        speakers = self._speakers(names) or self._compare or self._default_comparison()
        if not question and self._question is None:
            raise InputError("there is no question to compare yet; write it after the names: /compare INFP ENTJ: …")
        self.compare(question or self._question or "", speakers)

    def _do_stats(self, _: str) -> None:
        runtime = self._runtime
        self._output.show(
            stats_text(runtime.persona, runtime.strength, self._switch, self._answer, self._runtime.n_ctx)
        )

    def _do_system(self, text: str) -> None:
        if not text:
            self._output.show(self._system if self._system is not None else "no system prompt")
            return
        self._system = None if text == "-" else text
        self._output.note("system prompt removed" if self._system is None else "system prompt set")

    def _do_reset(self, _: str) -> None:
        self._turns, self._question = [], None
        self._output.note("conversation forgotten")

    def _announce(self, switch: Switch) -> None:
        self._output.note(switch_text(switch))

    def _speaker(self, name: str) -> Speaker:
        if not self._runtime.personas and name.casefold() != BASE:
            raise InputError(f"no persona {name!r}: {self._settings.no_pack}")
        return find_speaker(name, self._runtime.personas)

    def _speakers(self, names: Sequence[str]) -> tuple[Speaker, ...]:
        return tuple(dict.fromkeys(map(self._speaker, names)))

    def _default_comparison(self) -> tuple[Speaker, ...]:
        if self._runtime.persona is None:
            raise InputError("there is no active persona to compare with base; name some: /compare INFP ENTJ: …")
        return None, self._runtime.persona

    def _count(self, question: str) -> None:
        if not question.strip():
            raise InputError("the question is empty; write at least one word")
        self._question = question
        self._n_questions += 1

    def _stream(self, question: str, earlier: list[Message], *, remember: bool) -> None:
        """One answer, piece by piece; what there is of it is kept and shown, also when it is stopped."""
        pieces, turns = self._start(question, earlier)
        self._output.answer_begins(self._runtime.persona, self._runtime.strength)
        trimmed, completion = _Trimmed(), None
        try:
            completion = self._drain(pieces, trimmed)
        finally:
            pieces.close()
            self._answer = self._measured(question, trimmed.text, completion)
            if remember and trimmed.text:
                self._turns = [*turns, _message("user", question), _message("assistant", trimmed.text)]
            self._output.answer_ends(self._answer)

    def _start(self, question: str, earlier: list[Message]) -> tuple[Pieces, list[Message]]:
        """The answer's pieces, and those of the `earlier` turns that the context has room for: the oldest go first."""
        system = [] if self._system is None else [_message("system", self._system)]
        errors: list[InputError] = []
        for n_dropped in range(0, len(earlier) + 1, 2):
            turns = earlier[n_dropped:]
            try:
                pieces = self._runtime.stream_chat([*system, *turns, _message("user", question)], self._options)
            except InputError as error:  # too long; or messages that no number of turns would make acceptable
                errors.append(error)
                continue
            if n_dropped:
                self._output.note(
                    f"the context is full: forgot the oldest {n_dropped // 2} of {len(earlier) // 2} turns"
                )
            return pieces, turns
        raise errors[0]

    @property
    def _options(self) -> SamplingOptions:
        return replace(self._settings.options, seed=self._seed)

    @property
    def _seed(self) -> int:
        return (self._settings.seed + self._n_questions - 1) % 2**32

    def _drain(self, pieces: Pieces, trimmed: _Trimmed) -> Completion:
        while True:
            try:
                piece = trimmed.push(next(pieces))
            except StopIteration as end:
                whole: Completion = end.value
                return whole
            if piece:
                self._output.answer_piece(piece)

    def _measured(self, question: str, text: str, completion: Completion | None) -> Answer:
        """The answer as a record; the switch that it waited for now has its time to the first token."""
        runtime, switch = self._runtime, self._switch
        if switch is not None:
            is_first_after = switch.report.seconds_to_first_token is None
            self._switch = replace(switch, report=runtime.last_switch or switch.report)
            switch = self._switch if is_first_after else None
        return Answer(runtime.persona, runtime.strength, question, text, self._seed, completion, switch)


class _Trimmed:
    """A text that arrives in pieces, without the white space around it."""

    def __init__(self) -> None:
        self.text = ""
        self._held = ""

    def push(self, piece: str) -> str:
        """What is certain with `piece`: white space waits for what follows it."""
        arrived = self._held + piece
        certain = arrived.rstrip()
        self._held = arrived[len(certain) :]
        certain = certain if self.text else certain.lstrip()
        self.text += certain
        return certain


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _strength(text: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 1:
        raise InputError(f"strength is {text!r}; it must be a number between 0 (base) and 1 (the whole persona)")
    return strength
