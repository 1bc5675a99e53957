"""The chat's commands as text: their help, their completion, how their arguments read, and what they print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from persona_edge.chat_values import BASE, Answer, Speaker, Switch, speaker_name
from persona_edge.errors import PersonaNotFoundError
from persona_edge.masks import match_name
from persona_edge.runtime.values import Completion, KvPolicy
from persona_edge.terminal_text import bytes_text, display_width, duration_text

__all__ = [
    "HELP",
    "answer_text",
    "comparison_request",
    "completions",
    "find_speaker",
    "personas_text",
    "stats_text",
    "switch_text",
    "tokens_per_second",
]

HELP = """\
/persona NAME        switch to a persona; without a name, list them
/strength 0.6        how strongly personas act: 0 is base, 1 the whole persona
/base                go back to the unmodified model
/compare [A B ...:] [QUESTION]
                     ask a question of several, one after another; by default
                     the last question, of base and the active persona
/stats               the last switch, speed, and how full the context is
/system TEXT         set the system prompt; without text, show it; - removes it
/reset               forget the conversation
/help                this list
/quit                leave; so do Ctrl-D and, at the prompt, Ctrl-C
//text               send a line that begins with a slash

Ctrl-C during an answer stops the answer. A switch edits the weights in place
and keeps the conversation's text; the new persona reads it anew before it
answers (the KV cache is rebuilt; --kv can change that): that is what the first
token waits for."""


def completions(before: str, word: str, commands: Iterable[str], names: Iterable[str]) -> list[str]:
    """What `word`, typed after `before`, could become: a command, or a name where a command takes one."""
    if not before.strip():
        candidates = list(commands) if word.startswith("/") else []
    else:
        candidates = list(names) if before.split(maxsplit=1)[0] in ("/persona", "/compare") else []
    return [candidate for candidate in candidates if candidate.casefold().startswith(word.casefold())]


def find_speaker(name: str, personas: Sequence[str]) -> Speaker:
    """The persona that `name` means, whatever its letter case; None for `base`. PersonaNotFoundError for others."""
    found = match_name(name, personas)
    if found is not None:
        return found
    if name.casefold() == BASE:
        return None
    raise PersonaNotFoundError(f"no persona {name!r}; there are {', '.join([BASE, *personas])}")


def comparison_request(text: str, personas: Sequence[str]) -> tuple[list[str], str]:
    """The names and the question in the argument of /compare; either may be empty.

    Names come first, separated by spaces or commas, and a colon ends them: `INFP, ENTJ: How are you?`. Without a colon
    the names that it begins with count, unless each is a single letter followed by a question: in `I like cats` the I
    is no persona. Raises PersonaNotFoundError when something else than a name follows a comma.
    """
    names, rest = _leading_names(text, [*personas, BASE])
    if rest.startswith(":"):
        return names, rest[1:].strip()
    if rest and all(len(name) == 1 for name in names):
        return [], text.strip()
    return names, rest


def personas_text(personas: Sequence[str], active: Speaker, width: int = 76) -> str:
    """All persona names in columns, the active one marked with a star."""
    if not personas:
        return "no personas: no mask pack is attached"
    cells = [f"{'*' if name == active else ' '}{name}" for name in personas]
    cell_width = max(map(display_width, cells)) + 1
    per_row = max(1, min(8, width // cell_width))
    rows = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
    return "\n".join("".join(_padded(cell, cell_width) for cell in row).rstrip() for row in rows)


def switch_text(switch: Switch) -> str:
    """`base → INFP at strength 1: 12,345 units, 49 kB written in 412 µs`."""
    report = switch.report
    strength = f" at strength {report.strength:g}" if report.persona is not None else ""
    return (
        f"{speaker_name(switch.before)} → {speaker_name(report.persona)}{strength}: {report.n_units_written:,} units, "
        f"{bytes_text(report.n_bytes_written)} written in {duration_text(report.seconds)}"
    )


_WAITED_FOR: Mapping[KvPolicy, str] = {
    "reprefill": "reading the conversation anew",
    "snapshot": "reading what this persona had not read yet",
    "keep": "nothing else: it goes on from what the one before it read",
}


def stats_text(active: Speaker, strength: float, switch: Switch | None, answer: Answer | None, n_ctx: int) -> str:
    """What /stats prints. Speeds are of the last answer; the context is what it and all before it take."""
    rows = [("persona", speaker_name(active) + (f" at strength {strength:g}" if active is not None else ""))]
    rows.append(("last switch", "none yet" if switch is None else switch_text(switch)))
    if switch is not None and switch.report.seconds_to_first_token is not None:
        waited = duration_text(switch.report.seconds_to_first_token)
        rows.append(("", f"first token after {waited}: the switch, and {_WAITED_FOR[switch.report.kv]}"))
    rows.append(("last answer", "none yet" if answer is None else answer_text(answer)))
    completion = answer.completion if answer is not None else None
    used = 0 if completion is None else completion.n_prompt_tokens + completion.n_tokens
    rows.append(
        ("context", f"{used:,} of {n_ctx:,} tokens" if answer is None or completion else f"of {n_ctx:,} tokens")
    )
    return "\n".join(f"{name:12} {text}" for name, text in rows)


def answer_text(answer: Answer) -> str:
    """`57 tokens, first after 0.2 s, then 47.5 tokens/s`."""
    completion = answer.completion
    if completion is None:
        return "stopped before its end"
    text = f"{completion.n_tokens} tokens, the first after {duration_text(completion.seconds_to_first_token)}"
    speed = tokens_per_second(completion)
    return text if speed is None else f"{text}, then {speed:.1f} tokens/s"


def tokens_per_second(completion: Completion) -> float | None:
    """Speed of generation after the first token; None when there was no more than one."""
    seconds = completion.seconds - completion.seconds_to_first_token
    return (completion.n_tokens - 1) / seconds if completion.n_tokens > 1 and seconds > 0 else None


def _leading_names(text: str, names: Sequence[str]) -> tuple[list[str], str]:
    """The names that `text` begins with, as they are typed there, and the rest of it."""
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"({alternatives})(?=[\s,:]|$)\s*(,?)\s*", re.IGNORECASE)
    found: list[str] = []
    rest, comma = text.strip(), ""
    while match := pattern.match(rest):
        found.append(match[1])
        rest, comma = rest[match.end() :], match[2]
    if comma and rest:
        raise PersonaNotFoundError(f"no persona {rest.split()[0]!r}; there are {', '.join(names)}")
    return found, rest


def _padded(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))
