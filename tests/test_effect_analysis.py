"""Mask analysis against masks small enough to count, and hidden states of a tiny model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from persona_edge.effect.analysis import (
    analyse_pack,
    budget_shares,
    difference_rates,
    layer_similarities,
    overlaps,
)
from persona_edge.effect.analysis_tables import analysis_tables
from persona_edge.maskpack import MaskPack, write_pack
from persona_edge.masks import Granularity, ModelIdentity, PersonaSet, Plane, Pole, TensorShape
from tests.tiny_chat import personas_for, write_model
from tests.tiny_models import load, one_thread, save_folder  # noqa: F401 - a fixture

QUERY, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
SHAPES = (TensorShape(QUERY, 4, 64), TensorShape(DOWN, 2, 96))  # 8 and 6 groups, 256 and 192 weights


def plane(gate: float, granularity: Granularity = 32, **positions: list[int]) -> Plane:
    names = {"query": QUERY, "down": DOWN}
    return Plane(gate, {names[k]: np.array(p, dtype=np.uint32) for k, p in positions.items()}, granularity)


def personas(*poles: Pole) -> PersonaSet:
    named = {pole.name: (pole.name,) for pole in poles}
    return PersonaSet(ModelIdentity("llama", SHAPES, {}), poles, named)


def test_poles_differ_where_their_gates_do() -> None:
    both = personas(
        Pole("E", "EI", (plane(0, query=[0, 1]), plane(2, down=[5]))),
        Pole("I", "EI", (plane(0, query=[1, 2, 3]), plane(0, down=[5]))),
        Pole("S", "SN", (plane(0, query=[7]),)),
    )
    (found,) = difference_rates(both)
    assert (found.axis, found.poles) == ("EI", ("E", "I"))
    assert found.attention == pytest.approx(3 / 8)  # groups 0, 2 and 3
    assert found.feed_forward == pytest.approx(1 / 6)  # group 5: times 2 against times 0
    assert found.average == pytest.approx(4 / 14)
    assert found.by_block == pytest.approx((3 / 8, 1 / 6))


def test_planes_that_overlap_multiply() -> None:
    both = personas(
        Pole("E", "EI", (plane(2, query=[0]), plane(0.5, query=[0]))), Pole("I", "EI", (plane(0, query=[7]),))
    )
    assert difference_rates(both)[0].attention == pytest.approx(1 / 8)


def test_overlap_is_of_units_gated_the_same_way() -> None:
    three = personas(
        Pole("E", "EI", (plane(0, query=[0, 1], down=[2]),)),
        Pole("I", "EI", (plane(0, query=[1, 4], down=[2]),)),
        Pole("N", "SN", (plane(1.5, query=[0, 1], down=[2]),)),
    )
    found = {overlap.personas: overlap for overlap in overlaps(three)}
    assert found["E", "I"].jaccard == pytest.approx(2 / 4)
    assert found["E", "N"].jaccard == 0
    chance = 3 * 3 / 14
    assert found["E", "I"].by_chance == pytest.approx(chance / (6 - chance))


def test_weights_and_groups_overlap_by_weights() -> None:
    mixed = personas(Pole("E", "EI", (plane(0, down=[1]),)), Pole("I", "EI", (plane(0, 1, down=[31, 32, 63]),)))
    (found,) = overlaps(mixed)
    assert found.jaccard == pytest.approx(2 / 33)


def test_compositions_are_unions() -> None:
    poles = (Pole("E", "EI", (plane(0, query=[0]),)), Pole("N", "SN", (plane(0, query=[0, 5]),)))
    made = PersonaSet(ModelIdentity("llama", SHAPES, {}), poles, {"EN": ("E", "N"), "E": ("E",), "none": ()})
    found = {overlap.personas: overlap.jaccard for overlap in overlaps(made)}
    assert found == {("EN", "E"): 0.5, ("EN", "none"): 0, ("E", "none"): 0}


def test_the_budget_adds_up_by_kind_and_by_block() -> None:
    pole = Pole("E", "EI", (plane(0, query=[0, 1, 2]), plane(3, down=[4])))
    damage = {QUERY: np.full((4, 2), 0.5, np.float32), DOWN: np.arange(6, dtype=np.float32).reshape(2, 3)}
    found = {share.part: share for share in budget_shares(personas(pole), damage)}
    assert list(found) == ["attn_q", "ffn_down", "block 0", "block 1"]
    assert found["attn_q"].density == pytest.approx(3 / 8)
    assert found["ffn_down"].of_units == pytest.approx(1 / 4)
    assert found["ffn_down"].of_damage == pytest.approx(4 * 4 / (4 * 4 + 1.5))  # a gate of 3 costs four times closing
    assert found["block 0"].of_damage == pytest.approx(1.5 / (4 * 4 + 1.5))
    assert budget_shares(personas(pole))[0].of_damage is None


def test_blocks_come_in_order_of_depth() -> None:
    names = [f"blk.{block}.attn_q.weight" for block in (0, 10, 2)]  # as they are sorted by name in a pack
    identity = ModelIdentity("llama", tuple(TensorShape(name, 4, 64) for name in names), {})
    pole = Pole("E", "EI", (Plane(0.0, {names[1]: np.array([3], np.uint32)}),))
    shares = budget_shares(PersonaSet(identity, (pole,), {"E": ("E",)}))
    assert [(share.part, share.of_units) for share in shares[1:]] == [("block 0", 0), ("block 2", 0), ("block 10", 1)]


def test_a_pack_is_analysed_without_a_model(tmp_path: Path) -> None:
    made = personas_for(write_model(tmp_path / "tiny.gguf"))
    write_pack(tmp_path / "tiny.maskpack", made)
    found = analyse_pack(MaskPack.open(tmp_path / "tiny.maskpack"))
    assert found == analyse_pack(made)
    assert [difference.axis for difference in found.differences] == ["EI", "SN"]
    assert found.similarities == ()


def test_hidden_states_differ_from_the_first_masked_block_on(tmp_path: Path) -> None:
    model = load(save_folder(tmp_path))
    last = [layer.name for layer in model.layers if layer.name.startswith(f"blk.{model.n_blocks - 1}.")]
    poles = tuple(
        Pole(name, "EI", (Plane(gate, {tensor: np.arange(0, 20, dtype=np.uint32) for tensor in last}),))
        for name, gate in (("E", 0.0), ("I", 4.0))
    )
    made = PersonaSet(model.identity(), poles, {"E": ("E",), "I": ("I",), "EI": ("E", "I")})
    found = {s.personas: s.cosines for s in layer_similarities(made, model, ["One?", "Two then?"])}
    assert set(found) == {("base", "E"), ("base", "I"), ("base", "EI"), ("E", "I")}
    for cosines in found.values():
        assert cosines[:-1] == pytest.approx([1] * (model.n_blocks - 1), abs=1e-6)
        assert cosines[-1] < 0.999
    assert layer_similarities(made, model, ["One?"]) == layer_similarities(made, model, ["One?"])


def test_tables_show_what_was_found(tmp_path: Path) -> None:
    both = personas(Pole("E", "EI", (plane(0, query=[0, 1], down=[2]),)), Pole("I", "EI", (plane(0, query=[1, 2, 3]),)))
    differences, shared, kinds, depths, states = analysis_tables(asdict(analyse_pack(both)))
    assert differences.rows == (("EI", "E / I", "28.57 %", "37.50 %", "16.67 %", "37.50 % (block 0)"),)
    assert shared.rows == (("E", "-", "20.0 %"), ("I", "20.0 %", "-"))
    assert kinds.headers == ("pole", "attn_q", "ffn_down")
    assert kinds.rows == (("E", "67 %", "33 %"), ("I", "100 %", "0 %"))
    assert depths.rows == kinds.rows  # a block per kind
    assert states.rows == ()
    assert analysis_tables({}) == []


def test_tables_of_hidden_states(tmp_path: Path) -> None:
    model = load(save_folder(tmp_path))
    tensor = model.layers[0].name
    poles = tuple(Pole(n, "EI", (Plane(0, {tensor: np.array([i], np.uint32)}),)) for i, n in enumerate("EI"))
    made = PersonaSet(model.identity(), poles, {"E": ("E",), "I": ("I",), "both": ("E", "I")})
    states = analysis_tables(asdict(analyse_pack(made, model, prompts=["How are you?"])))[-1]
    assert [row[0] for row in states.rows] == ["base and E", "base and I", "E and I"]
    assert all(len(row) == len(states.headers) for row in states.rows)
