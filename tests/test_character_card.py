"""Character cards: what is read of them, from JSON and from handmade PNGs, and a named error for whatever is wrong."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_edge import character_card
from persona_edge.character_card import CharacterCard, load_card, parse_card
from persona_edge.errors import CalibrationError, CharacterCardError

FIELDS = {
    "name": "Bram",
    "description": "{{char}} keeps a lighthouse and tells {{user}} to wipe their boots.",
    "personality": "gruff, exact{{// a note to myself}}",
    "scenario": "A storm.",
    "first_mes": "What do you want, {{User}}?",
    "mes_example": "<START>\n{{user}}: Nice view.\n{{char}}: The lamp needs oil.\nBram: Mind the stairs.",
}
BRAM = CharacterCard(
    "Bram",
    "Bram keeps a lighthouse and tells the visitor to wipe their boots.",
    "gruff, exact",
    ("The lamp needs oil.", "Mind the stairs.", "What do you want?"),
)


def card(version: int = 2, **changes: Any) -> dict[str, Any]:
    return {"spec": f"chara_card_v{version}", "spec_version": f"{version}.0", "data": FIELDS | changes}


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*texts: tuple[bytes, bytes]) -> bytes:
    """A picture of one grey pixel with these tEXt chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(b"\0\x80"))
    chunks = [chunk(b"tEXt", keyword + b"\0" + text) for keyword, text in texts]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixel + chunk(b"IEND", b"")


def hidden(value: object) -> bytes:
    return base64.b64encode(encoded(value))


def parsed(data: bytes) -> CharacterCard:
    return parse_card(data, source="card")


class TestReading:
    @pytest.mark.parametrize("version", [2, 3])
    def test_json_with_placeholders_filled_in(self, version: int) -> None:
        assert parsed(encoded(card(version))) == BRAM

    def test_the_flat_first_version(self) -> None:
        assert parsed(b"\xef\xbb\xbf\n" + encoded(FIELDS)) == BRAM

    def test_a_picture(self, tmp_path: Path) -> None:
        path = tmp_path / "bram.png"
        path.write_bytes(png((b"Comment", b"hello"), (b"chara", hidden(card()))))
        assert load_card(path) == BRAM

    def test_version_3_goes_before_version_2_in_a_picture(self) -> None:
        older, newer = hidden(card(2)), hidden(card(3, nickname="Old Bram"))
        found = parsed(png((b"chara", older), (b"ccv3", newer)))
        assert found.name == "Old Bram"
        assert found.description.startswith("Old Bram keeps")

    def test_base64_may_have_line_breaks(self) -> None:
        assert parsed(png((b"chara", base64.encodebytes(encoded(card()))))) == BRAM

    def test_what_comes_after_the_end_of_a_picture_does_not_matter(self) -> None:
        assert parsed(png((b"chara", hidden(card()))) + b"more") == BRAM

    def test_control_characters_are_left_out(self) -> None:
        found = parsed(encoded(card(name="Br\x1bam\n the\ud800 Keeper", description="a\x00b")))
        assert (found.name, found.description) == ("Bram the Keeper", "ab")

    def test_a_name_with_backslashes_is_only_text(self) -> None:
        assert parsed(encoded(card(name=r"\1\g<0>"))).description.startswith(r"\1\g<0> keeps")


PICTURE = png((b"chara", hidden(card())))
BAD = {
    "empty": (b"", "neither a PNG nor a JSON object"),
    "text": (b"Bram is gruff", "neither a PNG nor a JSON object"),
    "array": (b"[1]", "neither a PNG nor a JSON object"),
    "jpeg": (b"\xff\xd8\xff\xe0", "neither a PNG nor a JSON object"),
    "zip": (b"PK\x03\x04....", "CHARX"),
    "half JSON": (encoded(card())[:-5], "malformed JSON"),
    "deep JSON": (b'{"a":' * 100_000, "malformed JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "malformed JSON"),
    "not UTF-8": (b'{"name": "\xff"}', "not UTF-8"),
    "other spec": (encoded({"spec": "lorebook_v3", "data": {}}), "'spec' is 'lorebook_v3'"),
    "odd spec": (encoded({"spec": [["x"]], "data": {}}), "'spec' is of type list"),
    "data without spec": (encoded({"data": FIELDS}), "'spec' is None"),
    "data is a list": (encoded({"spec": "chara_card_v2", "data": []}), "'data' is of type list"),
    "no data": (encoded({"spec": "chara_card_v2"}), "'data' is of type NoneType"),
    "no name": (encoded(card(name=" \n")), "the character has no name"),
    "name of another type": (encoded(card(name=7)), "'name' is of type int"),
    "long name": (encoded(card(name="x" * 65)), "the name has 65 characters"),
    "long field": (encoded(card(personality="x" * 200_001)), "'personality' has 200001 characters"),
    "nothing said": (encoded({"name": "Bram"}), "nothing is said about Bram"),
    "picture without a card": (png((b"Title", b"x")), "no tEXt chunk called ccv3 or chara"),
    "bad base64": (png((b"chara", b"****")), "not valid base64"),
    "base64 of an array": (png((b"chara", hidden([1]))), "a JSON list"),
    "cut in a chunk": (PICTURE[:200], "ends within the chunk at byte"),
    "cut in a header": (PICTURE[:35], "ends within a chunk's header"),
    "chunk longer than the file": (PICTURE[:8] + b"\xff\xff\xff\xfftEXt", "ends within the chunk at byte 8"),
    "wrong checksum": (PICTURE.replace(b"chara\0e", b"chara\0f", 1), "wrong checksum"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(CharacterCardError) as caught:
        parsed(data)
    assert str(caught.value).startswith("card: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CalibrationError)


def test_sizes_are_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(character_card, "MAX_JSON_BYTES", 300)
    for data in (encoded(card()), png((b"chara", hidden(card())))):
        with pytest.raises(CharacterCardError, match="takes more than"):
            parsed(data)
    monkeypatch.setattr(character_card, "MAX_CARD_BYTES", 100)
    with pytest.raises(CharacterCardError, match="larger than"):
        parsed(PICTURE)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CharacterCardError, match=r"none\.png: cannot be read: No such file"):
        load_card(tmp_path / "none.png")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(PICTURE) - 1), st.binary(min_size=1, max_size=4))
def test_no_damage_makes_anything_but_a_card_or_its_error(at: int, replacement: bytes) -> None:
    damaged = PICTURE[:at] + replacement + PICTURE[at + len(replacement) :]
    with contextlib.suppress(CharacterCardError):
        assert parsed(damaged) == BRAM  # the text is checksummed: damage elsewhere does not concern it
