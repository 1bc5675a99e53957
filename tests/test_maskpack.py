"""The mask pack, as specified in docs/pack-format.md: golden bytes, round trips, and one named error per bad input."""

from __future__ import annotations

import hashlib
import math
import os
import random
import runpy
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import persona_edge
from persona_edge import pack_errors
from persona_edge.errors import OutputError, PackError, PersonaNotFoundError
from persona_edge.maskpack import (
    PREAMBLE_SIZE,
    MaskPack,
    encode_pack,
    fetch_persona,
    front_size,
    plan_ranges,
    plane_entropy_bytes,
    write_pack,
)
from persona_edge.masks import Granularity, ModelIdentity, PersonaSet, Plane, Pole, SignSample, TensorShape

FUZZ = runpy.run_path(str(Path(__file__).parent / "fuzz" / "fuzz_maskpack.py"))
fuzz: Callable[[bytes], bool] = FUZZ["fuzz"]
mutated: Callable[[bytes, random.Random], bytes] = FUZZ["mutated"]
GOLDEN_1 = Path(__file__).parent / "golden" / "v1.maskpack"
GOLDEN = Path(__file__).parent / "golden" / "v2.maskpack"
GOLDEN_3 = Path(__file__).parent / "golden" / "v3.maskpack"


def ascending(*values: int) -> NDArray[np.uint32]:
    return np.array(values, dtype=np.uint32)


def every(step: int, n: int, start: int = 0) -> NDArray[np.uint32]:
    return np.arange(start, n, step, dtype=np.uint32)


def first_golden_content() -> PersonaSet:
    """What tests/golden/v1.maskpack holds: every codec, both granularities, composed and single personas."""
    blocks = [f"blk.{b}.{kind}.weight" for b in (0, 1) for kind in ("attn_q", "ffn_down")]
    tensors = (*(TensorShape(name, 64, 64) for name in blocks), TensorShape("output.weight", 96, 64))
    squares = np.unique((np.arange(40, dtype=np.int64) ** 2 % 4093).astype(np.uint32))
    sketch = {
        name: SignSample(every(97, 4096, start), every(97, 4096, start) % 3 == 0) for start, name in enumerate(blocks)
    }
    most = np.setdiff1d(every(1, 4096), every(31, 4096))
    return PersonaSet(
        identity=ModelIdentity("llama", tensors, sketch),
        poles=(
            Pole("I", "EI", (Plane(0.0, {blocks[0]: ascending(3, 17, 101), "output.weight": ascending(0, 191)}),)),
            Pole(
                "E",
                "EI",
                (
                    Plane(0.5, {blocks[1]: every(9, 128), blocks[3]: ascending(127)}),
                    Plane(-1.25, {blocks[0]: squares, blocks[1]: every(2, 4096), blocks[2]: most}, granularity=1),
                ),
            ),
            Pole("N", "SN", (Plane(1.5, {blocks[2]: every(1, 128)}),)),
        ),
        personas={"IN": ("I", "N"), "EN": ("E", "N"), "introvertiert – für sich": ("I",)},
        report={"method": "contrastive-fisher", "budget": 0.003, "effects": {"I": [0.57, None, True]}, "n": 3},
    )


def golden_content() -> PersonaSet:
    """What tests/golden/v2.maskpack holds: that, and a plane with every part of the row code."""
    first = first_golden_content()
    wide = TensorShape("blk.2.ffn_up.weight", 300, 40 * 32)
    in_row = {5: 1, 6: 2, 70: 3, 71: 7, 72: 8, 150: 17, 299: 40}
    in_row |= {row: 1 + row % 2 for row in range(200, 230, 2)}
    groups = [row * 40 + (np.arange(n) * 11 + row) % 40 for row, n in in_row.items()]
    positions = np.sort(np.concatenate(groups)).astype(np.uint32)
    pole = Pole("S", "SN", (Plane(0.25, {wide.name: positions, "output.weight": every(1, 192, 60)}),))
    identity = replace(first.identity, tensors=(*first.identity.tensors, wide))
    return replace(first, identity=identity, poles=(*first.poles, pole), personas={**first.personas, "S": ("S",)})


def third_golden_content() -> PersonaSet:
    """What tests/golden/v3.maskpack holds: the same, with personas that take less than the whole of some pole."""
    return replace(golden_content(), strengths={"EN": (0.85, 1.0), "S": (0.3,)})


