"""A switch that fails half-way leads to base, and what does not fit is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.errors import (
    InputError,
    ModelMismatchError,
    PersonaEdgeError,
    UnsupportedModelError,
    WeightAccessError,
)
from persona_edge.runtime import numpy_kernels
from persona_edge.runtime.kernels import Kernels, NumpyKernels
from persona_edge.runtime.layouts import Units
from persona_edge.runtime.plans import SwitchCounts, UndoLog
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
