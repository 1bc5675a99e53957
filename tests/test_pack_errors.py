"""Every malformed pack has its own named error."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from persona_edge import pack_errors
from persona_edge.errors import PackError
from persona_edge.maskpack import PREAMBLE_SIZE, MaskPack, front_size
from persona_edge.pack_errors import (
    MalformedPackError,
    NotAPackError,
    PackChecksumError,
    PackCompositionError,
    PackGateError,
    PackHeaderMalformedError,
    PackHeaderNotCanonicalError,
    PackHeaderTooLargeError,
    PackIdentityError,
    PackPlaneError,
    PackSectionTableError,
    PackSketchError,
    PackTruncatedError,
    PackUnreadableError,
    PackVersionError,
)

GOLDEN_1 = Path(__file__).parent / "golden" / "v1.maskpack"
GOLDEN = Path(__file__).parent / "golden" / "v2.maskpack"
GOLDEN_3 = Path(__file__).parent / "golden" / "v3.maskpack"
Header = dict[str, Any]
Edit = Callable[[Header], object]


def golden() -> bytes:
    """The bytes that the cases are made from; test_maskpack.py tells what they hold."""
    return GOLDEN.read_bytes()


def forged(edit: Callable[[Header], object], sections: bytes | None = None) -> bytes:
    """The golden pack with an edited header, and all checksums of it right."""
    data = golden()
    end = front_size(data[:PREAMBLE_SIZE])
    header = json.loads(data[PREAMBLE_SIZE:end])
    edit(header)
    spelled = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return sealed(spelled, data[end:] if sections is None else sections)


def with_strengths(part: object) -> bytes:
    """The golden pack of version 3 with another first part of persona EN, and the checksum of the header right."""
    data = GOLDEN_3.read_bytes()
    end = front_size(data[:PREAMBLE_SIZE])
    header = json.loads(data[PREAMBLE_SIZE:end])
    header["personas"][1][1][0] = part
    spelled = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return sealed(spelled, data[end:], version=3)


def without_strengths() -> bytes:
    """The golden pack of version 2, said to be of version 3."""
    data = golden()
    end = front_size(data[:PREAMBLE_SIZE])
    return sealed(data[PREAMBLE_SIZE:end], data[end:], version=3)


def sealed(header: bytes, sections: bytes = b"", version: int = 2) -> bytes:
    return (
        b"\x89MPK\r\n\x1a\n"
        + struct.pack("<II", version, len(header))
        + hashlib.sha256(header).digest()
        + header
        + sections
    )


def spelled_otherwise(old: bytes, new: bytes) -> bytes:
    """The golden pack with part of the header's text replaced, and the header's checksum right."""
    data = golden()
    end = front_size(data[:PREAMBLE_SIZE])
    assert old in data[PREAMBLE_SIZE:end]
    return sealed(data[PREAMBLE_SIZE:end].replace(old, new, 1), data[end:])


def section_replaced(index: int, section: bytes) -> bytes:
    """The golden pack with other bytes in one section, and the section table right."""
    data = golden()
    parts = [data[s.offset : s.offset + s.n_bytes] for s in MaskPack.from_bytes(data).sections()]
    parts[index] = section

    def retable(header: Header) -> None:
        offset = 0
        for entry, part in zip(header["sections"], parts, strict=True):
            entry.update(offset=offset, length=len(part), sha256=hashlib.sha256(part).hexdigest())
            offset += len(part)

    return forged(retable, b"".join(parts))


def put(*path: str | int, value: object) -> Callable[[Header], None]:
    """An edit that puts `value` at a path of keys and indices."""

    def edit(header: Header) -> None:
        target: Any = header
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return edit


def section_bytes(index: int) -> bytes:
    section = MaskPack.open(GOLDEN).sections()[index]
    return golden()[section.offset : section.offset + section.n_bytes]


def row_out_of_range() -> bytes:
    """The golden pack with plane I/0's last row of output.weight, 95, one further: its lowest bit is bit 21."""
    section = bytearray(section_bytes(1))
    section[21 // 8] |= 1 << 21 % 8
    return section_replaced(1, bytes(section))


def position_out_of_range_in_version_1() -> bytes:
    """The golden pack of version 1 with plane I/0's last gap of output.weight one longer.

    Its bytes: count exponents, count fields, then 3 remainders of 5 bits and 2 of 6. The last remainder begins at bit
    21 of these and is 62, for position 191 = 2 * 64 + 62 + 1; its lowest bit makes it 192.
    """
    data = bytearray(GOLDEN_1.read_bytes())
    section = MaskPack.open(GOLDEN_1).sections()[1]
    data[section.offset + 2 + 21 // 8] |= 1 << 21 % 8
    header = data[PREAMBLE_SIZE : front_size(bytes(data))]
    digest = hashlib.sha256(data[section.offset : section.offset + section.n_bytes]).hexdigest()
    header = header.replace(section.sha256.encode(), digest.encode())
    return sealed(bytes(header), bytes(data[front_size(bytes(data)) :]), version=1)


GATE = ("poles", 0, "planes", 0, "gate")
PLANE = ("poles", 0, "planes", 0)
BAD_HEADERS: dict[type[PackError], dict[str, tuple[str, Edit]]] = {
    PackHeaderMalformedError: {
        "unknown key": ("see \\['x'\\]", put("x", value=1)),
        "missing key": ("see \\['report'\\]", lambda h: h.pop("report")),
        "report is a list": ("report is not a JSON object", put("report", value=[])),
        "negative length": ("whole number", put("sections", 0, "length", value=-1)),
        "length beyond all": ("whole number", put("sections", 4, "length", value=2**70)),
        "persona without a list": ("not a name and a list", put("personas", 1, value=["IN"])),
        "name is a number": ("string", put("poles", 0, "name", value=7)),
        "gate is NaN": ("NaN is not a number", put(*GATE, value=math.nan)),
        "gate is infinite": ("-Infinity is not a number", put(*GATE, value=-math.inf)),
    },
    PackSectionTableError: {
        "hole": (
            "section 2 leaves a hole",
            lambda h: put("sections", 2, "offset", value=h["sections"][2]["offset"] + 1)(h),
        ),
        "overlap": ("section 1 overlaps", put("sections", 1, "offset", value=1)),
        "first section not at the start": ("section 0 leaves a hole", put("sections", 0, "offset", value=1)),
        "bad digest": ("64 lower-case", put("sections", 1, "sha256", value="A" * 64)),
        "unknown kind": ("do not match the poles", put("sections", 1, "kind", value="code")),
        "section of another name": ("do not match the poles", put("sections", 1, "name", value="X/0")),
        "section missing": ("5 found, 6 expected", lambda h: h["sections"].pop()),
        "plane in the wrong section": (
            "plane 0 of pole 'I' is section 2, it has to be 1",
            put(*PLANE, "section", value=2),
        ),
        "sketch in the wrong section": ("has to be section 0", put("sketch", "section", value=1)),
    },
    PackTruncatedError: {
        "length of exabytes": (r"ends after \d+ of 9007199254\d+ bytes", put("sections", 5, "length", value=2**53)),
    },
    PackIdentityError: {
        "no architecture": ("architecture: the name ''", put("architecture", value="")),
        "no tensors": ("0 tensors", put("tensors", value=[])),
        "tensor twice": ("listed twice", lambda h: h["tensors"].append(["output.weight", 96, 64])),
    },
    PackCompositionError: {
        "no personas": ("4 poles and 0 personas", put("personas", value=[])),
        "no poles": ("0 poles", put("poles", value=[])),
        "persona of an unknown pole": (
            "persona 'IN' names pole 'Q', which the pack has not",
            put("personas", 0, 1, 1, value="Q"),
        ),
        "persona of no poles": ("composed of no poles", put("personas", 0, 1, value=[])),
        "persona of one pole twice": ("or of one twice", put("personas", 0, 1, value=["I", "I"])),
        "persona twice": ("persona 'IN' is given twice", put("personas", 1, 0, value="IN")),
        "pole twice": ("pole 'I' is given twice", put("poles", 1, "name", value="I")),
        "pole without planes": ("pole 'I' has no planes", put("poles", 0, "planes", value=[])),
        "name with an escape sequence": (
            "'I\\\\x1b\\[2J' is not 1 to 64 printable",
            put("poles", 0, "name", value="I\x1b[2J"),
        ),
        "name that turns the text around": ("printable", put("poles", 0, "axis", value="a\u202eb")),
        "name too long": ("1 to 64", put("personas", 0, 0, value="x" * 65)),
        "name with outer spaces": ("' IN' is not", put("personas", 0, 0, value=" IN")),
        "name in another normal form": ("normal form C", put("personas", 0, 0, value="fu\u0308r")),
    },
    PackGateError: {
        "gate is text": ("gate '0' is not a finite", put(*GATE, value="0")),
        "gate is null": ("gate None", put(*GATE, value=None)),
        "gate is whole": ("gate 0 is not", put(*GATE, value=0)),
        "gate is true": ("gate True", put(*GATE, value=True)),
        "gate too large": ("gate 1000000.0", put(*GATE, value=1e6)),
    },
    PackPlaneError: {
        "granularity 16": ("granularity 16", put(*PLANE, "granularity", value=16)),
        "granularity true": ("granularity True", put(*PLANE, "granularity", value=True)),
        "plane without positions": ("plane 0 of pole 'I' has 0 of 12704 positions", put(*PLANE, "positions", value=0)),
        "more positions than units": ("has 12705 of 12704 positions", put(*PLANE, "positions", value=12705)),
        "another number of positions": (
            "section 'I/0' at byte \\d+: 5 positions where 6 were announced",
            put(*PLANE, "positions", value=6),
        ),
        "other granularity": ("section 'I/0' at byte", put(*PLANE, "granularity", value=1)),
    },
    PackSketchError: {
        "sketch without samples": ("0 samples of 406528 weights", put("sketch", "positions", value=0)),
        "sketch with more samples than weights": ("406529 samples", put("sketch", "positions", value=406529)),
    },
}
BAD_BYTES: dict[type[PackError], dict[str, tuple[str, Callable[[], bytes]]]] = {
    PackCompositionError: {
        "strength 0": ("strength 0.0 is not a decimal number between 0 and 1", partial(with_strengths, ["E", 0.0])),
        "strength 1 spelled out": ("strength 1.0", partial(with_strengths, ["E", 1.0])),
        "strength is whole": ("strength 1 is", partial(with_strengths, ["E", 1])),
        "strength is text": ("strength '0.5'", partial(with_strengths, ["E", "0.5"])),
        "strength of an unknown pole": ("names pole 'Q'", partial(with_strengths, ["Q", 0.5])),
        "version 3 without a strength": ("no persona has strengths", without_strengths),
    },
    NotAPackError: {
        "empty": ("not a mask pack", lambda: b""),
        "other magic": ("not a mask pack", lambda: b"GGUF" + bytes(100)),
        "text-mode transfer": ("not a mask pack", lambda: golden().replace(b"\r\n", b"\n")),
    },
    PackTruncatedError: {
        "magic alone": ("ends after 8 bytes", lambda: b"\x89MPK\r\n\x1a\n"),
        "header cut": ("ends after 52 of", lambda: golden()[:100]),
        "section cut": (r"ends after \d+ of \d+ bytes", lambda: golden()[:-1]),
    },
    PackVersionError: {
        "version 0": ("version 0, this reader knows versions 1, 2, 3", lambda: sealed(b"{}", version=0)),
        "version 4": ("version 4, this reader knows versions 1, 2, 3", lambda: sealed(b"{}", version=4)),
    },
    PackHeaderTooLargeError: {
        "huge header": (
            "claims 4294967295 bytes, at most 16777216",
            lambda: golden()[:12] + b"\xff\xff\xff\xff" + bytes(40),
        ),
    },
    PackChecksumError: {
        "header checksum": ("the header is damaged", lambda: golden().replace(b"llama", b"lIama")),
        "section checksum": ("section 'S/0' at byte \\d+ is damaged", lambda: golden()[:-1] + b"\x55"),
    },
    PackHeaderMalformedError: {
        "not UTF-8": ("not JSON in UTF-8", lambda: sealed(b'{"a":"\xff"}')),
        "not JSON": ("not JSON in UTF-8", lambda: sealed(b"{")),
        "no header": ("not JSON in UTF-8", lambda: sealed(b"")),
        "not an object": ("header is not a JSON object", lambda: sealed(b"[]")),
        "nested too deep": ("not JSON in UTF-8", lambda: sealed(b"[" * 10**6)),
        "number too long": ("not JSON in UTF-8", lambda: sealed(b"1" * 10**5)),
        "NaN": ("NaN is not a number", lambda: spelled_otherwise(b"0.003", b"NaN")),
        "strength in version 2": ("string", partial(forged, put("personas", 0, 1, 0, value=["I", 0.5]))),
        "pole with a strength too many": ("neither a pole nor a pole and", partial(with_strengths, ["E", 0.5, 0.5])),
        "key twice": (
            "key 'architecture' is given twice",
            lambda: spelled_otherwise(b'{"architecture"', b'{"architecture":"x","architecture"'),
        ),
    },
    PackHeaderNotCanonicalError: {
        "unsorted": ("not canonical", lambda: spelled_otherwise(b'"length":', b'"zlength":')),
        "spaces": ("not canonical", lambda: spelled_otherwise(b":0.003", b": 0.003")),
        "long number": ("not canonical", lambda: spelled_otherwise(b"0.003", b"0.0030")),
        "infinite number": ("not a JSON value", lambda: spelled_otherwise(b"0.003", b"1e999")),
        "escaped letter": ("not canonical", lambda: spelled_otherwise(b"llama", b"\\u006clama")),
        "half a surrogate pair": ("not a JSON value", lambda: spelled_otherwise(b"llama", b"\\ud800")),
    },
    PackSectionTableError: {
        "trailing byte": ("1 bytes after the last section, from byte", lambda: golden() + b"\0"),
    },
    PackPlaneError: {
        "empty plane section": ("section 'I/0' at byte", lambda: section_replaced(1, b"")),
        "plane with a byte more": ("bits after the last part", lambda: section_replaced(1, section_bytes(1) + b"\0")),
        "row out of range": ("section 'I/0' at byte \\d+: a set has the member 96 of 96", row_out_of_range),
        "position out of range in version 1": ("position 192 of 192 units", position_out_of_range_in_version_1),
    },
    PackSketchError: {
        "empty sketch section": ("too few for 172 signs", lambda: section_replaced(0, b"")),
        "sign padding": (
            "padding of the signs",
            lambda: section_replaced(0, section_bytes(0)[:21] + b"\xff" + section_bytes(0)[22:]),
        ),
        "sketch positions cut": ("section 'sketch' at byte", lambda: section_replaced(0, section_bytes(0)[:-1])),
    },
}
MALFORMED = [
    pytest.param(error, message, make, id=name)
    for error, group in BAD_BYTES.items()
    for name, (message, make) in group.items()
] + [
    pytest.param(error, message, partial(forged, edit), id=name)
    for error, group in BAD_HEADERS.items()
    for name, (message, edit) in group.items()
]


def test_the_forger_changes_nothing_by_itself() -> None:
    assert forged(lambda header: None) == golden()
    assert section_replaced(0, section_bytes(0)) == golden()


@pytest.mark.parametrize(("error", "message", "make"), MALFORMED)
def test_malformed(error: type[PackError], message: str, make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "bad.maskpack"
    path.write_bytes(make())
    with pytest.raises(MalformedPackError, match=message) as caught:
        MaskPack.open(path).load()
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith(f"; {caught.value.remedy}")
    assert text.isprintable()
    assert len(text) < 300 + len(str(path))
    with pytest.raises(error):
        MaskPack.from_bytes(path.read_bytes()).load()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PackUnreadableError, match=r"absent\.maskpack: cannot be read: No such file"):
        MaskPack.open(tmp_path / "absent.maskpack")
    with pytest.raises(PackUnreadableError, match="Is a directory"):
        MaskPack.open(tmp_path)


def test_every_error_is_tested() -> None:
    leaves = {getattr(pack_errors, name) for name in pack_errors.__all__ if name.endswith("Error")}
    leaves -= {pack_errors.MalformedPackError, pack_errors.PackHeaderError}
    assert leaves == BAD_BYTES.keys() | BAD_HEADERS.keys() | {PackUnreadableError}