def assert_same(left: PersonaSet, right: PersonaSet) -> None:
    assert left.identity.architecture == right.identity.architecture
    assert left.identity.tensors == right.identity.tensors
    assert left.identity.sketch.keys() == right.identity.sketch.keys()
    for name, sample in left.identity.sketch.items():
        assert np.array_equal(sample.positions, right.identity.sketch[name].positions)
        assert np.array_equal(sample.negative, right.identity.sketch[name].negative)
    assert list(left.personas.items()) == list(right.personas.items())
    assert left.strengths == right.strengths
    assert left.report == right.report
    assert [(p.name, p.axis) for p in left.poles] == [(p.name, p.axis) for p in right.poles]
    for one, other in zip(left.poles, right.poles, strict=True):
        for plane, twin in zip(one.planes, other.planes, strict=True):
            assert (plane.gate, plane.granularity) == (twin.gate, twin.granularity)
            assert plane.positions.keys() == twin.positions.keys()
            assert all(np.array_equal(plane.positions[name], twin.positions[name]) for name in plane.positions)


# --- Golden bytes -----------------------------------------------------------------------------------------------------


def test_the_golden_files_hold_the_known_content() -> None:
    assert_same(MaskPack.open(GOLDEN_1).load(), first_golden_content())
    assert_same(MaskPack.open(GOLDEN).load(), golden_content())
    assert_same(MaskPack.open(GOLDEN_3).load(), third_golden_content())
    assert [MaskPack.open(path).version for path in (GOLDEN_1, GOLDEN, GOLDEN_3)] == [1, 2, 3]


def test_a_pack_of_version_1_is_written_again_as_version_2() -> None:
    again = MaskPack.from_bytes(encode_pack(MaskPack.open(GOLDEN_1).load())[0])
    assert again.version == 2
    assert_same(again.load(), first_golden_content())


def test_the_known_content_is_written_as_the_golden_bytes() -> None:
    assert encode_pack(golden_content())[0] == GOLDEN.read_bytes()
    assert encode_pack(third_golden_content())[0] == GOLDEN_3.read_bytes()


def test_whole_poles_are_written_in_the_version_that_older_readers_know() -> None:
    whole = replace(golden_content(), strengths={"EN": (1.0, 1.0)})
    assert encode_pack(whole)[0] == GOLDEN.read_bytes()


def test_a_persona_has_its_poles_at_its_strengths() -> None:
    pack = MaskPack.open(GOLDEN_3)
    e, n = pack.resolve("EN")
    assert [plane.gate for plane in e.planes] == [0.15 + 0.85 * 0.5, 0.15 + 0.85 * -1.25]
    assert n == pack.pole("N")
    assert [pole.planes[0].gate for pole in pack.load().resolve("en")] == [e.planes[0].gate, 1.5]
    assert pack.resolve("IN") == (pack.pole("I"), pack.pole("N"))
    assert fetch_persona(Remote(GOLDEN_3.read_bytes()), "EN").strengths == {"EN": (0.85, 1.0)}
    with pytest.raises(PersonaNotFoundError, match=r"no persona 'XX'; this pack has IN, EN"):
        pack.resolve("XX")


@pytest.mark.parametrize("strengths", [(0.5,), (0.5, 0.0), (0.5, 1.5), (-0.1, 1.0), (float("nan"), 1.0)])
def test_strengths_that_no_reader_would_take_are_not_written(strengths: tuple[float, ...]) -> None:
    with pytest.raises(PackError):
        encode_pack(replace(golden_content(), strengths={"EN": strengths}))


def test_the_front_of_the_golden_file_byte_for_byte() -> None:
    data = GOLDEN.read_bytes()
    assert data[:8] == b"\x89MPK\r\n\x1a\n"
    assert data[8:12] == b"\x02\x00\x00\x00"
    (size,) = struct.unpack_from("<I", data, 12)
    header = data[48 : 48 + size]
    assert data[16:48] == hashlib.sha256(header).digest()
    assert header.startswith(b'{"architecture":"llama","personas":[["IN",["I","N"]],["EN",["E","N"]],["introvertiert')
    assert header.endswith(
        b'"tensors":[{"blocks":[0,1],"tensors":[["attn_q.weight",64,64],["ffn_down.weight",64,64]]},["output.weight",96,64],'
        b'{"blocks":[2],"tensors":[["ffn_up.weight",300,1280]]}]}'
    )


# --- Writing and reading ----------------------------------------------------------------------------------------------


def test_write_open_load(tmp_path: Path) -> None:
    path = tmp_path / "a.maskpack"
    summary = write_pack(path, golden_content())
    pack = MaskPack.open(path)
    assert_same(pack.load(), golden_content())
    assert pack.summary() == summary
    assert summary.n_bytes == pack.n_bytes == path.stat().st_size
    assert os.listdir(tmp_path) == ["a.maskpack"]
    assert pack.pole_names == ("I", "E", "N", "S")
    assert pack.report["budget"] == 0.003


