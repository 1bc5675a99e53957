"""The mask pack: one file that holds personas as bit-packed masks, next to the model they belong to.

`write_pack` makes the file; `MaskPack` is a file that has been read and checked: header rules and the checksums of all
sections when it is opened, the positions of a plane when it is decoded. `fetch_persona` reads one persona from a large
pack by byte ranges. NumPy and the standard library only. The format: docs/pack-format.md; its errors: pack_errors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_edge.bits import entropy_bits
from persona_edge.errors import PersonaNotFoundError
from persona_edge.files import write_atomically
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, composed, match_name
from persona_edge.pack_errors import (
    PackHeaderMalformedError,
    PackSectionTableError,
    PackTruncatedError,
    PackUnreadableError,
    reading,
    writing,
)
from persona_edge.pack_header import (
    PREAMBLE_SIZE,
    VERSION,
    VERSION_WITH_STRENGTHS,
    Header,
    PoleEntry,
    SectionInfo,
    check_gate,
    front_size,
    listed_poles,
    parse_header,
    preamble,
    units_per_tensor,
)
from persona_edge.pack_json import canonical_json, short
from persona_edge.pack_sections import decode_identity, decode_plane, encode_plane, encode_sketch
from persona_edge.tensor_runs import compress_tensors

__all__ = [
    "PACK_SUFFIX",
    "PREAMBLE_SIZE",
    "MaskPack",
    "PackSummary",
    "PlaneSummary",
    "SectionInfo",
    "encode_pack",
    "fetch_persona",
    "front_size",
    "plan_ranges",
    "plane_entropy_bytes",
    "write_pack",
]

PACK_SUFFIX = ".maskpack"
ReadRange = Callable[[int, int], bytes]  # (offset, length) in bytes from the start of the pack
Section = tuple[str, str, bytes]  # kind, name, data


@dataclass(frozen=True)
class PlaneSummary:
    """What one plane costs; `entropy_bound_bytes` is what a memoryless code would need at least for its positions."""

    pole: str
    index: int
    n_bytes: int
    n_positions: int
    entropy_bound_bytes: float


@dataclass(frozen=True)
class PackSummary:
    """What was written, in bytes."""

    n_bytes: int
    n_header_bytes: int
    n_sketch_bytes: int
    planes: tuple[PlaneSummary, ...]


def plane_entropy_bytes(plane: Plane, identity: ModelIdentity) -> float:
    """The sum over all tensors of n H(k / n) in bytes: n units, of which the plane gates k."""
    units = units_per_tensor(identity.tensors, plane.granularity)
    counts = [len(plane.positions.get(tensor.name, ())) for tensor in identity.tensors]
    return sum(entropy_bits(n, k) for n, k in zip(units, counts, strict=True)) / 8


def write_pack(path: Path, personas: PersonaSet) -> PackSummary:
    """Write `personas` as a mask pack: whole or not at all, and the same bytes for the same content.

    Raises a PackError that names what cannot be written, OutputError when the file cannot.
    """
    with writing(str(path)):
        data, summary = encode_pack(personas)
    write_atomically(path, data)
    return summary


def encode_pack(personas: PersonaSet) -> tuple[bytes, PackSummary]:
    """The bytes of the pack, and what they are made of. Raises as `write_pack` does."""
    sections: list[Section] = [("sketch", "sketch", encode_sketch(personas.identity))]
    summaries: list[PlaneSummary] = []
    poles = [_encode_pole(pole, personas.identity, sections, summaries) for pole in personas.poles]
    header = _encode_header(personas, poles, sections)
    front = preamble(header, VERSION_WITH_STRENGTHS if _strengths(personas) else VERSION) + header
    parse_header(front)  # the reader's rules are the writer's rules
    data = b"".join([front, *(section for _, _, section in sections)])
    return data, PackSummary(len(data), len(header), len(sections[0][2]), tuple(summaries))


def plan_ranges(prefix: bytes, persona: str) -> list[tuple[int, int]]:
    """The byte ranges (offset, length), in ascending order, that hold `persona` and the model's sign sketch.

    `prefix` is the first `front_size(first PREAMBLE_SIZE bytes)` bytes of the pack, or more; ranges start after them.
    Ranges that touch are merged. Raises PersonaNotFoundError, or a PackError for a malformed front.
    """
    with reading("pack"):
        header = parse_header(prefix)
    ranges: list[tuple[int, int]] = []
    for section in _sections_of(header, _persona_name(header, persona)):
        if ranges and sum(ranges[-1]) == section.offset:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + section.n_bytes)
        else:
            ranges.append((section.offset, section.n_bytes))
    return ranges


def fetch_persona(read_range: ReadRange, persona: str, source: str = "pack") -> PersonaSet:
    """Only `persona`, its poles and the model's identity, from a pack of which `read_range` returns any part.

    `source` names the pack in messages. Raises PersonaNotFoundError, and every PackError that the bytes read deserve.
    """
    with reading(source):
        front = read_range(0, PREAMBLE_SIZE)
        front += read_range(PREAMBLE_SIZE, front_size(front) - PREAMBLE_SIZE)
        header = parse_header(front)
    name = _persona_name(header, persona)
    ranges = plan_ranges(front, name)
    fetched = [(offset, read_range(offset, length)) for offset, length in ranges]
    with reading(source):
        held = {s: s.check(_part(fetched, s)) for s in _sections_of(header, name)}
        identity = decode_identity(header, held[header.sections[0]])
        poles = tuple(_decode_pole(pole, header, held) for pole in header.poles if pole.name in header.personas[name])
    strengths = {name: header.strengths[name]} if name in header.strengths else {}
    return PersonaSet(identity, poles, {name: header.personas[name]}, header.report, strengths)


class MaskPack:
    """A pack that has been read and checked; planes are decoded when they are asked for, and then kept.

    Arrays that it hands out are read-only.
    """

    def __init__(self, header: Header, data: bytes, source: str) -> None:
        """Use `open` or `from_bytes`. `data` is the whole file; the header has been parsed from it."""
        self._header = header
        self._source = source
        self._poles: dict[str, Pole] = {}
        with reading(source):
            if len(data) < header.n_bytes:
                raise PackTruncatedError(f"ends after {len(data)} of {header.n_bytes} bytes")
            if len(data) > header.n_bytes:
                extra = len(data) - header.n_bytes
                raise PackSectionTableError(f"{extra} bytes after the last section, from byte {header.n_bytes} on")
            self._held = {s: s.check(data[s.offset : s.offset + s.n_bytes]) for s in header.sections}
            self.identity: ModelIdentity = decode_identity(header, self._held[header.sections[0]])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MaskPack:
        """Read and check the file at `path`. Reads no more than its header says that it has."""
        source = os.fspath(path)
        with reading(source):
            try:
                with open(source, "rb") as file:
                    front = file.read(PREAMBLE_SIZE)
                    front += file.read(front_size(front) - PREAMBLE_SIZE)
                    header = parse_header(front)
                    size = min(os.fstat(file.fileno()).st_size, header.n_bytes + 1)
                    data = front + file.read(size - len(front))
            except OSError as error:
                raise PackUnreadableError(f"cannot be read: {error.strerror or error}") from error
        return cls(header, data, source)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "pack") -> MaskPack:
        """Check `data` as a whole pack; `source` names it in messages."""
        with reading(source):
            header = parse_header(data)
        return cls(header, data, source)

    @property
    def personas(self) -> Mapping[str, tuple[str, ...]]:
        """The personas, each with the names of its poles."""
        return self._header.personas

    @property
    def strengths(self) -> Mapping[str, tuple[float, ...]]:
        """How much of each of its poles a persona takes, for those that take less than the whole of some."""
        return self._header.strengths

    @property
    def pole_names(self) -> tuple[str, ...]:
        """The names of all poles."""
        return tuple(pole.name for pole in self._header.poles)

    @property
    def report(self) -> Mapping[str, Any]:
        """The quality report."""
        return self._header.report

    @property
    def version(self) -> int:
        """The version of the format that the pack is in."""
        return self._header.version

    @property
    def n_bytes(self) -> int:
        """Size of the whole pack in bytes."""
        return self._header.n_bytes

    def sections(self) -> tuple[SectionInfo, ...]:
        """What lies where in the file after the header."""
        return self._header.sections

    def pole(self, name: str) -> Pole:
        """The pole called `name`, decoded; PersonaNotFoundError, or PackPlaneError for an impossible plane."""
        if name not in self._poles:
            entries = [pole for pole in self._header.poles if pole.name == name]
            if not entries:
                raise PersonaNotFoundError(f"no pole {short(name)}; this pack has {', '.join(self.pole_names)}")
            with reading(self._source):
                self._poles[name] = _decode_pole(entries[0], self._header, self._held)
        return self._poles[name]

    def resolve(self, persona: str) -> tuple[Pole, ...]:
        """The poles of `persona`, spelled as in the pack, decoded and at its strengths. Raises as `pole` does."""
        if persona not in self.personas:
            raise PersonaNotFoundError(f"no persona {short(persona)}; this pack has {', '.join(self.personas)}")
        return composed([self.pole(name) for name in self.personas[persona]], self.strengths.get(persona))

    def load(self) -> PersonaSet:
        """Everything, decoded."""
        poles = tuple(self.pole(name) for name in self.pole_names)
        return PersonaSet(self.identity, poles, self.personas, self.report, self.strengths)

    def summary(self) -> PackSummary:
        """The sizes that `write_pack` reported. Decodes all planes, for the entropy bound depends on the counts."""
        planes = []
        for entry in self._header.poles:
            for index, (plane, plane_entry) in enumerate(zip(self.pole(entry.name).planes, entry.planes, strict=True)):
                n_bytes = self.sections()[plane_entry.section].n_bytes
                bound = plane_entropy_bytes(plane, self.identity)
                planes.append(PlaneSummary(entry.name, index, n_bytes, plane.n_positions, bound))
        sketch = self.sections()[0]
        return PackSummary(self.n_bytes, sketch.offset - PREAMBLE_SIZE, sketch.n_bytes, tuple(planes))


def _encode_pole(
    pole: Pole, identity: ModelIdentity, sections: list[Section], summaries: list[PlaneSummary]
) -> dict[str, object]:
    """The header's entry for `pole`; appends its planes to `sections` and `summaries`."""
    entries = []
    for index, plane in enumerate(pole.planes):
        where = f"plane {index} of pole {short(pole.name)}"
        data = encode_plane(plane, identity, where)
        entries.append(
            {
                "gate": check_gate(float(plane.gate), where),
                "granularity": plane.granularity,
                "positions": plane.n_positions,
                "section": len(sections),
            }
        )
        sections.append(("plane", f"{pole.name}/{index}", data))
        bound = plane_entropy_bytes(plane, identity)
        summaries.append(PlaneSummary(pole.name, index, len(data), plane.n_positions, bound))
    return {"axis": pole.axis, "name": pole.name, "planes": entries}


