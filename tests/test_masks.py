"""The values of the bottom layer: names are found whatever their letter case, unless that would be a guess."""

from __future__ import annotations

import numpy as np
import pytest

from persona_edge.errors import InputError, PersonaNotFoundError
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, TensorShape, match_name

SHAPE = TensorShape("blk.0.attn_q.weight", 4, 64)


def pole(name: str) -> Pole:
    return Pole(name, "axis", (Plane(0.0, {SHAPE.name: np.array([0, 7], np.uint32)}),))


SET = PersonaSet(
    ModelIdentity("llama", (SHAPE,), {}), (pole("I"), pole("N")), {"IN": ("I", "N"), "night owl": ("N",), "I": ("I",)}
)


@pytest.mark.parametrize(
    ("wanted", "names", "found"),
    [
        ("INFP", ["INFP", "ENTJ"], "INFP"),
        ("infp", ["INFP", "ENTJ"], "INFP"),
        ("a", ["A", "a"], "a"),
        ("STRASSE", ["straße"], "straße"),
        ("Ab", ["AB", "ab"], None),
        ("inf", ["INFP"], None),
        ("", ["INFP"], None),
        ("x", [], None),
    ],
)
def test_names_match_but_for_letter_case(wanted: str, names: list[str], found: str | None) -> None:
    assert match_name(wanted, iter(names)) == found


def test_a_persona_is_its_poles_in_order() -> None:
    assert [pole.name for pole in SET.resolve("in")] == ["I", "N"]
    assert SET.name_of("NIGHT OWL") == "night owl"
    assert SET.pole("N").planes[0].n_positions == 2


def test_what_is_not_there_is_named_beside_what_is() -> None:
    with pytest.raises(PersonaNotFoundError, match=r"^no persona 'XX'; this pack has IN, night owl, I$"):
        SET.resolve("XX")
    with pytest.raises(PersonaNotFoundError, match=r"^no pole 'i'; this pack has I, N$"):
        SET.pole("i")
    with pytest.raises(KeyError):
        SET.identity.shape("output.weight")


def test_units_fill_rows() -> None:
    assert (SHAPE.n_units(32), SHAPE.n_units(1)) == (8, 256)
    with pytest.raises(InputError, match="48 columns do not divide into groups of 32"):
        TensorShape("x", 2, 48).n_units(32)