def test_sections_account_for_every_byte() -> None:
    data = GOLDEN.read_bytes()
    end = front_size(data[:PREAMBLE_SIZE])
    for section in MaskPack.from_bytes(data).sections():
        assert section.offset == end
        end += section.n_bytes
        assert section.sha256 == hashlib.sha256(data[section.offset : end]).hexdigest()
    assert end == len(data)
    assert [s.name for s in MaskPack.from_bytes(data).sections()] == ["sketch", "I/0", "E/0", "E/1", "N/0", "S/0"]


def test_decoded_arrays_cannot_be_changed() -> None:
    pack = MaskPack.open(GOLDEN)
    positions = pack.pole("I").planes[0].positions["blk.0.attn_q.weight"]
    with pytest.raises(ValueError, match="read-only"):
        positions[0] = 9
    assert pack.pole("I") is pack.pole("I")


def test_an_unknown_pole_is_named_with_those_there_are() -> None:
    with pytest.raises(PersonaNotFoundError, match="no pole 'X'; this pack has I, E, N, S"):
        MaskPack.open(GOLDEN).pole("X")


def test_the_summary_counts_positions_and_their_entropy() -> None:
    content = golden_content()
    summary = encode_pack(content)[1]
    assert [(p.pole, p.index, p.n_positions) for p in summary.planes][:2] == [("I", 0, 5), ("E", 0, 16)]

    def entropy(n: int, k: int) -> float:
        return n * math.log2(n) - k * math.log2(k) - (n - k) * math.log2(n - k)

    expected = (entropy(128, 3) + entropy(192, 2)) / 8
    assert summary.planes[0].entropy_bound_bytes == pytest.approx(expected)
    assert plane_entropy_bytes(content.poles[0].planes[0], content.identity) == pytest.approx(expected)
    assert plane_entropy_bytes(content.poles[2].planes[0], content.identity) == 0  # all units of one tensor


def test_a_plane_of_a_real_shape_is_within_5_percent_of_its_entropy_count_and_all() -> None:
    kinds = {"attn_q": (576, 576), "attn_k": (192, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536)}
    tensors = tuple(TensorShape(f"blk.{b}.{k}.weight", *shape) for b in range(30) for k, shape in kinds.items())
    rng = np.random.default_rng(0)
    positions = {t.name: np.flatnonzero(rng.random(t.n_units(32)) < 0.004).astype(np.uint32) for t in tensors}
    sketch = {t.name: SignSample(ascending(1), np.array([True])) for t in tensors}
    pole = Pole("I", "EI", (Plane(0.0, positions),))
    summary = encode_pack(PersonaSet(ModelIdentity("llama", tensors, sketch), (pole,), {"I": ("I",)}))[1]
    (plane,) = summary.planes
    assert plane.entropy_bound_bytes < plane.n_bytes < 1.05 * plane.entropy_bound_bytes
    assert summary.n_header_bytes < 1000


def test_writing_fails_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot write .*a\.maskpack: Not a directory"):
        write_pack(tmp_path / "file" / "a.maskpack", golden_content())
    assert os.listdir(tmp_path) == ["file"]


def test_what_the_report_may_hold_comes_back_as_json_types() -> None:
    content = replace(golden_content(), report={"a": (1, 2.5, "ü\n\x1b"), "b": {}, "c": 10**30})
    report = MaskPack.from_bytes(encode_pack(content)[0]).report
    assert report == {"a": [1, 2.5, "ü\n\x1b"], "b": {}, "c": 10**30}


