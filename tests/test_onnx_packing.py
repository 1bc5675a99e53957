"""What is learned about packed layouts, held against ONNX Runtime's own packing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.onnx_model import OnnxMatrix, StoredTensor
from persona_edge.runtime.onnx_packing import ScalePlaces, learn_places, packed_images
from persona_edge.runtime.onnx_prepared import places_for


def _stored(name: str, values: NDArray[np.generic]) -> StoredTensor:
    return StoredTensor(name, values.dtype.str, values.shape, inline=values.tobytes())


def _matrix(n_rows: int = 48, n_columns: int = 96, *, level: int = 4, bits: int = 4) -> OnnxMatrix:
    random = np.random.default_rng(n_rows)
    codes = random.integers(0, 256, (n_rows, n_columns // 32, 4 * bits), dtype=np.uint8)
    scales = random.standard_normal((n_rows, n_columns // 32)).astype(np.float32)
    return OnnxMatrix(
        "codes", n_rows, n_columns, _stored("codes", codes), _stored("scales", scales), None, bits, 32, level
    )


def _require_places(matrix: OnnxMatrix) -> ScalePlaces:
    places = learn_places(matrix)
    if places is None:
        pytest.skip("this processor's packing does not keep scales apart")
    return places


@pytest.mark.parametrize("shape", [(48, 96), (40, 32), (17, 64), (130, 160)])
def test_places_reproduce_the_packing_of_any_scales(shape: tuple[int, int]) -> None:
    matrix = _matrix(*shape)
    places = _require_places(matrix)
    assert matrix.scales is not None
    base = packed_images([matrix])["codes"]
    scales = np.array(matrix.scales.read())
    gated = np.random.default_rng(0).choice(scales.size, scales.size // 2 + 1, replace=False).astype(np.int64)
    scales.reshape(-1)[gated] *= np.linspace(-1, 2, len(gated), dtype=np.float32)
    expected = packed_images([matrix], {"scales": scales})["codes"]
    at, values = places.fields(gated, scales.reshape(-1)[gated])
    found = base.copy()
    found[: len(found) // 4 * 4].view("<f4")[at] = values
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, base)


def test_a_matrix_whose_scales_are_not_packed_has_no_places() -> None:
    assert learn_places(_matrix(level=1)) is None
    assert learn_places(_matrix(1, 64)) is None  # too small to be stored apart from the graph


def test_zero_points_and_float_matrices_are_not_tried() -> None:
    matrix = _matrix()
    assert learn_places(replace(matrix, zero_points=_stored("z", np.full((48, 2), 0x88, np.uint8)))) is None
    assert learn_places(replace(matrix, scales=None)) is None


def test_places_are_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path))
    learned = _require_places(_matrix())
    first, second = places_for(_matrix()), places_for(_matrix())
    (kept,) = tmp_path.glob("onnx/layouts-*/*.npz")
    kept.write_bytes(b"damaged")
    third = places_for(_matrix())
    for places in (first, second, third):
        assert places is not None
        assert np.array_equal(places.offsets, learned.offsets)
        assert np.array_equal(places.factors, learned.factors)
