"""The front of a mask pack: fixed preamble and JSON header, as typed values. No positions are decoded here.

    preamble (48 bytes)   magic, version, header length, SHA-256 of the header
    header (JSON)         architecture, tensors, sketch, poles, personas, report, section table
    sections              back to back; pack_header knows where they lie, maskpack what they hold

`parse_header` is the one place where the rules for the header are kept: the writer runs it over what it has built.
The format, byte for byte: docs/pack-format.md.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from persona_edge.masks import Granularity, TensorShape
from persona_edge.pack_errors import (
    NotAPackError,
    PackChecksumError,
    PackCompositionError,
    PackGateError,
    PackHeaderMalformedError,
    PackHeaderTooLargeError,
    PackIdentityError,
    PackPlaneError,
    PackSectionTableError,
    PackSketchError,
    PackTruncatedError,
    PackVersionError,
)
from persona_edge.pack_json import as_array, as_integer, as_members, as_name, as_object, as_text, parse_json, short
from persona_edge.tensor_runs import expand_tensors

__all__ = [
    "HEADER_LIMIT",
    "MAGIC",
    "PREAMBLE_SIZE",
    "VERSION",
    "VERSION_WITH_STRENGTHS",
    "Header",
    "PlaneEntry",
    "PoleEntry",
    "SectionInfo",
    "check_gate",
    "front_size",
    "listed_poles",
    "parse_header",
    "preamble",
    "units_per_tensor",
]

MAGIC = b"\x89MPK\r\n\x1a\n"
VERSION = 2  # what is written
VERSION_WITH_STRENGTHS = 3  # what is written where a persona takes less than the whole of a pole
READABLE_VERSIONS = (1, VERSION, VERSION_WITH_STRENGTHS)
HEADER_LIMIT = 16 * 2**20  # bytes
GATE_LIMIT = 65504.0  # the largest half-precision number, the type of the scales that gates multiply
_PREAMBLE = struct.Struct("<8sII32s")
PREAMBLE_SIZE = _PREAMBLE.size


@dataclass(frozen=True)
class SectionInfo:
    """Where a section lies: `offset` counts bytes from the start of the file, `sha256` is lower-case hex."""

    name: str
    kind: str
    offset: int
    n_bytes: int
    sha256: str

    def check(self, data: bytes) -> bytes:
        """`data`, which was read as this section; PackTruncatedError or PackChecksumError when it is not that."""
        if len(data) < self.n_bytes:
            lacking = self.n_bytes - len(data)
            raise PackTruncatedError(
                f"section {self.name!r} at byte {self.offset} lacks {lacking} of {self.n_bytes} bytes"
            )
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise PackChecksumError(f"section {self.name!r} at byte {self.offset} is damaged (SHA-256 differs)")
        return data


@dataclass(frozen=True)
class PlaneEntry:
    """What the header says of a plane; `section` is an index into the section table."""

    gate: float
    granularity: Granularity
    n_positions: int
    section: int


@dataclass(frozen=True)
class PoleEntry:
    """What the header says of a pole."""

    name: str
    axis: str
    planes: tuple[PlaneEntry, ...]


@dataclass(frozen=True)
class Header:
    """A valid header. `sections[0]` is the sketch, the others are the planes in the order of the poles.

    `version` is the pack's format: it says which code the planes of groups have. `strengths` has the personas that take
    less than the whole of some pole.
    """

    version: int
    architecture: str
    tensors: tuple[TensorShape, ...]
    n_sketch_positions: int
    poles: tuple[PoleEntry, ...]
    personas: Mapping[str, tuple[str, ...]]
    strengths: Mapping[str, tuple[float, ...]]
    report: Mapping[str, Any]
    sections: tuple[SectionInfo, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the whole pack in bytes."""
        return self.sections[-1].offset + self.sections[-1].n_bytes


def units_per_tensor(tensors: Sequence[TensorShape], granularity: Granularity) -> list[int]:
    """How many units each tensor has; none where its columns do not divide into groups."""
    return [t.n_units(granularity) if t.n_columns % granularity == 0 else 0 for t in tensors]


def preamble(header: bytes, version: int) -> bytes:
    """The 48 bytes that go before `header` in a pack of `version`."""
    if len(header) > HEADER_LIMIT:
        raise PackHeaderTooLargeError(f"the header has {len(header)} bytes, at most {HEADER_LIMIT} are allowed")
    return _PREAMBLE.pack(MAGIC, version, len(header), hashlib.sha256(header).digest())


def front_size(prefix: bytes) -> int:
    """Bytes of preamble and header together, from the first `PREAMBLE_SIZE` bytes of a pack.

    Raises NotAPackError, PackVersionError, PackTruncatedError, PackHeaderTooLargeError.
    """
    return PREAMBLE_SIZE + _read_preamble(prefix)[1]


