"""What a line of the chat means, and how its lists look, without a model."""

from __future__ import annotations

import pytest

from persona_edge.errors import PersonaNotFoundError
from persona_edge.repl_commands import comparison_request, find_speaker, personas_text
from tests.tiny_chat import PERSONAS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ([], "")),
        ("INFP ENTJ", (["INFP", "ENTJ"], "")),
        ("base,infp, ENTJ", (["base", "infp", "ENTJ"], "")),
        ("INFP ENTJ: How?", (["INFP", "ENTJ"], "How?")),
        ("INFP ENTJ How?", (["INFP", "ENTJ"], "How?")),
        ("I like cats", ([], "I like cats")),
        ("I: like cats", (["I"], "like cats")),
        ("I E", (["I", "E"], "")),
        (": INFP is what?", ([], "INFP is what?")),
        ("night owl E", (["night owl", "E"], "")),
        ("night owls sleep", ([], "night owls sleep")),
        ("What is 1:2?", ([], "What is 1:2?")),
    ],
)
def test_names_and_question_of_a_comparison(text: str, expected: tuple[list[str], str]) -> None:
    assert comparison_request(text, list(PERSONAS)) == expected


def test_a_persona_called_base_can_be_named() -> None:
    assert find_speaker("BASE", ["base", "x"]) == "base"
    assert find_speaker("base", ["x"]) is None


def test_letter_case_matters_where_it_tells_names_apart() -> None:
    assert find_speaker("Ab", ["Ab", "aB"]) == "Ab"
    with pytest.raises(PersonaNotFoundError, match="no persona 'AB'; there are base, Ab, aB"):
        find_speaker("AB", ["Ab", "aB"])


def test_many_personas_stay_within_the_width() -> None:
    text = personas_text([f"{'x' * (i % 30)}{i}" for i in range(60)], "x1", 76)
    assert max(map(len, text.splitlines())) <= 76