def test_reading_needs_only_numpy() -> None:
    program = (
        "import sys, persona_edge.maskpack, persona_edge.sketch\n"
        "heavy = {'torch', 'transformers', 'click', 'gguf', 'llama_cpp', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = str(Path(persona_edge.__file__).parents[1])
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": root})


# --- One persona by byte ranges ---------------------------------------------------------------------------------------


class Remote:
    """A pack of which only ranges are read, and which remembers them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.read: list[tuple[int, int]] = []

    def __call__(self, offset: int, length: int) -> bytes:
        self.read.append((offset, length))
        return self.data[offset : offset + length]


def test_one_persona_is_read_by_its_ranges_alone() -> None:
    data = GOLDEN.read_bytes()
    remote = Remote(data)
    fetched = fetch_persona(remote, "in")
    whole = golden_content()
    expected = replace(whole, poles=(whole.poles[0], whole.poles[2]), personas={"IN": ("I", "N")})
    assert_same(fetched, expected)
    front = front_size(data[:PREAMBLE_SIZE])
    ranges = plan_ranges(data[:front], "IN")
    assert remote.read == [(0, PREAMBLE_SIZE), (PREAMBLE_SIZE, front - PREAMBLE_SIZE), *ranges]
    sketch, introvert, _, _, intuitive, _ = MaskPack.from_bytes(data).sections()
    assert ranges == [(sketch.offset, sketch.n_bytes + introvert.n_bytes), (intuitive.offset, intuitive.n_bytes)]


def test_damage_outside_of_the_ranges_does_not_matter_and_inside_is_found() -> None:
    data = bytearray(GOLDEN.read_bytes())
    extrovert = MaskPack.from_bytes(bytes(data)).sections()[2]
    data[extrovert.offset] ^= 1
    fetch_persona(Remote(bytes(data)), "IN")
    with pytest.raises(pack_errors.PackChecksumError, match="https://host/x: section 'E/0' at byte"):
        fetch_persona(Remote(bytes(data)), "EN", source="https://host/x")
    with pytest.raises(pack_errors.PackTruncatedError, match="section 'S/0' at byte"):
        fetch_persona(Remote(GOLDEN.read_bytes()[:-1]), "S")
    with pytest.raises(PersonaNotFoundError, match="no persona 'INFP'; this pack has IN, EN, introvertiert"):
        fetch_persona(Remote(GOLDEN.read_bytes()), "INFP")


# --- Properties -------------------------------------------------------------------------------------------------------


def test_every_truncation_is_found() -> None:
    data = GOLDEN.read_bytes()
    for length in range(len(data)):
        with pytest.raises(PackError):
            MaskPack.from_bytes(data[:length])


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_any_single_flipped_bit_is_found(data: st.DataObject) -> None:
    pack = bytearray(GOLDEN.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(pack) - 1))
    pack[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PackError):
        MaskPack.from_bytes(bytes(pack))


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=20))
def test_any_trailing_bytes_are_found(extra: bytes) -> None:
    with pytest.raises(pack_errors.PackSectionTableError, match="after the last section"):
        MaskPack.from_bytes(GOLDEN.read_bytes() + extra)


def test_mutated_packs_raise_nothing_but_pack_errors() -> None:
    for path in (GOLDEN_1, GOLDEN, GOLDEN_3):
        golden, rng = path.read_bytes(), random.Random(0)
        assert fuzz(golden)
        assert sum(fuzz(mutated(golden, rng)) for _ in range(2000)) < 1000


@st.composite
def persona_sets(draw: st.DrawFn) -> PersonaSet:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_tensors = draw(st.integers(1, 5))
    tensors = tuple(
        TensorShape(f"blk.{i}.w", draw(st.integers(1, 40)), 32 * draw(st.integers(1, 3))) for i in range(n_tensors)
    )

    def positions(n_units: int) -> NDArray[np.uint32]:
        n = draw(st.integers(1, n_units))
        return np.sort(rng.choice(n_units, n, replace=False)).astype(np.uint32)

    def plane() -> Plane:
        granularity: Granularity = draw(st.sampled_from(get_args(Granularity)))
        chosen = draw(st.lists(st.sampled_from(tensors), min_size=1, unique=True))
        gate = draw(st.floats(-65504, 65504))
        return Plane(gate, {t.name: positions(t.n_units(granularity)) for t in chosen}, granularity)

    sampled = draw(st.lists(st.sampled_from(tensors), min_size=1, unique=True))
    samples = {t.name: positions(t.n_units(1)) for t in tensors if t in sampled}
    sketch = {name: SignSample(found, rng.random(len(found)) < 0.5) for name, found in samples.items()}
    names = draw(st.lists(st.sampled_from("EISNTFJPäöü"), min_size=1, max_size=4, unique=True))
    poles = tuple(Pole(name, "axis", tuple(plane() for _ in range(draw(st.integers(1, 2))))) for name in names)
    personas = {name: (name,) for name in names} | {"all": tuple(names)}
    report = draw(
        st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
    )
    strength = st.floats(0, 1, exclude_min=True)
    strengths = {"all": tuple(draw(strength) for _ in names)} if draw(st.booleans()) else {}
    if all(s == 1 for s in strengths.get("all", ())):
        strengths = {}
    return PersonaSet(ModelIdentity("qwen2", tensors, sketch), poles, personas, report, strengths)


@settings(max_examples=150, deadline=None)
@given(persona_sets())
def test_any_content_comes_back_from_the_whole_and_from_ranges(content: PersonaSet) -> None:
    data, summary = encode_pack(content)
    pack = MaskPack.from_bytes(data)
    assert_same(pack.load(), content)
    assert encode_pack(pack.load()) == (data, summary)
    assert_same(fetch_persona(Remote(data), "all"), replace(content, personas={"all": content.personas["all"]}))
