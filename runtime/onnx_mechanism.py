"""Choosing how personas are applied to an ONNX model: the first way that proves itself on this machine.

A way is not trusted because of a version or an operating system. Each is opened, tried and compared: every packed blob
is found and equals the file, places of scales reproduce what is in memory, an edit shows in the next run and its undo
brings back the same bits, and (once per model and machine, remembered in the cache) the edited session computes bit for
bit what a fresh session with masked initializers computes. What fails says why, and the next way is tried.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import InputError, PersonaEdgeError, WeightAccessError
from persona_edge.files import write_atomically
from persona_edge.masks import Plane, Pole
from persona_edge.onnx_model import OnnxMatrix, OnnxModel
from persona_edge.runtime.onnx_editors import Editor, MappedEditor, Mechanism, ScalesEditor, SessionEditor
from persona_edge.runtime.onnx_geometry import Geometry
from persona_edge.runtime.onnx_mapping import MappedSession, mapped_session
from persona_edge.runtime.onnx_masks import masked_initializers
from persona_edge.runtime.onnx_packing import ScalePlaces
from persona_edge.runtime.onnx_prepared import PreparedModel, places_for, prepare
from persona_edge.runtime.onnx_runtime import make_session
from persona_edge.runtime.programs import PersonaProgram, compile_program

__all__ = ["ChosenEditor", "open_editor"]

_ORDER: Final[tuple[Mechanism, ...]] = ("mapped", "images", "scales", "session")
_EDGE = 4096  # bytes compared at each end of a blob
_SAMPLED = 4096  # blocks per matrix whose fields are compared
_STRIDE = 61  # every so many groups are gated in the trial


@dataclass(frozen=True)
class ChosenEditor:
    """The way that was chosen, and one line for each that was not and why."""

    editor: Editor
    notes: tuple[str, ...]


def open_editor(model: OnnxModel, *, n_threads: int, mechanism: Mechanism | None = None) -> ChosenEditor:
    """Load `model` in the best way that works here, or in the way `mechanism` or not at all.

    Raises InputError for an unknown mechanism, WeightAccessError when the one that was asked for does not work, and
    ModelFileError or OutputError when no way can load the model.
    """
    if mechanism is not None and mechanism not in get_args(Mechanism):
        raise InputError(f"mechanism {mechanism!r} is none of {', '.join(_ORDER)}")
    notes: list[str] = []
    for name in _ORDER if mechanism is None else (mechanism,):
        try:
            return ChosenEditor(_OPENERS[name](model, n_threads), tuple(notes))
        except PersonaEdgeError as error:
            if name == "session" or mechanism is not None:
                raise
            notes.append(f"{name}: {error}")
    raise AssertionError("the last way raises its own error")


def _open_mapped(model: OnnxModel, n_threads: int) -> Editor:
    if any(matrix.scales is None for matrix in model.matrices()):
        raise WeightAccessError("this model is not quantized, so it has no scales")
    prepared = prepare(model)
    mapped = _mapped(model, prepared, n_threads)
    places = {matrix.name: places_for(matrix) for matrix in model.matrices()}
    known = {name: found for name, found in places.items() if found is not None}
    if len(known) < len(places):
        raise WeightAccessError(f"where packed scales lie could not be learned for {len(places) - len(known)} matrices")
    for matrix in model.matrices():
        for memory in mapped.blobs[matrix.name]:
            _check_places(matrix, memory, known[matrix.name])
    editor = MappedEditor(model, prepared, mapped, known)
    _try_out(editor, model, prepared.folder / "checked.json", lambda p: _reference(model, model.path, p, n_threads))
    return editor


def _open_images(model: OnnxModel, n_threads: int) -> Editor:
    prepared = prepare(model)
    editor = MappedEditor(model, prepared, _mapped(model, prepared, n_threads), None)
    _try_out(editor, model, prepared.folder / "checked.json", lambda p: _reference(model, model.path, p, n_threads))
    return editor


def _open_scales(model: OnnxModel, n_threads: int) -> Editor:
    graph = _float_arithmetic(model)
    scales = {m.name: np.array(m.scales.read()) for m in model.matrices() if m.scales is not None}
    named = {m.scales.name: scales[m.name] for m in model.matrices() if m.scales is not None}
    session = make_session(graph, n_threads=n_threads, initializers=named, data_folder=model.folder)
    editor = ScalesEditor(model, session, {name: values.reshape(-1) for name, values in scales.items()})
    _try_out(editor, model, None, lambda p: _reference(model, graph, p, n_threads))
    return editor


def _open_session(model: OnnxModel, n_threads: int) -> Editor:
    return SessionEditor(model, n_threads=n_threads)


_OPENERS: Final[Mapping[Mechanism, Callable[[OnnxModel, int], Editor]]] = {
    "mapped": _open_mapped,
    "images": _open_images,
    "scales": _open_scales,
    "session": _open_session,
}


def _mapped(model: OnnxModel, prepared: PreparedModel, n_threads: int) -> MappedSession:
    """A session whose packed weights were all found, and are what the file has."""
    unpacked = [matrix.name for matrix in model.matrices() if matrix.name not in prepared.blobs]
    if unpacked:
        raise WeightAccessError(f"ONNX Runtime did not pack {unpacked[0]} ({len(unpacked)} such)")
    mapped = mapped_session(prepared, n_threads=n_threads)
    data = np.memmap(prepared.data, np.uint8, "r")
    for name, copies in mapped.blobs.items():
        blob = prepared.blobs[name]
        in_file = data[blob.offset : blob.offset + blob.n_bytes]
        for part in (slice(0, _EDGE), slice(max(0, blob.n_bytes - _EDGE), blob.n_bytes)):
            if not all(np.array_equal(memory[part], in_file[part]) for memory in copies):
                raise WeightAccessError(f"memory and file differ in {name}")
    return mapped


def _check_places(matrix: OnnxMatrix, memory: NDArray[np.uint8], places: ScalePlaces) -> None:
    assert matrix.scales is not None
    blocks = np.unique(np.linspace(0, len(places.offsets) - 1, _SAMPLED).astype(np.int64))
    at, expected = places.fields(blocks, np.asarray(matrix.scales.read().ravel()[blocks], np.float32))
    if at.max() >= len(memory) // 4 or not np.array_equal(memory[: len(memory) // 4 * 4].view("<f4")[at], expected):
        raise WeightAccessError(f"{matrix.name} does not keep its scales where they were learned to lie")


def _try_out(
    editor: Editor, model: OnnxModel, verdicts: Path | None, reference: Callable[[PersonaProgram], NDArray[np.float32]]
) -> None:
    """Edit, run, undo, run. Compares with `reference` unless `verdicts` remembers that it was done."""
    geometry, program = Geometry.of(model), _trial_program(model)
    tokens = np.arange(5, 12, dtype=np.int64) % geometry.n_vocab
    base = geometry.logits_of(editor.session, tokens)
    editor.apply(program)
    try:
        edited = geometry.logits_of(editor.session, tokens)
    finally:
        editor.restore()
    if np.array_equal(edited, base):
        raise WeightAccessError("ONNX Runtime does not see what is written to its weights")
    if not np.array_equal(geometry.logits_of(editor.session, tokens), base):
        raise WeightAccessError("undoing an edit does not bring back the same numbers")
    if verdicts is not None and _remembered(verdicts).get(editor.mechanism) == "equal":
        return
    if not np.array_equal(edited, reference(program)):
        raise WeightAccessError("an edited session does not compute what a fresh one with masked weights computes")
    if verdicts is not None:
        write_atomically(verdicts, json.dumps({**_remembered(verdicts), editor.mechanism: "equal"}).encode())


def _reference(model: OnnxModel, graph: Path | bytes, program: PersonaProgram, n_threads: int) -> NDArray[np.float32]:
    changed = masked_initializers(program, model.weights)
    session = make_session(graph, n_threads=n_threads, initializers=changed, data_folder=model.folder)
    geometry = Geometry.of(model)
    return geometry.logits_of(session, np.arange(5, 12, dtype=np.int64) % geometry.n_vocab)


def _trial_program(model: OnnxModel) -> PersonaProgram:
    """A mask over every tensor, half of it suppressed and half of it amplified."""
    n_groups = {shape.name: shape.n_units(32) for shape in model.shapes()}
    planes = [
        Plane(gate, {name: np.arange(first % n, n, 2 * _STRIDE).astype(np.uint32) for name, n in n_groups.items()})
        for gate, first in ((0.0, 0), (1.5, _STRIDE))
    ]
    return compile_program([Pole("trial", "trial", tuple(planes))])


def _remembered(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _float_arithmetic(model: OnnxModel) -> bytes:
    """The model's graph with the maskable matrices computed in float32, as bytes; weights stay in their files."""
    import onnx

    names = {matrix.name for matrix in model.matrices() if matrix.scales is not None}
    if not names:
        raise WeightAccessError("this model is not quantized, so it has no scales")
    proto = onnx.load(model.path, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits" and node.input[1] in names:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
    return bytes(proto.SerializeToString())
