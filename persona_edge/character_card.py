"""Character cards, as chat applications exchange them: a JSON object, alone or hidden in a PNG.

Read are the versions 2 and 3 of the format (`"spec": "chara_card_v2"` or `"chara_card_v3"`) and the flat first one that
they grew from. In a PNG, a tEXt chunk holds the JSON in base64: `ccv3`, or else `chara`. Of a card only what
describes how the character *is* gets used: name, description, personality, and what it says in the examples.

A card comes from strangers: sizes are bounded before anything is decoded, and whatever is wrong is a CharacterCardError
that names the file and the problem.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from persona_edge.errors import CharacterCardError
from persona_edge.terminal_text import printable

__all__ = ["MAX_CARD_BYTES", "MAX_FIELD_CHARACTERS", "MAX_JSON_BYTES", "CharacterCard", "load_card", "parse_card"]

MAX_CARD_BYTES: Final = 64 * 2**20
MAX_JSON_BYTES: Final = 8 * 2**20
MAX_FIELD_CHARACTERS: Final = 200_000
MAX_NAME_CHARACTERS: Final = 64

_SPECS: Final = ("chara_card_v2", "chara_card_v3")
_KEYWORDS: Final = (b"ccv3", b"chara")  # the later version first: a PNG may carry both
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_COMMENT: Final = re.compile(r"\{\{//[^{}]*\}\}")
_CHARACTER: Final = re.compile(r"\{\{char\}\}|<bot>", re.IGNORECASE)
_ADDRESS: Final = re.compile(r",\s*(?:\{\{user\}\}|<user>)(?=\s*[.!?…]|$)", re.IGNORECASE)
_USER: Final = re.compile(r"\{\{user\}\}|<user>", re.IGNORECASE)


@dataclass(frozen=True)
class CharacterCard:
    """A character: every text with placeholders filled in and without control characters, "" where the card has none.

    `sayings` are lines the character speaks in the card's examples and its greeting, in order.
    """

    name: str
    description: str
    personality: str
    sayings: tuple[str, ...]


def load_card(path: str | Path) -> CharacterCard:
    """The character of a JSON or PNG file. Raises CharacterCardError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CARD_BYTES + 1)
    except OSError as error:
        raise CharacterCardError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_card(data, source=str(path))


def parse_card(data: bytes, *, source: str) -> CharacterCard:
    """As `load_card`, from a file's bytes; `source` is what errors call the file."""
    if len(data) > MAX_CARD_BYTES:
        raise CharacterCardError(f"{source}: larger than {MAX_CARD_BYTES // 2**20} MiB; cards are far smaller")
    if data.startswith(_PNG_SIGNATURE):
        data = _card_in_png(data, source)
    elif data.startswith(b"PK\x03\x04"):
        raise CharacterCardError(f"{source}: a zip archive (CHARX); unpack it and give its card.json")
    elif not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        raise CharacterCardError(f"{source}: neither a PNG nor a JSON object; expected a character card V2 or V3")
    return _character(_Fields(source, _json_object(data, source)))


def _card_in_png(data: bytes, source: str) -> bytes:
    """The JSON that the PNG carries."""
    texts: dict[bytes, bytes] = {}
    for kind, body in _chunks(data, source):
        keyword, _, text = body.partition(b"\0")
        if kind == b"tEXt" and keyword in _KEYWORDS:
            texts.setdefault(keyword, text)
    found = next((texts[keyword] for keyword in _KEYWORDS if keyword in texts), None)
    if found is None:
        raise CharacterCardError(f"{source}: a picture without a character: no tEXt chunk called ccv3 or chara")
    if len(found) > 4 * MAX_JSON_BYTES // 3 + 4:
        raise CharacterCardError(f"{source}: its character takes more than {MAX_JSON_BYTES // 2**20} MiB")
    try:
        return base64.b64decode(b"".join(found.split()), validate=True)
    except binascii.Error as error:
        raise CharacterCardError(f"{source}: the character in the picture is not valid base64 ({error})") from error


