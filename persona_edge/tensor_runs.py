"""The list of a model's tensors as the header of a mask pack spells it: one pattern per run of like blocks.

A model's list is nearly always the same few tensors once per block. An item of the spelled list is either one tensor,
`["output.weight", n_rows, n_columns]`, or a run, which stands for its tensors in block after block:

    {"blocks": [0, 1, 2], "tensors": [["attn_q.weight", n_rows, n_columns], ...]}      # blk.0.attn_q.weight, ...

The order of the tensors is kept exactly; blocks that differ from their neighbours become runs of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import TypeAlias

from persona_edge.bits import MAX_UNITS
from persona_edge.masks import TensorShape
from persona_edge.pack_errors import PackIdentityError
from persona_edge.pack_json import as_array, as_integer, as_members, as_name

__all__ = ["MAX_TENSORS", "compress_tensors", "expand_tensors"]

MAX_TENSORS = 65536
_BLOCK_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")

Item: TypeAlias = list[str | int]  # [name, n_rows, n_columns]
Run: TypeAlias = dict[str, list[int] | list[Item]]


def compress_tensors(tensors: Iterable[TensorShape]) -> list[Item | Run]:
    """The shortest list of items, left to right, that `expand_tensors` turns back into `tensors`."""
    items: list[Item | Run] = []
    blocks: list[int] = []
    body: list[Item] = []

    def close() -> None:
        if blocks:
            items.append({"blocks": blocks, "tensors": body})

    for block, group in groupby(tensors, key=_block):
        if block is None:
            close()
            blocks = []
            items += [[t.name, t.n_rows, t.n_columns] for t in group]
            continue
        prefix = len(f"blk.{block}.")
        here: list[Item] = [[t.name[prefix:], t.n_rows, t.n_columns] for t in group]
        if blocks and here == body:
            blocks.append(block)
        else:
            close()
            blocks, body = [block], here
    close()
    return items


def expand_tensors(value: object) -> tuple[TensorShape, ...]:
    """The tensors that the `tensors` member of a header stands for.

    Raises PackHeaderMalformedError for values of other types, PackIdentityError for a list that no model can have.
    """
    tensors: list[TensorShape] = []
    for index, item in enumerate(as_array(value, "tensors")):
        where = f"tensors[{index}]"
        if isinstance(item, list):
            tensors.append(_tensor("", item, where))
            continue
        blocks, body = as_members(item, where, "blocks", "tensors")
        numbers = [as_integer(block, f"{where}.blocks") for block in as_array(blocks, f"{where}.blocks")]
        body = as_array(body, f"{where}.tensors")
        if not numbers or not body:
            raise PackIdentityError(f"{where} is a run without blocks or tensors")
        _check_number(len(tensors) + len(numbers) * len(body))
        tensors += [_tensor(f"blk.{number}.", entry, where) for number in numbers for entry in body]
    _check_number(len(tensors))
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise PackIdentityError("a tensor is listed twice")
    return tuple(tensors)


def _block(tensor: TensorShape) -> int | None:
    match = _BLOCK_TENSOR.fullmatch(tensor.name)
    return int(match[1]) if match else None


def _tensor(prefix: str, value: object, where: str) -> TensorShape:
    parts = as_array(value, where)
    if len(parts) != 3:
        raise PackIdentityError(f"{where}: a tensor is a name, a number of rows and a number of columns")
    found = prefix + as_name(parts[0], where, PackIdentityError)
    n_rows, n_columns = as_integer(parts[1], where), as_integer(parts[2], where)
    if not 0 < n_rows * n_columns <= MAX_UNITS:
        raise PackIdentityError(f"{where}: {n_rows} x {n_columns} is not between 1 and 2**32 weights")
    return TensorShape(found, n_rows, n_columns)


def _check_number(n_tensors: int) -> None:
    if not 0 < n_tensors <= MAX_TENSORS:
        raise PackIdentityError(f"{n_tensors} tensors; a model has 1 to {MAX_TENSORS}")
