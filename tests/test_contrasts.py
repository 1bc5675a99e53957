"""Calibration files: what loads, what each malformed file is told, and how a set splits, shrinks and is hashed."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_edge.contrasts import (
    MAX_ANSWER_CHARACTERS,
    MAX_PROMPT_CHARACTERS,
    CalibrationSet,
    Contrast,
    Example,
    load_contrasts,
    load_examples,
    load_texts,
    parse_contrasts,
)
from persona_edge.errors import CalibrationError, InputError

LINE = '{"prompt": "How are you?", "positive": "Fine.", "negative": "Tired."}\n'
CONTRAST = Contrast("How are you?", "Fine.", "Tired.")


def parse(text: str | bytes) -> CalibrationSet:
    return parse_contrasts(text.encode() if isinstance(text, str) else text, name="power", source="power.jsonl")


def contrast_set(n: int) -> CalibrationSet:
    return CalibrationSet("a", "a", "a", "b", tuple(Contrast(f"prompt {i}", f"yes {i}", f"no {i}") for i in range(n)))


class TestJsonLines:
    def test_poles_are_named_after_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "power.jsonl"
        path.write_text(LINE)
        assert load_contrasts(path) == CalibrationSet("power", "power", "power", "anti-power", (CONTRAST,))

    def test_first_line_may_name_the_poles(self) -> None:
        loaded = parse('{"axis": "EI", "positive": "E", "negative": "I"}\n' + LINE)
        assert loaded == CalibrationSet("power", "EI", "E", "I", (CONTRAST,))

    def test_a_contrast_may_carry_other_keys(self) -> None:
        line = '{"prompt": "Hi", "positive": "a", "negative": "b", "axis": "EI", "id": 7}'
        assert parse(line).contrasts == (Contrast("Hi", "a", "b"),)

    @pytest.mark.parametrize("text", ["\ufeff" + LINE, LINE.replace("\n", "\r\n"), "\n\n" + LINE + "\n", LINE.strip()])
    def test_byte_order_mark_crlf_and_blank_lines_do_not_matter(self, text: str) -> None:
        assert parse(text).contrasts == (CONTRAST,)

    def test_only_a_line_feed_ends_a_line(self) -> None:
        text = json.dumps({"prompt": "a\u2028b\x85c", "positive": "x", "negative": "y"}, ensure_ascii=False)
        assert parse(text).contrasts == (Contrast("a\u2028b\x85c", "x", "y"),)

    def test_a_repeated_contrast_is_left_out_and_its_line_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        loaded = parse(LINE + LINE.replace("How", "Who") + LINE)
        assert len(loaded) == 2
        assert caplog.messages == ["power.jsonl: line 3 repeats line 1; it is left out"]


class TestCsv:
    def test_quotes_commas_and_newlines_inside_fields(self, tmp_path: Path) -> None:
        rows = [("question", "matching", "not_matching"), ('Say "hi",\nplease', "a, b", 'c\n"d"'), ("q", "x", "y")]
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows(rows)
        path = tmp_path / "power.csv"
        path.write_bytes(buffer.getvalue().encode())
        loaded = load_contrasts(path)
        assert loaded.contrasts == tuple(Contrast(*row) for row in rows[1:])
        assert (loaded.positive_pole, loaded.negative_pole) == ("power", "anti-power")

    def test_columns_in_any_order_and_further_ones(self) -> None:
        assert parse("not_matching,id,question,matching\nc,1,a,b\n").contrasts == (Contrast("a", "b", "c"),)

    def test_errors_name_the_line_on_which_the_row_begins(self) -> None:
        with pytest.raises(CalibrationError, match="line 4: 'matching' is empty"):
            parse('question,matching,not_matching\n"two\nlines",b,c\nd,,e\n')


class TestStatements:
    def test_the_matching_answer_is_the_positive_one(self) -> None:
        agree = '{"statement": "I like maths", "label_matching": " Yes", "label_not_matching": " No"}\n'
        oppose = '{"statement": "I avoid maths", "label_matching": " No"}\n'
        asked = 'Is the following statement something you would say? "{}"'
        assert parse(agree + oppose).contrasts == (
            Contrast(asked.format("I like maths"), "Yes", "No"),
            Contrast(asked.format("I avoid maths"), "No", "Yes"),
        )

    def test_the_published_names_of_the_labels(self) -> None:
        labels = {"answer_matching_behavior": " No", "answer_not_matching_behavior": " Yes"}
        assert parse(json.dumps({"statement": "s", **labels})).contrasts[0].positive == "No"


def record(**fields: object) -> str:
    return json.dumps({"prompt": "p", "positive": "a", "negative": "b"} | fields)


MALFORMED = {
    "empty file": (b"", "empty; expected one JSON object per line"),
    "blank file": (b" \n\n", "empty; expected one JSON object per line"),
    "only a byte order mark": ("\ufeff".encode(), "empty; expected"),
    "not UTF-8": (LINE.encode() + b'{"prompt": "caf\xe9"}', "line 2: not UTF-8 at byte 85"),
    "UTF-16": (LINE.encode("utf-16"), "line 1: not UTF-8 at byte 0; save it as UTF-8"),
    "malformed JSON": (LINE + '{"prompt": "p",', "line 2: malformed JSON (Expecting property name"),
    "nested too deep": (LINE + "[" * 100_000, "line 2: malformed JSON (numbers or nesting out of bounds)"),
    "number too long": (LINE + "1" * 5_000, "line 2: malformed JSON (numbers or nesting out of bounds)"),
    "JSON array": ("[" + LINE.strip() + "]", "opens a JSON array; expected one JSON object per line"),
    "not an object": (LINE + '"text"', "line 2: a JSON str; expected one JSON object per line"),
    "missing key": (LINE + '{"prompt": "p", "positive": "a"}', "line 2: no 'negative'; the line has 'prompt', 'positi"),
    "empty object": (LINE + "{}", "line 2: no 'prompt'; the line has no keys"),
    "not a string": (LINE + record(positive=3), "line 2: 'positive' is of type int; expected a string"),
    "null": (LINE + record(prompt=None), "line 2: 'prompt' is of type NoneType; expected a string"),
    "empty string": (LINE + record(negative=" \t"), "line 2: 'negative' is empty"),
    "identical answers": (LINE + record(negative=" a "), "line 2: 'positive' and 'negative' are the same text"),
    "long prompt": (record(prompt="x" * 4_001), "line 1: 'prompt' has 4001 characters; shorten it to at most 4000"),
    "long answer": (record(positive="x" * 4_001), "line 1: 'positive' has 4001 characters; shorten it to at most 4000"),
    "NUL": (record(prompt="a\0b"), "line 1: 'prompt' holds a character that is not text"),
    "half a surrogate pair": ('{"prompt": "\\ud800", "positive": "a", "negative": "b"}', "that is not text"),
    "header alone": ('{"axis": "EI", "positive": "E", "negative": "I"}', "no contrasts; add at least one"),
    "poles alike": ('{"axis": "EI", "positive": "E", "negative": "E"}\n' + LINE, "line 1: both poles are called 'E'"),
    "pole missing": ('{"axis": "EI", "positive": "E"}\n' + LINE, "line 1: no 'negative'"),
    "label missing": ('{"statement": "s"}', "line 1: a statement without 'label_matching'; expected ' Yes' or ' No'"),
    "label of another kind": ('{"statement": "s", "label_matching": "A"}', "'label_matching' is 'A'; expected ' Yes'"),
    "labels alike": (
        '{"statement": "s", "label_matching": " Yes", "label_not_matching": " Yes"}',
        "line 1: 'label_matching' is 'Yes', so 'label_not_matching' should be ' No'",
    ),
    "neither JSON nor CSV": (
        "hello there\n",
        "line 1: neither JSON nor a CSV header with question,matching,not_matchi",
    ),
    "column missing": ("question,matching\na,b\n", "(no not_matching)"),
    "column twice": ("question,matching,not_matching,matching\n", "line 1: a column of the CSV header occurs twice"),
    "CSV header alone": ("question,matching,not_matching\n", "no contrasts; add at least one"),
    "too few fields": ("question,matching,not_matching\na,b\n", "line 2: 2 fields where the header has 3"),
    "too many fields": ("question,matching,not_matching\na,b,c,d\n", "line 2: 4 fields where the header has 3"),
    "open quote": ('question,matching,not_matching\na,b,c\na,"b,c\n', "line 3: malformed CSV"),
    "text after a quote": ('question,matching,not_matching\na,"b"x,c\n', "line 2: malformed CSV"),
}


class TestMalformed:
    @pytest.mark.parametrize(("text", "expected"), MALFORMED.values(), ids=MALFORMED.keys())
    def test_one_line_names_file_line_and_remedy(self, text: str | bytes, expected: str) -> None:
        with pytest.raises(CalibrationError) as caught:
            parse(text)
        message = str(caught.value)
        assert message.startswith("power.jsonl: ")
        assert expected in message
        assert "\n" not in message

    def test_texts_of_the_longest_length_load(self) -> None:
        longest = record(prompt="x" * MAX_PROMPT_CHARACTERS, positive="y" * MAX_ANSWER_CHARACTERS)
        assert len(parse(longest).contrasts[0].positive) == MAX_ANSWER_CHARACTERS

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"none\.jsonl: cannot be read: No such file"):
            load_contrasts(tmp_path / "none.jsonl")
        with pytest.raises(CalibrationError, match="cannot be read: Is a directory"):
            load_contrasts(tmp_path)

    def test_enormous_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("persona_edge.contrasts.MAX_FILE_BYTES", 2**20)
        path = tmp_path / "big.jsonl"
        path.write_bytes(b" " * (2**20 + 1))
        with pytest.raises(CalibrationError, match="larger than 1 MiB; split it"):
            load_contrasts(path)

    @given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
    def test_any_bytes_load_or_raise_a_calibration_error(self, data: bytes) -> None:
        for prefix in (b"", b'{"prompt": "', b'{"statement": "', b"question,matching,not_matching\n"):
            with contextlib.suppress(CalibrationError):
                loaded = parse(prefix + data)
                assert loaded.contrasts
                assert len(loaded.content_hash()) == 64

    @given(st.lists(st.tuples(*[st.text(min_size=1, max_size=20)] * 3), min_size=1, max_size=8))
    def test_what_loads_from_json_loads_alike_from_csv(self, rows: list[tuple[str, str, str]]) -> None:
        lines = "\n".join(json.dumps({"prompt": q, "positive": p, "negative": n}) for q, p, n in rows)
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([("question", "matching", "not_matching"), *rows])
        try:
            expected = parse(lines)
        except CalibrationError:
            with pytest.raises(CalibrationError):
                parse(buffer.getvalue())
        else:
            assert parse(buffer.getvalue()) == expected


class TestSplit:
    def test_parts_are_disjoint_complete_and_in_order(self) -> None:
        whole = contrast_set(500)
        calibration, held_out = whole.split()
        assert sorted(calibration.contrasts + held_out.contrasts, key=whole.contrasts.index) == list(whole.contrasts)
        assert set(calibration.contrasts).isdisjoint(held_out.contrasts)
        assert 70 <= len(held_out) <= 130
        assert (held_out.axis, held_out.positive_pole) == (whole.axis, whole.positive_pole)

    def test_adding_items_moves_no_other(self) -> None:
        small = set(contrast_set(60).split()[1].contrasts)
        large = set(contrast_set(200).split()[1].contrasts)
        assert small
        assert small == large & set(contrast_set(60).contrasts)

    def test_where_a_prompt_goes_is_fixed_for_ever(self) -> None:
        held_out = [contrast.prompt for contrast in contrast_set(20).split()[1].contrasts]
        assert held_out == ["prompt 2", "prompt 6", "prompt 7", "prompt 14", "prompt 15", "prompt 19"]

    def test_contrasts_of_one_prompt_stay_together(self) -> None:
        whole = contrast_set(50)
        doubled = replace(
            whole, contrasts=whole.contrasts + tuple(replace(c, positive="other") for c in whole.contrasts)
        )
        calibration, held_out = doubled.split()
        assert {c.prompt for c in calibration.contrasts}.isdisjoint(c.prompt for c in held_out.contrasts)

    def test_nothing_held_out(self) -> None:
        calibration, held_out = contrast_set(30).split(0.0)
        assert (len(calibration), len(held_out)) == (30, 0)

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_share_out_of_range(self, share: float) -> None:
        with pytest.raises(InputError, match="held-out share"):
            contrast_set(3).split(share)


class TestHalves:
    def test_they_share_no_prompt_and_miss_no_contrast(self) -> None:
        whole = contrast_set(30)
        doubled = replace(whole, contrasts=tuple(c for c in whole.contrasts for _ in range(2)))
        first, second = doubled.halves()
        assert len(first) == len(second) == 30
        assert {c.prompt for c in first.contrasts}.isdisjoint(c.prompt for c in second.contrasts)
        assert first.contrasts == tuple(c for c in doubled.contrasts if c in set(first.contrasts))
        assert (first, second) == doubled.halves()

    def test_one_prompt_is_both(self) -> None:
        one = contrast_set(1)
        assert one.halves() == (one, one)


class TestLimit:
    def test_smaller_draws_are_part_of_larger_ones_and_keep_the_order(self) -> None:
        whole = contrast_set(100)
        ten, thirty = whole.limit(10, seed=3), whole.limit(30, seed=3)
        assert (len(ten), len(thirty)) == (10, 30)
        assert set(ten.contrasts) < set(thirty.contrasts)
        assert list(thirty.contrasts) == sorted(thirty.contrasts, key=whole.contrasts.index)
        assert whole.limit(10, seed=4) != ten

    def test_more_than_there_are(self) -> None:
        assert contrast_set(5).limit(50) == contrast_set(5)

    def test_none_at_all(self) -> None:
        with pytest.raises(InputError, match="limit a to 0"):
            contrast_set(5).limit(0)


class TestContentHash:
    def test_covers_texts_poles_and_order_but_not_the_name(self) -> None:
        whole = contrast_set(3)
        changed = [
            replace(whole, axis="b"),
            replace(whole, positive_pole="c"),
            replace(whole, negative_pole="c"),
            replace(whole, contrasts=whole.contrasts[::-1]),
            replace(whole, contrasts=whole.contrasts[:2]),
            replace(whole, contrasts=(*whole.contrasts[:2], Contrast("prompt 2", "yes 2", "no 3"))),
        ]
        assert len({item.content_hash() for item in [whole, *changed]}) == 7
        assert replace(whole, name="b").content_hash() == whole.content_hash()

    def test_is_fixed_for_ever(self) -> None:
        one = CalibrationSet("x", "EI", "E", "I", (Contrast("Größe?", "a", "b"),))
        assert one.content_hash() == "6b7b45807a3c24ffb6c43dc35032613a60d410d33acbaadc4ad138e3c26115be"


class TestExamplesAndTexts:
    def test_examples(self, tmp_path: Path) -> None:
        path = tmp_path / "examples.jsonl"
        path.write_text('{"prompt": "p", "response": "r"}\r\n{"prompt": "q", "response": "s"}\r\n')
        assert load_examples(path) == (Example("p", "r"), Example("q", "s"))

    def test_errors_are_those_of_contrasts(self, tmp_path: Path) -> None:
        path = tmp_path / "examples.jsonl"
        path.write_text('{"prompt": "p", "response": ""}')
        with pytest.raises(CalibrationError, match=r"examples\.jsonl: line 1: 'response' is empty"):
            load_examples(path)
        with pytest.raises(CalibrationError, match="line 1: no 'text'; the line has 'prompt', 'response'"):
            load_texts(path, "text")


@pytest.mark.data
class TestPublicData:
    @pytest.mark.parametrize(("file", "n"), [("power_train", 638), ("wealth_dev", 100), ("hallucination_train", 700)])
    def test_question_files(self, data_folder: Path, file: str, n: int) -> None:
        loaded = load_contrasts(data_folder / "ai_persona" / f"{file}.csv")
        assert len(loaded) == n
        assert loaded.negative_pole == f"anti-{file}"
        assert 0.12 < len(loaded.split()[1]) / n < 0.28

    def test_statement_files(self, data_folder: Path) -> None:
        files = sorted((data_folder / "anthropic_persona").glob("*.jsonl"))
        assert len(files) == 10
        for file in files:
            loaded = load_contrasts(file)
            assert len(loaded) == 700
            assert {contrast.positive for contrast in loaded.contrasts} == {"Yes", "No"}