def parse_header(prefix: bytes) -> Header:
    """The header of a pack of which `prefix` holds the first `front_size` bytes or more.

    Raises the subclass of MalformedPackError that fits; the message lacks the name of the file.
    """
    version, n_bytes, digest = _read_preamble(prefix)
    data = prefix[PREAMBLE_SIZE : PREAMBLE_SIZE + n_bytes]
    if len(data) < n_bytes:
        raise PackTruncatedError(f"the header ends after {len(data)} of {n_bytes} bytes")
    if hashlib.sha256(data).digest() != digest:
        raise PackChecksumError("the header is damaged (SHA-256 differs)")
    return _header(parse_json(data), version, PREAMBLE_SIZE + n_bytes)


def check_gate(gate: object, where: str) -> float:
    """`gate` if it is a finite float that half precision can hold; PackGateError otherwise."""
    if type(gate) is not float or not math.isfinite(gate) or abs(gate) > GATE_LIMIT:
        raise PackGateError(f"{where}: gate {short(gate)} is not a finite decimal number up to {GATE_LIMIT:g}")
    return gate


def _read_preamble(prefix: bytes) -> tuple[int, int, bytes]:
    """Version, length of the header, SHA-256 of the header."""
    if prefix[: len(MAGIC)] != MAGIC[: len(prefix)] or not prefix:
        raise NotAPackError("not a mask pack (the first 8 bytes differ)")
    if len(prefix) < PREAMBLE_SIZE:
        raise PackTruncatedError(f"ends after {len(prefix)} bytes, within the first {PREAMBLE_SIZE}")
    _, version, n_bytes, digest = _PREAMBLE.unpack_from(prefix)
    if version not in READABLE_VERSIONS:
        known = ", ".join(map(str, READABLE_VERSIONS))
        raise PackVersionError(f"format version {version}, this reader knows versions {known}")
    if n_bytes > HEADER_LIMIT:
        raise PackHeaderTooLargeError(f"the header claims {n_bytes} bytes, at most {HEADER_LIMIT} are allowed")
    return version, n_bytes, digest


def _header(value: object, version: int, end: int) -> Header:
    keys = ("architecture", "personas", "poles", "report", "sections", "sketch", "tensors")
    architecture, listed, poles, report, sections, sketch, tensors = as_members(value, "header", *keys)
    personas, strengths = _personas(listed, version)
    header = Header(
        version=version,
        architecture=as_name(architecture, "architecture", PackIdentityError),
        tensors=expand_tensors(tensors),
        n_sketch_positions=_sketch_positions(sketch),
        poles=tuple(_pole(p, f"poles[{i}]") for i, p in enumerate(as_array(poles, "poles"))),
        personas=personas,
        strengths=strengths,
        report=as_object(report, "report"),
        sections=_sections(sections, end),
    )
    _check_composition(header)
    _check_sections(header)
    _check_position_counts(header)
    return header


def _pole(value: object, where: str) -> PoleEntry:
    axis, name, planes = as_members(value, where, "axis", "name", "planes")
    return PoleEntry(
        name=as_name(name, f"{where}.name", PackCompositionError),
        axis=as_name(axis, f"{where}.axis", PackCompositionError),
        planes=tuple(_plane(p, f"{where}.planes[{i}]") for i, p in enumerate(as_array(planes, f"{where}.planes"))),
    )


def _plane(value: object, where: str) -> PlaneEntry:
    gate, granularity, n_positions, section = as_members(value, where, "gate", "granularity", "positions", "section")
    gate = check_gate(gate, where)
    n_positions = as_integer(n_positions, f"{where}.positions")
    section = as_integer(section, f"{where}.section")
    if granularity == 1 and type(granularity) is int:
        return PlaneEntry(gate, 1, n_positions, section)
    if granularity == 32 and type(granularity) is int:
        return PlaneEntry(gate, 32, n_positions, section)
    raise PackPlaneError(f"{where}: granularity {short(granularity)} is neither 1 nor 32")


def listed_poles(poles: Sequence[str], strengths: Sequence[float] | None) -> list[object]:
    """A persona's poles as the header lists them: by name, and with its strength where that is not 1."""
    if strengths is None:
        return list(poles)
    if len(strengths) != len(poles):
        raise PackCompositionError(f"{len(strengths)} strengths for the {len(poles)} poles {', '.join(poles)}")
    listed = zip(poles, map(float, strengths), strict=True)
    return [name if strength == 1 else [name, strength] for name, strength in listed]


