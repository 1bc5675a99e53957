"""The sections of a mask pack: the sign sketch and the planes, as bytes and back. One section at a time, no files.

    sketch section   one sign bit per sample, padded to whole bytes; then the samples' positions (granularity 1)
    plane section    the positions

Positions have the flat code (`persona_edge.bits`), but for planes of groups, which have had the row code
(`persona_edge.row_code`) since version 2. Tensors are in the order of the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from persona_edge.bits import CodecError, decode_positions, encode_positions
from persona_edge.masks import GROUP_SIZE, ModelIdentity, Plane, SignSample, TensorShape
from persona_edge.pack_errors import PackPlaneError, PackSketchError
from persona_edge.pack_header import Header, PlaneEntry, units_per_tensor
from persona_edge.pack_json import short
from persona_edge.row_code import decode_rows, encode_rows

__all__ = ["decode_identity", "decode_plane", "encode_plane", "encode_sketch"]

Positions = NDArray[np.uint32]


def encode_plane(plane: Plane, identity: ModelIdentity, where: str) -> bytes:
    """The plane's section; PackPlaneError, which begins with `where`, for positions that the identity has not."""
    try:
        sets = _per_tensor(plane.positions, identity)
        if plane.granularity == 1:
            return encode_positions(units_per_tensor(identity.tensors, plane.granularity), sets)
        return encode_rows(_row_shapes(identity.tensors), sets)
    except CodecError as error:
        raise PackPlaneError(f"{where}: {_explained(error, identity.tensors)}") from None


def decode_plane(entry: PlaneEntry, header: Header, data: bytes) -> Plane:
    """The plane whose section is `data`; PackPlaneError when it is not an encoding of the positions announced."""
    try:
        if entry.granularity == 1 or header.version == 1:
            units = units_per_tensor(header.tensors, entry.granularity)
            positions = decode_positions(data, units, entry.n_positions)
        else:
            positions = decode_rows(data, _row_shapes(header.tensors), entry.n_positions)
    except CodecError as error:
        section = header.sections[entry.section]
        raise PackPlaneError(
            f"section {section.name!r} at byte {section.offset}: {_explained(error, header.tensors)}"
        ) from None
    found = {t.name: _frozen(p) for t, p in zip(header.tensors, positions, strict=True) if len(p)}
    return Plane(entry.gate, found, entry.granularity)


def encode_sketch(identity: ModelIdentity) -> bytes:
    """The sketch section; PackSketchError for samples that the identity's tensors do not have."""
    try:
        sets = _per_tensor({name: sample.positions for name, sample in identity.sketch.items()}, identity)
        positions = encode_positions(units_per_tensor(identity.tensors, 1), sets)
    except CodecError as error:
        raise PackSketchError(f"the sign sketch: {_explained(error, identity.tensors)}") from None
    samples = [identity.sketch[t.name] for t in identity.tensors if t.name in identity.sketch]
    if not samples:
        raise PackSketchError("the identity has no sign sketch; persona_edge.sketch.sample_signs makes one")
    for sample in samples:
        if sample.negative.shape != sample.positions.shape or sample.negative.dtype != np.bool_:
            raise PackSketchError("the sign sketch does not have one true or false per position")
    return np.packbits(np.concatenate([s.negative for s in samples]), bitorder="little").tobytes() + positions


def decode_identity(header: Header, data: bytes) -> ModelIdentity:
    """The identity whose sketch section is `data`; PackSketchError when it is not an encoding of the samples."""
    where = f"section 'sketch' at byte {header.sections[0].offset}"
    n_samples = header.n_sketch_positions
    n_sign_bytes = (n_samples + 7) // 8
    if len(data) < n_sign_bytes:
        raise PackSketchError(f"{where}: {len(data)} bytes are too few for {n_samples} signs")
    bits = np.unpackbits(np.frombuffer(data[:n_sign_bytes], dtype=np.uint8), bitorder="little")
    if bits[n_samples:].any():
        raise PackSketchError(f"{where}: the padding of the signs is not zero")
    try:
        positions = decode_positions(data[n_sign_bytes:], units_per_tensor(header.tensors, 1), n_samples)
    except CodecError as error:
        raise PackSketchError(f"{where}: {_explained(error, header.tensors)}") from None
    ends = np.cumsum([len(p) for p in positions])
    negatives = np.split(bits[:n_samples].astype(np.bool_), ends[:-1])
    sketch = {
        tensor.name: SignSample(_frozen(found), negative)
        for tensor, found, negative in zip(header.tensors, positions, negatives, strict=True)
        if len(found)
    }
    return ModelIdentity(header.architecture, header.tensors, sketch)


def _per_tensor(positions: Mapping[str, Positions], identity: ModelIdentity) -> list[Positions]:
    """One array for each of the identity's tensors, empty where `positions` names none."""
    unknown = positions.keys() - {tensor.name for tensor in identity.tensors}
    if unknown:
        raise CodecError(f"tensor {short(min(unknown))} is not among the model's {len(identity.tensors)}")
    empty = [name for name, found in positions.items() if not len(found)]
    if empty:
        raise CodecError(f"tensor {short(empty[0])} is listed without positions; leave it out")
    none = np.zeros(0, dtype=np.uint32)
    return [positions.get(tensor.name, none) for tensor in identity.tensors]


def _row_shapes(tensors: Sequence[TensorShape]) -> list[tuple[int, int]]:
    """Rows and groups per row; no groups where the columns do not divide into them."""
    return [(t.n_rows, 0 if t.n_columns % GROUP_SIZE else t.n_columns // GROUP_SIZE) for t in tensors]


def _explained(error: CodecError, tensors: Sequence[TensorShape]) -> str:
    return error.reason if error.tensor is None else f"{short(tensors[error.tensor].name)}: {error.reason}"


def _frozen(positions: Positions) -> Positions:
    """Positions are shared by everyone who decodes them: nobody may change them."""
    positions.setflags(write=False)
    return positions