def _strengths(personas: PersonaSet) -> bool:
    """Whether some persona takes less than the whole of a pole, as only a newer version of the format can say."""
    return any(strength != 1 for name in personas.personas for strength in personas.strengths.get(name, ()))


def _encode_header(personas: PersonaSet, poles: list[dict[str, object]], sections: list[Section]) -> bytes:
    identity = personas.identity
    table, offset = [], 0
    for kind, name, data in sections:
        digest = hashlib.sha256(data).hexdigest()
        table.append({"kind": kind, "length": len(data), "name": name, "offset": offset, "sha256": digest})
        offset += len(data)
    return canonical_json(
        {
            "architecture": identity.architecture,
            "personas": [
                [name, listed_poles(parts, personas.strengths.get(name))] for name, parts in personas.personas.items()
            ],
            "poles": poles,
            "report": _report(personas.report),
            "sections": table,
            "sketch": {"positions": sum(len(s.positions) for s in identity.sketch.values()), "section": 0},
            "tensors": compress_tensors(identity.tensors),
        }
    )


def _report(report: Mapping[str, Any]) -> object:
    try:
        return _plain(report)
    except RecursionError:
        raise PackHeaderMalformedError("the report is nested too deep, or within itself") from None


def _plain(value: object) -> object:
    """`value` in the types that JSON has, so that what is read back equals what was written."""
    if isinstance(value, Mapping):
        keys = [key for key in value if not isinstance(key, str)]
        if keys:
            raise PackHeaderMalformedError(f"the report has the key {short(keys[0])}, which is not a string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _persona_name(header: Header, wanted: str) -> str:
    """The persona's name as the pack spells it: letter case may differ where that is unambiguous."""
    name = match_name(wanted, header.personas)
    if name is None:
        raise PersonaNotFoundError(f"no persona {short(wanted)}; this pack has {', '.join(header.personas)}")
    return name


def _sections_of(header: Header, persona: str) -> list[SectionInfo]:
    """The sections that `persona` needs, in the order of the file."""
    parts = header.personas[persona]
    needed = {plane.section for pole in header.poles if pole.name in parts for plane in pole.planes}
    return [section for index, section in enumerate(header.sections) if index == 0 or index in needed]


def _part(fetched: list[tuple[int, bytes]], section: SectionInfo) -> bytes:
    """The bytes of `section` from the range that covers it."""
    offset, data = next((o, d) for o, d in reversed(fetched) if o <= section.offset)
    return data[section.offset - offset : section.offset - offset + section.n_bytes]


def _decode_pole(entry: PoleEntry, header: Header, held: Mapping[SectionInfo, bytes]) -> Pole:
    planes = tuple(decode_plane(plane, header, held[header.sections[plane.section]]) for plane in entry.planes)
    return Pole(entry.name, entry.axis, planes)