def _chunks(data: bytes, source: str) -> Iterator[tuple[bytes, bytes]]:
    """Type and body of the tEXt chunks of a PNG, once their checksum is right."""
    at = len(_PNG_SIGNATURE)
    while at < len(data):
        if at + 8 > len(data):
            raise CharacterCardError(
                f"{source}: the picture ends within a chunk's header, at byte {at}; fetch it again"
            )
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise CharacterCardError(f"{source}: the picture ends within the chunk at byte {at}; fetch it again")
        if kind == b"tEXt":
            if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise CharacterCardError(f"{source}: the text chunk at byte {at} has a wrong checksum; fetch it again")
            yield kind, data[at + 8 : end]
        if kind == b"IEND":
            return
        at = end + 4


def _json_object(data: bytes, source: str) -> Mapping[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        raise CharacterCardError(f"{source}: its character takes more than {MAX_JSON_BYTES // 2**20} MiB")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CharacterCardError(f"{source}: its character is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "numbers or nesting out of bounds"
        raise CharacterCardError(f"{source}: its character is malformed JSON ({reason})") from error
    if not isinstance(value, dict):
        raise CharacterCardError(f"{source}: its character is a JSON {type(value).__name__}; expected an object")
    return value


@dataclass(frozen=True)
class _Fields:
    """The object that holds a card's texts."""

    source: str
    fields: Mapping[str, Any]

    def inner(self) -> _Fields:
        """The object under `data` of version 2 and 3; the card itself in version 1."""
        spec = self.fields.get("spec")
        if spec is None and "data" not in self.fields:
            return self
        if spec not in _SPECS:
            given = f"{spec!r:.40}" if isinstance(spec, str | None) else f"of type {type(spec).__name__}"
            raise CharacterCardError(f"{self.source}: 'spec' is {given}; expected {' or '.join(_SPECS)}")
        data = self.fields.get("data")
        if not isinstance(data, dict):
            raise CharacterCardError(f"{self.source}: 'data' is of type {type(data).__name__}; expected an object")
        return _Fields(self.source, data)

    def text(self, key: str) -> str:
        """The string under `key`, "" when there is none."""
        value = self.fields.get(key, "")
        if not isinstance(value, str):
            raise CharacterCardError(f"{self.source}: {key!r} is of type {type(value).__name__}; expected a string")
        if len(value) > MAX_FIELD_CHARACTERS:
            raise CharacterCardError(
                f"{self.source}: {key!r} has {len(value)} characters; expected at most {MAX_FIELD_CHARACTERS}"
            )
        return printable(value).strip()


def _character(card: _Fields) -> CharacterCard:
    fields = card.inner()
    # Version 3 may give a nickname, which then stands for {{char}}.
    name = " ".join((fields.text("nickname") or fields.text("name")).split())
    if not name:
        raise CharacterCardError(f"{card.source}: the character has no name; expected text under 'name'")
    if len(name) > MAX_NAME_CHARACTERS:
        raise CharacterCardError(
            f"{card.source}: the name has {len(name)} characters; shorten it to {MAX_NAME_CHARACTERS}"
        )
    description, personality = (_filled(fields.text(key), name) for key in ("description", "personality"))
    examples = _sayings(_filled(fields.text("mes_example"), name), name)
    greeting = _filled(fields.text("first_mes"), name)
    found = CharacterCard(name, description, personality, (*examples, *([greeting] if greeting else [])))
    if not (description or personality or found.sayings):
        raise CharacterCardError(f"{card.source}: nothing is said about {name}; expected a 'description'")
    return found


def _filled(text: str, name: str) -> str:
    """`text` with its placeholders replaced: the character's name, and what the character calls whom it talks to."""
    text = _COMMENT.sub("", text)
    text = _CHARACTER.sub(lambda _: name, text)
    text = _ADDRESS.sub("", text)  # "Mind the stairs, {{user}}." needs no name
    return _USER.sub("the visitor", text).strip()


def _sayings(examples: str, name: str) -> list[str]:
    """What the character says in a card's example conversations."""
    said = []
    for line in examples.splitlines():
        speaker, colon, text = line.partition(":")
        if colon and speaker.strip().casefold() == name.casefold() and text.strip():
            said.append(text.strip())
    return said
