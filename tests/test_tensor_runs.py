"""The spelled tensor list: compact for real models, exact for any."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_edge.masks import TensorShape
from persona_edge.pack_errors import PackHeaderMalformedError, PackIdentityError
from persona_edge.pack_json import canonical_json
from persona_edge.tensor_runs import compress_tensors, expand_tensors

KINDS_8B = [("attn_q", 4096, 4096), ("attn_k", 1024, 4096), ("attn_v", 1024, 4096), ("attn_output", 4096, 4096)]
KINDS_8B += [("ffn_gate", 14336, 4096), ("ffn_up", 14336, 4096), ("ffn_down", 4096, 14336)]


def test_an_8b_model_takes_half_a_kilobyte() -> None:
    tensors = [TensorShape(f"blk.{b}.{kind}.weight", r, c) for b in range(32) for kind, r, c in KINDS_8B]
    spelled = compress_tensors(tensors)
    assert len(canonical_json(spelled)) < 400
    assert expand_tensors(spelled) == tuple(tensors)


def test_the_order_of_blocks_is_kept_also_where_files_sort_them_as_text() -> None:
    blocks = sorted(range(30), key=str)
    tensors = [TensorShape(f"blk.{b}.ffn_up.weight", 8, 32) for b in blocks]
    assert compress_tensors(tensors) == [{"blocks": blocks, "tensors": [["ffn_up.weight", 8, 32]]}]


def test_blocks_that_differ_and_tensors_outside_of_blocks() -> None:
    tensors = [
        TensorShape("token_embd.weight", 100, 32),
        TensorShape("blk.0.ffn_up.weight", 8, 32),
        TensorShape("blk.1.ffn_up.weight", 8, 32),
        TensorShape("blk.2.ffn_up.weight", 16, 32),
        TensorShape("blk.02.ffn_up.weight", 16, 32),
        TensorShape("output.weight", 100, 32),
        TensorShape("blk.3.ffn_up.weight", 16, 32),
    ]
    assert compress_tensors(tensors) == [
        ["token_embd.weight", 100, 32],
        {"blocks": [0, 1], "tensors": [["ffn_up.weight", 8, 32]]},
        {"blocks": [2], "tensors": [["ffn_up.weight", 16, 32]]},
        ["blk.02.ffn_up.weight", 16, 32],
        ["output.weight", 100, 32],
        {"blocks": [3], "tensors": [["ffn_up.weight", 16, 32]]},
    ]


NAMES = st.one_of(
    st.builds("blk.{}.{}".format, st.integers(0, 3), st.sampled_from(["a.weight", "b.weight", "c"])),
    st.sampled_from(["output.weight", "blk.x.a", "blk.1", "blk.1.", "blk.00.a", "blk.9999999999.a", "a"]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(TensorShape, NAMES, st.just(8), st.sampled_from([32, 64])), min_size=1, unique_by=lambda t: t.name
    )
)
def test_any_list_survives(tensors: list[TensorShape]) -> None:
    assert expand_tensors(compress_tensors(tensors)) == tuple(tensors)


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ([], "0 tensors"),
        ([["a", 1]], "a tensor is a name"),
        ([["a", 0, 32]], "0 x 32 is not"),
        ([["a", 2**20, 2**20]], "is not between 1 and"),
        ([["a\x1b[2J", 1, 1]], "printable"),
        ([["a", 1, 1], ["a", 1, 1]], "listed twice"),
        ([{"blocks": [0, 0], "tensors": [["a", 1, 1]]}], "listed twice"),
        ([{"blocks": [], "tensors": [["a", 1, 1]]}], "without blocks"),
        ([{"blocks": [1], "tensors": []}], "without blocks"),
        ([{"blocks": list(range(4096)), "tensors": [[f"t{i}", 1, 1] for i in range(4096)]}], "16777216 tensors"),
    ],
)
def test_lists_that_no_model_can_have(spelled: object, message: str) -> None:
    with pytest.raises(PackIdentityError, match=message):
        expand_tensors(spelled)


@pytest.mark.parametrize(
    "spelled", [None, {}, [1], [["a", 1.0, 1]], [["a", True, 1]], [{"blocks": [0]}], [{"blocks": 3, "tensors": []}]]
)
def test_values_of_other_types(spelled: object) -> None:
    with pytest.raises((PackHeaderMalformedError, PackIdentityError)):
        expand_tensors(spelled)
