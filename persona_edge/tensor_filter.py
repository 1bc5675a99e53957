"""Which tensors a mask may touch: include and exclude patterns and layer ranges over GGUF tensor names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from persona_edge.errors import InputError

__all__ = ["filter_tensors"]

_BLOCK = re.compile(r"blk\.(\d+)\.")
_LAYER_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def filter_tensors(
    names: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = (), layers: str | None = None
) -> tuple[str, ...]:
    """The tensors of `names`, in their order, that a mask may touch.

    Patterns are shell-like (`*`, `?`, `[...]`) and match a whole name (`blk.3.attn_q.weight`), with or without
    `.weight`, or only its last part (`attn_q`, `ffn_*`). `include` empty means all; `exclude` wins over `include`.
    `layers` (`2-27`, `0,3-5`) keeps those blocks; tensors outside any block then stay out. InputError when a pattern
    or a layer matches no tensor, when `layers` cannot be read, or when nothing is left.
    """
    for pattern in (*include, *exclude):
        if not any(_matches(name, pattern) for name in names):
            raise InputError(f"pattern {pattern!r} matches no tensor; names look like {_examples(names)}")
    wanted = None if layers is None else _layers(layers, {_layer(name) for name in names} - {None})
    kept = tuple(
        name
        for name in names
        if (not include or any(_matches(name, pattern) for pattern in include))
        and not any(_matches(name, pattern) for pattern in exclude)
        and (wanted is None or _layer(name) in wanted)
    )
    if not kept:
        raise InputError(f"include, exclude and layers together leave none of {len(names)} tensors; loosen one of them")
    return kept


def _matches(name: str, pattern: str) -> bool:
    bare = name.removesuffix(".weight")
    return any(fnmatchcase(text, pattern) for text in (name, bare, bare.rpartition(".")[2]))


def _layer(name: str) -> int | None:
    block = _BLOCK.match(name)
    return int(block[1]) if block else None


def _layers(text: str, known: set[int | None]) -> set[int]:
    wanted: set[int] = set()
    last = max((layer for layer in known if layer is not None), default=-1)
    for part in text.split(","):
        match = _LAYER_RANGE.fullmatch(part.strip())
        if not match:
            raise InputError(f"layers {text!r} cannot be read; write ranges such as 2-27 or 0,3-5")
        low, high = int(match[1]), int(match[2] or match[1])
        if not low <= high <= last:
            raise InputError(f"layers {part.strip()!r} are not in the model; it has layers 0-{last}")
        wanted.update(range(low, high + 1))
    return wanted


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) or "nothing: the model has no tensor that can be masked"
