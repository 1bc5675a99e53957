"""From persona to persona in memory: the same bytes as by way of base, nothing written in vain, bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_edge.masks import Plane, Pole
from persona_edge.runtime.onnx_patches import PatchPlan, Recent, key_of, n_units_between, patch_of, way_between
from persona_edge.runtime.programs import PersonaProgram, compile_program, compose

N = 60


def _program(seed: int) -> PersonaProgram:
    random = np.random.default_rng(seed)
    names = [name for name in ("a", "b", "c") if random.random() < 0.7] or ["a"]
    positions = {name: np.flatnonzero(random.random(N) < 0.4).astype(np.uint32) for name in names}
    planes = [Plane(gate, {n: p[i::2] for n, p in positions.items()}) for i, gate in enumerate((0.0, 1.5))]
    return compile_program([Pole("p", "x", tuple(planes))])


def _plan(memory: dict[str, NDArray[np.float32]], base: dict[str, NDArray[np.float32]], seed: int) -> PatchPlan:
    program, patches = _program(seed), []
    for name in program.names:
        _, at, gates = program.units(name)
        if seed % 5 == 4:  # another persona that sees the same memory as bytes
            values = (base[name][at] * gates).view(np.uint8)
            bytes_at = (at.astype(np.int64)[:, None] * 4 + np.arange(4)).ravel()
            patches.append(patch_of(memory[name].view(np.uint8), bytes_at, values, base[name][at].view(np.uint8)))
        else:
            order = np.random.default_rng(seed).permutation(len(at))
            patches.append(patch_of(memory[name], at[order], (base[name][at] * gates)[order], base[name][at][order]))
    return PatchPlan(program, tuple(patches))


@pytest.mark.parametrize(("first", "second"), list(product(range(6), repeat=2)))
def test_any_way_leads_to_the_same_bytes(first: int, second: int) -> None:
    random = np.random.default_rng(9)
    base = {name: random.standard_normal(N).astype(np.float32) for name in ("a", "b", "c")}
    base["a"][:20] = 0  # gates change nothing there
    base["a"][20:30] = -0.0
    memory = {name: values.copy() for name, values in base.items()}
    one, other = _plan(memory, base, first), _plan(memory, base, second)
    _take(way_between(None, other).steps)
    expected = {name: values.tobytes() for name, values in memory.items()}
    _take(other.undoing())
    assert all(memory[name].tobytes() == base[name].tobytes() for name in base)

    _take(way_between(None, one).steps)
    before = {name: values.copy() for name, values in memory.items()}
    way = way_between(one, other)
    _take(way.steps)
    assert {name: values.tobytes() for name, values in memory.items()} == expected
    same_view = first % 5 != 4 and second % 5 != 4
    if same_view:
        differing = sum(int((before[n].view("u4") != memory[n].view("u4")).sum()) for n in base)
        assert way.written.n_bytes == 4 * differing
    if first == second:
        assert way.written == (0, 0)


def _take(steps: object) -> None:
    for memory, at, values in steps:  # type: ignore[attr-defined]
        memory[at] = values


def test_units_between_two_programs_are_those_whose_gates_differ() -> None:
    for first, second in product(range(4), repeat=2):
        one, other = _program(first), _program(second)
        gates = [
            {(n, int(at)): float(g) for n in p.names for at, g in zip(*p.units(n)[1:], strict=True)}
            for p in (one, other)
        ]
        expected = sum(gates[0].get(unit, 1) != gates[1].get(unit, 1) for unit in {*gates[0], *gates[1]})
        assert n_units_between(one, other) == expected
    assert n_units_between(None, one) == one.n_units


def test_a_composition_at_one_strength_has_one_key() -> None:
    plane = Plane(0.5, {"a": np.arange(5, dtype=np.uint32)})
    composition = compose([Pole("p", "x", (plane,))])
    assert composition.at(1.0) is not composition.at(1.0)
    assert key_of(composition.at(1.0)) == key_of(composition.at(1.0))
    assert key_of(composition.at(1.0)) != key_of(composition.at(0.5))


@dataclass(frozen=True)
class _Thing:
    n_bytes: int


def test_what_was_made_last_is_kept_within_bounds() -> None:
    made: list[str] = []

    def make(name: str, n_bytes: int) -> _Thing:
        made.append(name)
        return _Thing(n_bytes)

    recent: Recent[_Thing] = Recent(10)
    for name, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4), ("large", 50), ("large", 50)):
        recent.get(name, lambda name=name, size=size: make(name, size))  # type: ignore[misc]
    assert made == ["a", "b", "c", "b", "large"]
    assert recent.n_bytes == 50
