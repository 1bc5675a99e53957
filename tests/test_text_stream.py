"""What may be shown of a text whose tokens are still coming."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_edge.runtime.text_stream import TextStream


def streamed(chunks: Iterable[bytes], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(stop)
    pieces = [stream.push(chunk) for chunk in chunks]
    return [*pieces, stream.finish()]


def cut(data: bytes, n: int) -> list[bytes]:
    return [data[i : i + n] for i in range(0, len(data), n)]


def test_a_character_appears_when_its_last_byte_came() -> None:
    assert streamed(cut("a🙂é".encode(), 1)) == ["a", "", "", "", "🙂", "", "é", ""]


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert "".join(streamed([b"a\xff", b"b\xf0\x9f"])) == "a�b�"


@given(st.text(), st.integers(1, 5))
def test_any_cutting_gives_the_whole_text(text: str, n: int) -> None:
    assert "".join(streamed(cut(text.encode(), n))) == text


def test_the_stop_string_and_what_follows_are_not_shown() -> None:
    stream = TextStream(("\nUser:",))
    assert [stream.push(p) for p in (b"Yes.", b"\nUs", b"er: and")] == ["Yes.", "", ""]
    assert stream.stopped
    assert stream.push(b"more") == stream.finish() == ""


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    stream = TextStream(("\nUser:",))
    assert [stream.push(p) for p in (b"a\n", b"Us", b"ual")] == ["a", "", "\nUsual"]
    assert not stream.stopped


def test_a_held_back_beginning_is_shown_at_the_end() -> None:
    assert streamed([b"a\nUse"], ("\nUser:",)) == ["a", "\nUse"]


@pytest.mark.parametrize("stop", [("b", "abc"), ("abc", "b")])
def test_the_stop_string_that_begins_first_wins(stop: tuple[str, ...]) -> None:
    assert "".join(streamed([b"xabcd"], stop)) == "x"


@given(st.text(alphabet="ab", max_size=30), st.text(alphabet="ab", min_size=1, max_size=4), st.integers(1, 3))
def test_stopping_equals_cutting_the_whole_text_at_the_first_occurrence(text: str, stop: str, n: int) -> None:
    assert "".join(streamed(cut(text.encode(), n), (stop,))) == text.partition(stop)[0]
