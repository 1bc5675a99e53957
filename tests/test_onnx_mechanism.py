"""Every way of applying personas to an ONNX model: exact, undone, private, and replaced when it fails."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona_edge.errors import InputError, UnsupportedModelError, WeightAccessError
from persona_edge.masked_model import masked
from persona_edge.masks import PersonaSet
from persona_edge.modeling import TorchModel
from persona_edge.onnx_model import OnnxModel, output_matrix
from persona_edge.onnx_weights import dequantize_matrix, dequantize_weight
from persona_edge.runtime import onnx_mapping, onnx_mechanism
from persona_edge.runtime.onnx_editors import Editor, Mechanism
from persona_edge.runtime.onnx_geometry import Geometry
from persona_edge.runtime.onnx_mapping import mapped_session
from persona_edge.runtime.onnx_mechanism import open_editor
from persona_edge.runtime.onnx_runtime import make_session
from persona_edge.runtime.programs import PersonaProgram, compile_program
from tests.tiny_onnx import TinyOnnx, personas_of, tiny_llama, tiny_onnx_cache

__all__ = ["tiny_llama", "tiny_onnx_cache"]

MECHANISMS: tuple[Mechanism, ...] = ("mapped", "images", "scales", "session")
TOKENS = np.arange(20, 52, dtype=np.int64)


def _open(model: OnnxModel, mechanism: Mechanism) -> Editor:
    if mechanism in ("mapped", "images") and sys.platform != "linux":
        pytest.skip("mappings are found on Linux")
    return open_editor(model, n_threads=1, mechanism=mechanism).editor


def _logits(editor: Editor, model: OnnxModel) -> NDArray[np.float32]:
    return Geometry.of(model).logits_of(editor.session, TOKENS)


def _program(personas: PersonaSet, name: str, strength: float = 1.0) -> PersonaProgram:
    return compile_program(personas.resolve(name), strength)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_switch_gives_the_same_bits_whatever_came_before(tiny_llama: TinyOnnx, mechanism: Mechanism) -> None:
    model, personas = tiny_llama.model, personas_of(tiny_llama.torch)
    editor = _open(model, mechanism)
    programs = {name: _program(personas, name, s) for name, s in (("E", 1.0), ("I", 0.6), ("both", 1.0))}
    base, digest = _logits(editor, model), editor.digest()
    first = {}
    for name, program in programs.items():
        editor.apply(program)
        first[name] = _logits(editor, model)
        assert not np.array_equal(first[name], base)
        editor.restore()
        assert np.array_equal(_logits(editor, model), base)
        assert editor.digest() == digest
    for name in ("both", "I", "E", "both", "E", "I", "I"):
        assert editor.apply(programs[name]).n_bytes >= 0
        assert np.array_equal(_logits(editor, model), first[name])
    editor.restore()
    assert np.array_equal(_logits(editor, model), base)
    editor.close()


@pytest.mark.parametrize("mechanism", ["mapped", "images", "scales"])
def test_a_switch_writes_only_what_differs(tiny_llama: TinyOnnx, mechanism: Mechanism) -> None:
    personas = personas_of(tiny_llama.torch)
    e, both = _program(personas, "E"), _program(personas, "both")
    editor = _open(tiny_llama.model, mechanism)
    alone = editor.apply(e)
    assert editor.apply(_program(personas, "E")).n_bytes == 0
    added = editor.apply(both)
    assert 0 < added.n_units < both.n_units
    assert editor.apply(e) == added
    assert editor.restore() == alone
    assert editor.restore() == (0, 0)


@pytest.mark.parametrize("mechanism", ["mapped", "images"])
@pytest.mark.parametrize("granularity", [32, 1])
def test_editing_in_place_computes_what_a_fresh_session_computes(
    tiny_llama: TinyOnnx, mechanism: Mechanism, granularity: int
) -> None:
    model = tiny_llama.model
    personas = personas_of(tiny_llama.torch, granularity=32 if granularity == 32 else 1)
    edited, fresh = _open(model, mechanism), _open(model, "session")
    for strength in (1.0, 0.3):
        program = _program(personas, "both", strength)
        edited.apply(program)
        fresh.apply(program)
        assert np.array_equal(_logits(edited, model), _logits(fresh, model))


@pytest.mark.parametrize("persona", [None, "E", "both"])
def test_float_arithmetic_agrees_with_pytorch_on_the_same_weights(tiny_llama: TinyOnnx, persona: str | None) -> None:
    model, personas = tiny_llama.model, personas_of(tiny_llama.torch)
    editor = _open(model, "scales")
    if persona is not None:
        editor.apply(_program(personas, persona))
    planes = [plane for pole in personas.resolve(persona) for plane in pole.planes] if persona else []
    with _weights_of(tiny_llama.torch, model), masked(tiny_llama.torch, planes), torch.no_grad():
        expected = tiny_llama.torch.model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    # The last matrix is no layer that masks touch: its products stay in int8.
    found = _logits(editor, model)[:, : expected.shape[1]]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9995


@contextmanager
def _weights_of(torch_model: TorchModel, model: OnnxModel) -> Iterator[None]:
    """While open, the torch model has the int4 weights of the ONNX model."""
    before = {name: values.clone() for name, values in torch_model.model.state_dict().items()}
    output = output_matrix(model)
    assert output is not None
    head = torch_model.model.get_output_embeddings().weight.data
    head.copy_(torch.from_numpy(dequantize_matrix(output)[: len(head)]))
    for layer in torch_model.layers:
        order = np.arange(layer.shape.n_rows) if layer.row_order is None else layer.row_order
        layer.module.weight.data[torch.from_numpy(order)] = torch.from_numpy(
            dequantize_weight(model.weights[layer.name])
        )
    try:
        yield
    finally:
        torch_model.model.load_state_dict(before)


def test_scales_alone_cannot_mask_single_weights(tiny_llama: TinyOnnx) -> None:
    editor = _open(tiny_llama.model, "scales")
    program = _program(personas_of(tiny_llama.torch, granularity=1), "E")
    with pytest.raises(UnsupportedModelError, match="single weights"):
        editor.check(program)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_files_are_never_changed_and_sessions_are_independent(
    tiny_llama: TinyOnnx, mechanism: Mechanism, tiny_onnx_cache: Path
) -> None:
    model, personas = tiny_llama.model, personas_of(tiny_llama.torch)
    one, other = _open(model, mechanism), _open(model, mechanism)

    def hashes() -> dict[Path, str]:
        files = [*tiny_llama.folder.iterdir(), *(tiny_onnx_cache / "onnx").glob("*/model.onnx*")]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before, base = hashes(), _logits(other, model)
    one.apply(_program(personas, "both"))
    assert np.array_equal(_logits(other, model), base)
    other.apply(_program(personas, "E"))
    in_e = _logits(other, model)
    one.restore()
    assert np.array_equal(_logits(one, model), base)
    assert np.array_equal(_logits(other, model), in_e)
    one.close()
    assert np.array_equal(_logits(other, model), in_e)
    assert hashes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are found on Linux")
def test_the_fastest_way_that_works_is_taken(tiny_llama: TinyOnnx) -> None:
    chosen = open_editor(tiny_llama.model, n_threads=1)
    assert (chosen.editor.mechanism, chosen.notes) == ("mapped", ())


def test_without_a_list_of_mappings_scales_are_used(
    tiny_llama: TinyOnnx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx_mapping, "MAPS", tmp_path / "none")
    chosen = open_editor(tiny_llama.model, n_threads=1)
    assert chosen.editor.mechanism == "scales"
    assert [note.partition(":")[0] for note in chosen.notes] == ["mapped", "images"]
    assert all("does not tell where files are mapped" in note for note in chosen.notes)


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are found on Linux")
def test_without_places_images_are_used(tiny_llama: TinyOnnx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_mechanism, "places_for", lambda matrix: None)
    chosen = open_editor(tiny_llama.model, n_threads=1)
    assert chosen.editor.mechanism == "images"
    assert "could not be learned" in chosen.notes[0]


def test_an_edit_that_does_not_show_is_noticed(
    tiny_llama: TinyOnnx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Memory that ONNX Runtime does not look at: what a version that copies initializers would do.
    monkeypatch.setattr(onnx_mapping, "MAPS", tmp_path / "none")
    real = make_session

    def copying(*arguments: object, **options: object) -> object:
        given = options.get("initializers")
        if isinstance(given, dict):
            options["initializers"] = {name: values.copy() for name, values in given.items()}
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_mechanism, "make_session", copying)
    chosen = open_editor(tiny_llama.model, n_threads=1)
    assert chosen.editor.mechanism == "session"
    assert "does not see what is written" in chosen.notes[2]


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are found on Linux")
def test_a_session_that_computes_something_else_is_noticed(
    tiny_llama: TinyOnnx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path))  # no verdicts yet
    real = onnx_mechanism._reference
    monkeypatch.setattr(onnx_mechanism, "_reference", lambda *arguments: real(*arguments) * np.float32(1.001))
    with pytest.raises(WeightAccessError, match="does not compute what a fresh one"):
        open_editor(tiny_llama.model, n_threads=1, mechanism="mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are found on Linux")
def test_memory_that_differs_from_the_file_is_noticed(tiny_llama: TinyOnnx, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mapped_session

    def changed(*arguments: object, **options: object) -> object:
        mapped = real(*arguments, **options)  # type: ignore[arg-type]
        next(iter(mapped.blobs.values()))[0][0] ^= 1
        return mapped

    monkeypatch.setattr(onnx_mechanism, "mapped_session", changed)
    with pytest.raises(WeightAccessError, match="memory and file differ"):
        open_editor(tiny_llama.model, n_threads=1, mechanism="images")


def test_an_unknown_mechanism_is_refused(tiny_llama: TinyOnnx) -> None:
    with pytest.raises(InputError, match="none of mapped, images, scales, session"):
        open_editor(tiny_llama.model, n_threads=1, mechanism="magic")  # type: ignore[arg-type]
