"""Untrusted text made safe, and wrapped while it arrives."""

from __future__ import annotations

import io
import sys
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_edge.terminal_text import WordWrap, bytes_text, can_show, display_width, duration_text, printable, spell


def wrapped(text: str, width: int, indent: str = "", *, cuts: tuple[int, ...] = ()) -> str:
    wrap = WordWrap(width, indent)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [wrap.push(text[start:end]) for start, end in pairwise(edges)]
    return "".join(pieces) + wrap.finish()


def test_printable_drops_what_steers_a_terminal_and_nothing_else() -> None:
    dropped = {chr(code) for code in range(sys.maxunicode + 1) if not printable(chr(code))}
    controls = {chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cs")}
    reordering = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert dropped == (controls - {"\n", "\t"}) | reordering | {"\u2028", "\u2029"}
    assert printable("\x1b]0;title\x07\x1b[2Ja\r\nb\tc\u009b31m") == "]0;title[2Ja\nb\tc31m"


@given(st.text(), st.lists(st.integers(0, 1000), max_size=8).map(tuple), st.integers(8, 40))
def test_wrapping_does_not_depend_on_how_the_text_is_cut(text: str, cuts: tuple[int, ...], width: int) -> None:
    assert wrapped(text, width, cuts=cuts) == wrapped(text, width)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.just("\n")), st.integers(10, 40))
def test_no_line_is_wider_than_the_terminal_and_nothing_but_spaces_is_lost(text: str, width: int) -> None:
    out = wrapped(text, width, "  ")
    assert max(map(display_width, out.split("\n"))) <= width
    keep = str.maketrans("", "", " \n")
    assert out.translate(keep) == text.translate(keep)
    assert out.count("\n") >= text.count("\n")


@given(st.lists(st.text("abcdé", min_size=1, max_size=12), min_size=1))
def test_words_stay_whole_and_lines_are_filled(words: list[str]) -> None:
    out = wrapped(" ".join(words), 12)
    assert out.split() == words
    lines = out.split("\n")
    for line, following in pairwise(lines):
        assert len(line) + 1 + len(following.split()[0]) > 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four", "  one two\n  three\n  four"),
        ("a\n\n  b c\n", "  a\n\n    b c\n"),
        ("abcdefghijklmno", "  abcdefgh\n  ijklmno"),
        ("日本語日本語", "  日本語日\n  本語"),
        ("a\tb", "  a    b"),
        ("", ""),
        ("   ", ""),
    ],
)
def test_wrapped_to_ten_columns_with_an_indent(text: str, expected: str) -> None:
    assert wrapped(text, 10, "  ") == expected


def test_width_counts_columns() -> None:
    assert [display_width(text) for text in ("abc", "日本", "e\u0301", "🙂", "\u200d")] == [3, 4, 1, 2, 0]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0 µs"),
        (4.12e-4, "412 µs"),
        (9.996e-4, "1.00 ms"),
        (0.00135, "1.35 ms"),
        (0.0301, "30.1 ms"),
        (0.99951, "1.00 s"),
        (21.53, "21.5 s"),
    ],
)
def test_durations_have_three_digits(seconds: float, expected: str) -> None:
    assert duration_text(seconds) == expected


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [(0, "0 B"), (812, "812 B"), (999.6, "1.00 kB"), (13800, "13.8 kB"), (844_000, "844 kB"), (2.5e9, "2.50 GB")],
)
def test_sizes_have_three_digits(n_bytes: float, expected: str) -> None:
    assert bytes_text(n_bytes) == expected


def test_marks_follow_the_encoding() -> None:
    wide, narrow = (io.TextIOWrapper(io.BytesIO(), encoding=name) for name in ("utf-8", "latin-1"))
    assert can_show(wide, "→")
    assert not can_show(narrow, "→")
    assert spell("→ µ ─ …", wide) == "→ µ ─ …"
    assert spell("→ µ ─ …", narrow) == "-> u - ..."
