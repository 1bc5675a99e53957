"""Where masks lie: shares of each tensor, sorted into blocks and kinds, and drawn within the width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_edge.errors import InputError, PersonaNotFoundError
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import ModelIdentity, PersonaSet, Plane, Pole, SignSample, TensorShape
from persona_edge.pack_picture import draw_bars, gated_shares, layer_grid, picture_lines, write_numbers
from persona_edge.terminal_text import display_width

SHAPES = (
    TensorShape("token_embd.weight", 8, 64),
    TensorShape("blk.0.ffn_down.weight", 4, 64),
    TensorShape("blk.0.attn_q.weight", 4, 64),
    TensorShape("blk.2.attn_q.weight", 4, 64),
)


def positions(*at: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(at, np.uint32)


def pole(*planes: Plane, name: str = "A") -> Pole:
    return Pole(name, "axis", planes)


def test_a_weight_counts_once_however_many_planes_gate_it() -> None:
    poles = [
        pole(Plane(0.0, {"blk.0.attn_q.weight": positions(0, 3), "token_embd.weight": positions(1)})),
        pole(Plane(2.0, {"blk.0.attn_q.weight": positions(3, 7)})),
        pole(Plane(0.5, {"blk.0.attn_q.weight": positions(0, 31, 32, 33)}, granularity=1)),
    ]
    assert gated_shares(SHAPES, poles) == {
        "token_embd.weight": 32 / 512,
        "blk.0.ffn_down.weight": 0,
        "blk.0.attn_q.weight": (3 * 32 + 2) / 256,  # groups 0, 3 and 7, and weights 32 and 33 of group 1
        "blk.2.attn_q.weight": 0,
    }


def test_the_grid_has_blocks_and_kinds_in_the_usual_order() -> None:
    shares = dict(zip([shape.name for shape in SHAPES], (0.5, 0.25, 0.1, 0.3), strict=True))
    grid = layer_grid(shares, SHAPES)
    assert (grid.blocks, grid.kinds) == ((0, 2), ("attn_q", "ffn_down"))
    assert grid.cells == {(0, "attn_q"): 0.1, (0, "ffn_down"): 0.25, (2, "attn_q"): 0.3}
    assert grid.totals == {"attn_q": pytest.approx(0.2), "ffn_down": 0.25}
    assert grid.others == {"token_embd.weight": 0.5}
    assert grid.largest == 0.5


def test_bars_are_as_long_as_shares_are_large() -> None:
    shares = dict(zip([shape.name for shape in SHAPES], (0.0, 0.4, 0.2, 0.001), strict=True))
    lines = draw_bars(layer_grid(shares, SHAPES), width=80)
    assert lines == [
        "blk attn_q       ffn_down",
        "  0 ██████       ████████████",
        "  2 ▏",
        "all ███          ████████████",
        "A full bar is 40 % of a tensor's weights.",
    ]
    plain = draw_bars(layer_grid(shares, SHAPES), width=80, unicode=False)
    assert plain[1:3] == ["  0 ######       ############", "  2 #"]
    assert "\n".join(plain).isascii()


def test_numbers_are_percent_and_a_tensor_without_gates_is_a_dash() -> None:
    shares = dict(zip([shape.name for shape in SHAPES], (0.125, 0.0, 0.2, 0.00123), strict=True))
    assert write_numbers(layer_grid(shares, SHAPES)) == [
        "blk attn_q       ffn_down",
        "  0 20.000       -",
        "  2 0.123",
        "all 10.062       -",
        "token_embd.weight: 12.5 %",
        "Percent of each tensor's weights.",
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 99999), st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)
        ),
        min_size=1,
        max_size=40,
        unique=True,
    ),
    st.integers(20, 200),
    st.booleans(),
    st.floats(0, 1),
)
def test_any_tensor_names_fit_any_width(names: list[tuple[int, str]], width: int, unicode: bool, share: float) -> None:
    shapes = [TensorShape(f"blk.{block}.{kind}", 1, 32) for block, kind in names]
    grid = layer_grid({shape.name: share for shape in shapes}, shapes)
    for lines in (draw_bars(grid, width=width, unicode=unicode), write_numbers(grid, width=width)):
        table = [line for line in lines if not line.endswith("weights.")]
        assert max(map(display_width, table)) <= width
        assert sum(line.startswith("blk") or line.lstrip().startswith("blk ") for line in table) >= 1


def test_a_model_that_is_no_grid_becomes_a_list() -> None:
    shapes = [TensorShape(f"blk.{i}.kind{i}", 1, 32) for i in range(1000)]
    grid = layer_grid({shape.name: 1 / (i + 1) for i, shape in enumerate(shapes)}, shapes)
    lines = draw_bars(grid)
    assert len(lines) == 1001
    assert lines[0] == "blk.0.kind0: 100 %"


@pytest.fixture(scope="module")
def pack() -> MaskPack:
    sketch = {"blk.0.attn_q.weight": SignSample(positions(5), np.array([True]))}
    poles = (
        pole(Plane(0.0, {"blk.0.attn_q.weight": positions(1)}), name="I"),
        pole(Plane(0.0, {"blk.0.ffn_down.weight": positions(2)}), name="N"),
    )
    identity = ModelIdentity("llama", SHAPES, sketch)
    return MaskPack.from_bytes(encode_pack(PersonaSet(identity, poles, {"IN": ("I", "N"), "I": ("I",)}))[0])


def test_a_picture_of_one_pole_one_persona_or_all(pack: MaskPack) -> None:
    def drawn(**chosen: str) -> list[str]:
        return picture_lines(pack, **chosen, width=80, numbers=True, unicode=True)

    assert drawn(pole="i")[0] == "pole I: what is gated, by block and tensor"
    assert drawn(pole="i")[2] == "  0 12.500       -"
    assert drawn(persona="in")[0] == "persona IN (I + N): what is gated, by block and tensor"
    assert drawn(persona="in")[2] == drawn()[2] == "  0 12.500       12.500"
    assert drawn()[0] == "all 2 poles: what is gated, by block and tensor"


def test_unknown_names_are_errors_that_list_the_known_ones(pack: MaskPack) -> None:
    with pytest.raises(InputError, match="no pole 'X'; this pack has I, N"):
        picture_lines(pack, pole="X", width=80, numbers=False, unicode=True)
    with pytest.raises(PersonaNotFoundError, match="no persona 'X'; this pack has IN, I"):
        picture_lines(pack, persona="X", width=80, numbers=False, unicode=True)
    with pytest.raises(InputError, match="give --pole or --persona, not both"):
        picture_lines(pack, pole="I", persona="I", width=80, numbers=False, unicode=True)