def _personas(value: object, version: int) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[float, ...]]]:
    """The poles of every persona, and the strengths of those that take less than the whole of some pole."""
    personas: dict[str, tuple[str, ...]] = {}
    strengths: dict[str, tuple[float, ...]] = {}
    for index, item in enumerate(as_array(value, "personas")):
        where = f"personas[{index}]"
        pair = as_array(item, where)
        if len(pair) != 2:
            raise PackHeaderMalformedError(f"{where} is not a name and a list of poles")
        name = as_name(pair[0], where, PackCompositionError)
        if name in personas:
            raise PackCompositionError(f"persona {name!r} is given twice")
        parts = [_part(part, version, where) for part in as_array(pair[1], where)]
        personas[name] = tuple(pole for pole, _ in parts)
        if any(strength != 1 for _, strength in parts):
            strengths[name] = tuple(strength for _, strength in parts)
    if (version == VERSION_WITH_STRENGTHS) != bool(strengths):
        raise PackCompositionError(f"no persona has strengths, as in version {VERSION_WITH_STRENGTHS} some has")
    return personas, strengths


def _part(value: object, version: int, where: str) -> tuple[str, float]:
    """A pole's name and strength, from its name alone or both."""
    if version != VERSION_WITH_STRENGTHS or not isinstance(value, list):
        return as_name(value, where, PackCompositionError), 1.0
    if len(value) != 2:
        raise PackHeaderMalformedError(f"{where} has a part that is neither a pole nor a pole and a strength")
    strength = value[1]
    if type(strength) is not float or not 0 < strength < 1:  # the whole pole is spelled by its name alone
        raise PackCompositionError(f"{where}: strength {short(strength)} is not a decimal number between 0 and 1")
    return as_name(value[0], where, PackCompositionError), strength


def _sketch_positions(value: object) -> int:
    n_positions, section = as_members(value, "sketch", "positions", "section")
    if as_integer(section, "sketch.section") != 0:
        raise PackSectionTableError(f"the sketch is section {section}, it has to be section 0")
    return as_integer(n_positions, "sketch.positions")


def _sections(value: object, end: int) -> tuple[SectionInfo, ...]:
    sections = []
    for index, item in enumerate(as_array(value, "sections")):
        where = f"sections[{index}]"
        kind, length, name, offset, sha256 = as_members(item, where, "kind", "length", "name", "offset", "sha256")
        kind, name, sha256 = as_text(kind, where), as_text(name, where), as_text(sha256, where)
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise PackSectionTableError(f"{where}: sha256 is not 64 lower-case hexadecimal digits")
        offset, length = as_integer(offset, where), as_integer(length, where)
        sections.append(SectionInfo(name, kind, offset, length, sha256))
    expected = 0
    for index, section in enumerate(sections):
        if section.offset != expected:
            found = "overlaps the one before" if section.offset < expected else "leaves a hole before it"
            raise PackSectionTableError(f"section {index} {found}: offset {section.offset}, not {expected}")
        expected += section.n_bytes
    return tuple(replace(section, offset=end + section.offset) for section in sections)


def _check_composition(header: Header) -> None:
    poles = [pole.name for pole in header.poles]
    if not poles or not header.personas:
        raise PackCompositionError(f"{len(poles)} poles and {len(header.personas)} personas; a pack has both")
    if len(set(poles)) < len(poles):
        raise PackCompositionError(f"pole {next(p for p in poles if poles.count(p) > 1)!r} is given twice")
    for pole in header.poles:
        if not pole.planes:
            raise PackCompositionError(f"pole {pole.name!r} has no planes")
    for persona, parts in header.personas.items():
        if not parts or len(set(parts)) < len(parts):
            raise PackCompositionError(f"persona {persona!r} is composed of no poles, or of one twice")
        unknown = [part for part in parts if part not in poles]
        if unknown:
            raise PackCompositionError(f"persona {persona!r} names pole {unknown[0]!r}, which the pack has not")


def _check_sections(header: Header) -> None:
    expected = [("sketch", "sketch")]
    for pole in header.poles:
        for index, plane in enumerate(pole.planes):
            if plane.section != len(expected):
                raise PackSectionTableError(
                    f"plane {index} of pole {pole.name!r} is section {plane.section}, it has to be {len(expected)}"
                )
            expected.append(("plane", f"{pole.name}/{index}"))
    found = [(section.kind, section.name) for section in header.sections]
    if found != expected:
        raise PackSectionTableError(
            f"the sections do not match the poles: {len(found)} found, {len(expected)} expected"
        )


def _check_position_counts(header: Header) -> None:
    n_weights = sum(units_per_tensor(header.tensors, 1))
    n_groups = sum(units_per_tensor(header.tensors, 32))
    if not 0 < header.n_sketch_positions <= n_weights:
        raise PackSketchError(f"the sketch has {header.n_sketch_positions} samples of {n_weights} weights")
    for pole in header.poles:
        for index, plane in enumerate(pole.planes):
            limit = n_weights if plane.granularity == 1 else n_groups
            if not 0 < plane.n_positions <= limit:
                raise PackPlaneError(
                    f"plane {index} of pole {pole.name!r} has {plane.n_positions} of {limit} positions"
                )
