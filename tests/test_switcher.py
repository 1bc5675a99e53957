"""Switching is exact: whatever came before, the weights are those of a cold application, and base is every byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge.errors import (
    InputError,
    MissingDependencyError,
    ModelMismatchError,
    PersonaEdgeError,
    UnsupportedModelError,
    WeightAccessError,
)
from persona_edge.masks import Granularity, Plane, Pole
from persona_edge.runtime import numpy_kernels
from persona_edge.runtime.dequantize import dequantize_rows
from persona_edge.runtime.kernels import CKernels, Kernels, NumpyKernels
from persona_edge.runtime.layouts import LAYOUTS, Units
from persona_edge.runtime.plans import SwitchCounts, UndoLog
from persona_edge.runtime.switcher import PersonaProgram, Switcher, WeightTensor, compile_program

N_ROWS, N_COLUMNS = 4, 512
N_GROUPS = N_ROWS * N_COLUMNS // 32
Weights = dict[str, WeightTensor]
Memory = dict[str, NDArray[np.uint8]]


def _both() -> list[Kernels]:
    try:
        return [NumpyKernels(), CKernels()]
    except MissingDependencyError:
        return [NumpyKernels()]


BOTH = _both()
every_kernels = pytest.mark.parametrize("kernels", BOTH, ids=lambda kernels: kernels.name)


def weights(seed: int = 0) -> Weights:
    """One tensor of every type, named by it; memory is random, NaN scales and all."""
    rng = np.random.default_rng(seed)
    memory = {layout: rng.integers(0, 256, N_ROWS * layout.n_bytes(N_COLUMNS), np.uint8) for layout in LAYOUTS.values()}
    return {
        layout.name: WeightTensor(layout.name, layout.ggml_type, N_ROWS, N_COLUMNS, data)
        for layout, data in memory.items()
    }


def snapshot(tensors: Weights) -> Memory:
    return {name: tensor.data.copy() for name, tensor in tensors.items()}


def assert_memory(tensors: Weights, expected: Memory) -> None:
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.data, expected[name], err_msg=name)


def random_pole(name: str, seed: int, gates: Sequence[float] = (0.0, 1.5), weight_tensors: Sequence[str] = ()) -> Pole:
    """One plane per gate, over a random choice of tensors; those in `weight_tensors` are masked weight by weight."""
    rng = np.random.default_rng(seed)
    planes = []
    for gate in gates:
        for granularity in (1, 32):
            names = [
                n for n in (layout.name for layout in LAYOUTS.values()) if (n in weight_tensors) == (granularity == 1)
            ]
            n_units = N_ROWS * N_COLUMNS // granularity
            chosen = {
                n: np.flatnonzero(rng.random(n_units) < 0.2).astype(np.uint32) for n in names if rng.random() < 0.7
            }
            planes.append(Plane(gate, {n: p for n, p in chosen.items() if len(p)}, 1 if granularity == 1 else 32))
    return Pole(name, "axis", tuple(planes))


def pole(gate: float, positions: Mapping[str, Sequence[int]], granularity: Granularity = 32) -> Pole:
    plane = Plane(gate, {name: np.array(p, np.uint32) for name, p in positions.items()}, granularity)
    return Pole("pole", "axis", (plane,))


# ---- switching ----


def cold(program: PersonaProgram | None, seed: int = 0) -> Memory:
    """The memory of a fresh model with `program` applied and nothing before it, by the NumPy kernels."""
    tensors = weights(seed)
    if program is not None:
        Switcher(tensors, NumpyKernels()).apply(program)
    return snapshot(tensors)


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


# ---- failures half-way ----


class Halfway(NumpyKernels):
    """Real kernels that switch the first `n` tensors of the new plan and then raise, the first `n_failures` times."""

    def __init__(self, kernels: Kernels, n: int, n_failures: int = 1) -> None:
        self.kernels, self.n, self.n_failures = kernels, n, n_failures
        self.tensors = kernels.tensors  # type: ignore[method-assign]

    def switch(self, tensors: object, old: UndoLog, new: UndoLog) -> SwitchCounts:
        if self.n_failures == 0:
            return self.kernels.switch(tensors, old, new)
        self.n_failures -= 1
        last = new.plan.tensors[self.n - 1] if new.plan.n_segments else self.n
        self.kernels.switch(tensors, head(old, int((old.plan.tensors <= last).sum())), head(new, self.n))
        raise KeyboardInterrupt


def head(log: UndoLog, n: int) -> UndoLog:
    """The first `n` segments of a log; its fields and fill marks are shared."""
    plan = log.plan
    starts, field_starts = plan.starts[: n + 1], plan.field_starts[: n + 1]
    units = slice(0, int(starts[-1]))
    part = replace(
        plan,
        tensors=plan.tensors[:n],
        granularities=plan.granularities[:n],
        starts=starts,
        field_starts=field_starts,
        positions=plan.positions[units],
        mixes=plan.mixes[units],
    )
    return UndoLog(part, log.fields, log.filled[:n])


@every_kernels
@pytest.mark.parametrize("n_failures", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_interrupt_between_tensors_leads_to_base(kernels: Kernels, n: int, n_failures: int) -> None:
    """Also when the way back is interrupted in its turn: the next call completes it."""
    tensors = weights()
    base = snapshot(tensors)
    first, second = (compile_program([random_pole("p", seed)]) for seed in (1, 2))
    halfway = Halfway(kernels, n, n_failures=0)
    switcher = Switcher(tensors, halfway)
    switcher.apply(first)
    halfway.n_failures = n_failures
    with pytest.raises(KeyboardInterrupt):
        switcher.apply(second)
    while halfway.n_failures:
        with pytest.raises(KeyboardInterrupt):
            switcher.restore()
    switcher.restore()
    assert switcher.active is None
    assert_memory(tensors, base)
    switcher.apply(second)
    assert_memory(tensors, cold(second))
    switcher.restore()
    assert_memory(tensors, base)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_failure_at_any_write_leads_to_base(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """The NumPy kernels are interrupted at every one of their writes in turn, each time with that write half done."""
    scatter: Callable[..., None] = numpy_kernels.scatter
    first, second = (compile_program([random_pole("p", seed, weight_tensors=["Q4_1"])]) for seed in (1, 2))
    n_writes, failed = 0, True
    while failed:
        tensors = weights()
        base = snapshot(tensors)
        switcher = Switcher(tensors, NumpyKernels())
        switcher.apply(first)
        countdown = n_writes

        def failing(units: Units, fields: NDArray[np.uint8]) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == -1:
                half = len(units.positions) // 2
                scatter(replace(units, positions=units.positions[:half]), fields[:half])
                raise error
            scatter(units, fields)

        monkeypatch.setattr(numpy_kernels, "scatter", failing)
        try:
            switcher.apply(second)
            failed = False
        except error:
            assert switcher.active is None
            assert_memory(tensors, base)
        monkeypatch.setattr(numpy_kernels, "scatter", scatter)
        switcher.apply(second)
        assert_memory(tensors, cold(second))
        n_writes += 1
    assert n_writes > 20


# ---- what is refused before anything is written ----


def hand_made(**changes: object) -> PersonaProgram:
    program = compile_program([pole(0.0, {"Q4_1": [1, 2], "Q4_K": [3]})])
    return replace(program, **changes)  # type: ignore[arg-type]


REFUSED: list[tuple[PersonaProgram, type[PersonaEdgeError], str]] = [
    (compile_program([pole(0.0, {"Q4_1": [1], "nowhere": [1]})]), ModelMismatchError, "no weight 'nowhere'"),
    (compile_program([pole(0.0, {"Q4_1": [1], "odd": [1]})]), UnsupportedModelError, "odd: .*IQ2_XXS cannot be edited"),
    (compile_program([pole(0.0, {"Q4_1": [1], "Q8_0": [N_GROUPS]})]), ModelMismatchError, f"Q8_0: .*{N_GROUPS}"),
    (compile_program([pole(-1.0, {"Q4_1": [1], "Q4_K": [1]})]), UnsupportedModelError, "Q4_K: the gate -1 is negative"),
    (compile_program([pole(-1.0, {"Q4_1": [1], "Q2_K": [1]})]), UnsupportedModelError, "Q2_K: the gate -1 is negative"),
    (hand_made(positions=np.array([2, 1, 3], np.uint32)), InputError, "not strictly ascending"),
    (hand_made(gates=np.array([np.inf], np.float32)), InputError, "finite gate"),
    (hand_made(mixes=np.array([0, 0, 1], np.uint16)), InputError, "finite gate"),
    (hand_made(starts=np.array([0, 3, 3])), InputError, "do not fit together"),
    (hand_made(names=("Q4_K", "Q4_1")), InputError, "do not fit together"),
    (hand_made(granularities=np.array([32, 16], np.int32)), InputError, "1 or 32"),
]


@every_kernels
@pytest.mark.parametrize(("program", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_a_program_that_does_not_fit_is_refused_before_the_first_write(
    kernels: Kernels, program: PersonaProgram, error: type[PersonaEdgeError], message: str
) -> None:
    tensors = weights()
    tensors["odd"] = WeightTensor("odd", 16, N_ROWS, N_COLUMNS, np.zeros(66 * 8, np.uint8))
    switcher = Switcher(tensors, kernels)
    active = compile_program([random_pole("p", 1)])
    switcher.apply(active)
    before = snapshot(tensors)
    for attempt in (switcher.check, switcher.apply):
        with pytest.raises(error, match=message) as caught:
            attempt(program)
        assert "\n" not in str(caught.value)
    assert switcher.active is active
    assert_memory(tensors, before)


@every_kernels
def test_negative_gates_work_where_the_scale_has_a_sign(kernels: Kernels) -> None:
    tensors = weights()
    signed = {n: [0, 5] for n in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q6_K", "Q3_K", "IQ4_XS")}
    Switcher(tensors, kernels).apply(compile_program([pole(-1.0, signed), pole(-1.0, {"Q4_K": [3]}, 1)]))
    expected = cold(None)["Q8_0"]
    expected[[1, 5 * 34 + 1]] ^= 0x80  # the sign of an fp16 scale that is not NaN
    np.testing.assert_array_equal(tensors["Q8_0"].data, expected)


def test_memory_that_cannot_be_edited_is_refused() -> None:
    good = weights()["Q4_1"]
    read_only = good.data.copy()
    read_only.flags.writeable = False
    wide: Any = good.data.view(np.uint16)
    for data, message in (
        (read_only, "writable"),
        (good.data[:-1], "expected 1280 bytes"),
        (wide, "flat, writable"),
        (good.data[::2], "flat, writable"),
    ):
        with pytest.raises(WeightAccessError, match=message):
            Switcher({"w": replace(good, data=data)})
    with pytest.raises(WeightAccessError, match="a and b share memory"):
        Switcher({"a": good, "b": replace(good, name="b")})
    with pytest.raises(WeightAccessError, match="cannot hold"):
        Switcher({"w": WeightTensor("w", 12, 5, 256 + 128, np.zeros(720, np.uint8))})


def test_groups_must_divide_the_columns() -> None:
    odd = WeightTensor("w", 0, 4, 40, np.zeros(4 * 40 * 4, np.uint8))
    with pytest.raises(ModelMismatchError, match="40 columns do not divide into groups of 32"):
        Switcher({"w": odd}).apply(compile_program([pole(0.0, {"w": [0]})]))


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
