"""Switching is exact: whatever came before, the weights are those of a cold application, and base is every byte."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_edge.errors import (
    InputError,
    MissingDependencyError,
    ModelMismatchError,
)
from persona_edge.masks import Plane, Pole
from persona_edge.runtime.dequantize import dequantize_rows
from persona_edge.runtime.kernels import CKernels, Kernels
from persona_edge.runtime.layouts import LAYOUTS
from persona_edge.runtime.switcher import PersonaProgram, Switcher, WeightTensor, compile_program
from tests.edited_weights import (
    N_COLUMNS,
    N_GROUPS,
    N_ROWS,
    assert_memory,
    cold,
    every_kernels,
    pole,
    random_pole,
    snapshot,
    weights,
)


@every_kernels
@settings(max_examples=25, deadline=None)
@given(seeds=st.lists(st.integers(0, 5), min_size=2, max_size=6), data=st.data())
def test_any_sequence_of_switches_equals_a_cold_application(
    kernels: Kernels, seeds: list[int], data: st.DataObject
) -> None:
    tensors = weights()
    base = snapshot(tensors)
    switcher = Switcher(tensors, kernels)
    for seed in seeds:
        masked_by_weight = data.draw(st.lists(st.sampled_from(["Q4_1", "Q6_K", "F16", "Q5_0", "IQ4_XS"])))
        strength = data.draw(st.sampled_from([0.3, 0.5, 1.0]))
        poles = [
            random_pole("a", seed, weight_tensors=masked_by_weight),
            random_pole("b", 0, (0.25,), masked_by_weight),
        ]
        program = compile_program(poles, strength)
        switcher.apply(program)
        assert switcher.active is program
        assert_memory(tensors, cold(program))
        if data.draw(st.booleans()):
            switcher.restore()
            assert switcher.active is None
            assert_memory(tensors, base)
    switcher.restore()
    assert_memory(tensors, base)


@every_kernels
@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS.values()])
def test_undo_is_exact_for_every_type(kernels: Kernels, name: str) -> None:
    tensors = weights(seed=3)
    base = snapshot(tensors)
    switcher = Switcher(tensors, kernels)
    for granularity in (1, 32):
        n_units = N_ROWS * N_COLUMNS // granularity
        for gate in (0.0, 0.4, 7.0):
            switcher.apply(compile_program([pole(gate, {name: range(n_units)}, 1 if granularity == 1 else 32)]))
            assert (tensors[name].data != base[name]).any()
            switcher.restore()
            assert_memory(tensors, base)


@every_kernels
def test_only_what_differs_is_written_and_counted(kernels: Kernels) -> None:
    switcher = Switcher(weights(), kernels)
    first = compile_program([pole(0.0, {"Q4_1": [1, 2, 3], "Q8_0": [4]}), pole(2.0, {"F16": [0]})])
    second = compile_program([pole(0.0, {"Q4_1": [2, 3]}), pole(0.5, {"Q4_1": [3, 9]}), pole(3.0, {"F16": [0]})])
    stats = switcher.apply(first)
    assert (stats.n_tensors, stats.n_units_written, stats.n_bytes) == (3, 5, 3 * 4 + 2 + 64)
    assert stats.seconds > 0
    # Q4_1: 1 goes, 2 and 3 stay at 0 (0 * 0.5), 9 comes; Q8_0: 4 goes; F16: 2 becomes 3.
    stats = switcher.apply(second)
    assert (stats.n_tensors, stats.n_units_written, stats.n_bytes) == (3, 4, 2 * 4 + 2 + 64)
    assert switcher.apply(second).n_units_written == 0
    stats = switcher.restore()
    assert (stats.n_tensors, stats.n_units_written) == (2, 4)
    assert switcher.restore().n_units_written == 0


@every_kernels
def test_gates_mean_what_they_say(kernels: Kernels) -> None:
    """In the eyes of gguf-py: silenced groups are 0, halved ones half, the rest untouched."""
    values = np.random.default_rng(0).standard_normal((N_ROWS, N_COLUMNS)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    data = gguf.quants.quantize(values, kind).reshape(-1).copy()
    before = gguf.quants.dequantize(data.reshape(N_ROWS, -1), kind).reshape(-1, 32)
    tensor = WeightTensor("w", int(kind), N_ROWS, N_COLUMNS, data)
    Switcher({"w": tensor}, kernels).apply(compile_program([pole(0.0, {"w": [0, 63]}), pole(0.5, {"w": [7]})]))
    after = gguf.quants.dequantize(data.reshape(N_ROWS, -1), kind).reshape(-1, 32)
    expected = np.ones((N_GROUPS, 1), np.float32)
    expected[[0, 63]], expected[7] = 0, 0.5
    np.testing.assert_array_equal(after, before * expected)  # halving fp16 numbers of this size is exact
    np.testing.assert_array_equal(dequantize_rows(data, int(kind), N_COLUMNS), after.reshape(N_ROWS, N_COLUMNS))


@every_kernels
def test_threads_may_switch_at_will(kernels: Kernels) -> None:
    tensors = weights()
    base = snapshot(tensors)
    switcher = Switcher(tensors, kernels)
    programs = [compile_program([random_pole("p", seed)]) for seed in range(4)]
    failures: list[BaseException] = []

    def keep_switching(program: PersonaProgram) -> None:
        try:
            for _ in range(15):
                switcher.apply(program)
                switcher.restore()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=keep_switching, args=(program,)) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    switcher.restore()
    assert_memory(tensors, base)


@every_kernels
def test_touching_changes_nothing_and_checks_like_a_switch(kernels: Kernels) -> None:
    tensors = weights()
    base = snapshot(tensors)
    switcher = Switcher(tensors, kernels)
    assert switcher.touch(compile_program([random_pole("p", 1, weight_tensors=["Q4_1"])])) > 0
    assert_memory(tensors, base)
    with pytest.raises(ModelMismatchError, match="no weight 'nowhere'"):
        switcher.touch(compile_program([pole(0.0, {"nowhere": [1]})]))


def test_residues_are_named_by_tensor_and_measured_on_base() -> None:
    tensors = weights()
    for name in ("Q4_1", "Q8_0"):
        tensors[name].data[:] = 1  # no NaN scales
    base = snapshot(tensors)
    switcher = Switcher(tensors)
    program = compile_program([pole(0.0, {"Q4_1": [0, 5], "Q8_0": [7]}, 1), pole(0.5, {"TQ2_0": [1]})])
    found = switcher.residues(program)
    assert list(found) == ["Q4_1", "Q8_0", "TQ2_0"]
    assert found["Q8_0"].worst == 0 < found["Q4_1"].mean <= found["Q4_1"].worst
    assert_memory(tensors, base)
    switcher.apply(program)
    with pytest.raises(InputError, match="restore them first"):
        switcher.residues(program)


@pytest.mark.parametrize("n_threads", [2, 3, 200])
def test_threads_write_the_same_bytes(n_threads: int) -> None:
    try:
        kernels = CKernels(n_threads)
    except MissingDependencyError:
        pytest.skip("the C kernels are not compiled here")
    tensors = weights()
    base = snapshot(tensors)
    switcher = Switcher(tensors, kernels)
    programs = [compile_program([random_pole("p", seed, weight_tensors=["Q5_K"])]) for seed in range(3)]
    for program in programs:
        single = Switcher(weights(), CKernels(1)).apply(program)
        switcher.restore()
        stats = switcher.apply(program)
        assert replace(stats, seconds=0) == replace(single, seconds=0)
        assert_memory(tensors, cold(program))
    switcher.apply(programs[0])
    assert_memory(tensors, cold(programs[0]))
    switcher.restore()
    assert_memory(tensors, base)


@every_kernels
def test_negative_gates_work_where_the_scale_has_a_sign(kernels: Kernels) -> None:
    tensors = weights()
    signed = {n: [0, 5] for n in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q6_K", "Q3_K", "IQ4_XS")}
    Switcher(tensors, kernels).apply(compile_program([pole(-1.0, signed), pole(-1.0, {"Q4_K": [3]}, 1)]))
    expected = cold(None)["Q8_0"]
    expected[[1, 5 * 34 + 1]] ^= 0x80  # the sign of an fp16 scale that is not NaN
    np.testing.assert_array_equal(tensors["Q8_0"].data, expected)


@pytest.mark.model
def test_real_weights_come_back_and_obey(smollm2_path: Path) -> None:
    """Two random 1 % masks on the 135M model, one after the other; in the eyes of gguf-py, and back to every byte."""
    found = [t for t in gguf.GGUFReader(smollm2_path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    tensors = {
        t.name: WeightTensor(t.name, int(t.tensor_type), int(t.shape[1]), int(t.shape[0]), t.data.reshape(-1).copy())
        for t in found
    }
    base = snapshot(tensors)
    rng = np.random.default_rng(0)
    n_groups = {name: tensor.n_rows * tensor.n_columns // 32 for name, tensor in tensors.items()}
    first, second = (
        {name: np.flatnonzero(rng.random(n) < 0.01).astype(np.uint32) for name, n in n_groups.items()} for _ in range(2)
    )
    switcher = Switcher(tensors)
    switcher.apply(compile_program([Pole("first", "axis", (Plane(2.0, first),))]))
    switcher.apply(compile_program([Pole("second", "axis", (Plane(0.0, second),))]))
    for t in found[::20]:
        after = gguf.quants.dequantize(tensors[t.name].data.reshape(t.data.shape), t.tensor_type).reshape(-1, 32)
        expected = gguf.quants.dequantize(t.data, t.tensor_type).reshape(-1, 32).copy()
        expected[second[t.name]] = 0
        np.testing.assert_array_equal(after, expected)
    switcher.restore()
    assert_memory(tensors, base)
