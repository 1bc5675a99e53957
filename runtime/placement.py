"""Where a model's weights should lie: in the process's own heap, or in the file, mapped copy-on-write.

Both generate at the same speed and both can be edited. Mapped weights are there as soon as stock llama.cpp's and are
shared with every process that maps the file; only edited pages take memory of their own. But the first edit of a page
copies it, and a file that is changed while it is mapped changes the model. The heap takes the whole file's size, and
the time to copy it, once.

Repacked weights are llama.cpp's own order for some types on some processors. Generation may be faster, above all with
Q4_0, or slower; a switch has to repack every tensor that it touches, which takes far longer than an edit. So this is
never chosen automatically.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from persona_edge.errors import InputError, WeightAccessError
from persona_edge.machine import available_memory
from persona_edge.runtime.llama_mapping import why_not_here

__all__ = ["Placement", "WeightsMode", "choose_placement"]

WeightsMode = Literal["auto", "heap", "mmap", "repacked"]
_LARGE = 1 << 30  # bytes; copying so many takes about a second


_WHERE = {
    "heap": "in the heap",
    "mmap": "mapped from the file, copied page by page when edited",
    "repacked": "in the order that llama.cpp prefers here, repacked at every switch",
}


@dataclass(frozen=True)
class Placement:
    """Where weights lie, and in a few words why there. `is_fallback`: they were meant to be mapped."""

    kind: Literal["heap", "mmap", "repacked"]
    why: str
    is_fallback: bool = False

    @property
    def text(self) -> str:
        """`in the heap: …`, as `doctor` prints it."""
        return f"{_WHERE[self.kind]}: {self.why}"


def choose_placement(wanted: WeightsMode, n_bytes: int, n_gpu_layers: int = 0) -> Placement:
    """Where weights of `n_bytes` go. InputError for an unknown mode, WeightAccessError when "mmap" cannot be here."""
    if wanted not in ("auto", "heap", "mmap", "repacked"):
        raise InputError(f"weights is {wanted!r}; it must be 'auto', 'heap', 'mmap' or 'repacked'")
    if n_gpu_layers:  # a GPU may read the loader's mapping itself, so it is not exchanged under it
        if wanted in ("mmap", "repacked"):
            raise InputError(f"weights={wanted!r} does not go with GPU layers; use 'auto', or n_gpu_layers=0")
        return Placement("heap", "some layers are on the GPU")
    if wanted in ("heap", "repacked"):
        return Placement(wanted, "as asked")
    obstacle = why_not_here()
    if wanted == "mmap" and obstacle is not None:
        raise WeightAccessError(f"mapped weights cannot be edited here: {obstacle}; open the model with weights='heap'")
    if wanted == "mmap":
        return Placement("mmap", "as asked")
    if obstacle is not None:
        return Placement("heap", f"mapped weights cannot be edited here ({obstacle})", is_fallback=True)
    free = available_memory()
    if n_bytes < _LARGE and (free is None or n_bytes < free // 2):
        return Placement("heap", f"{n_bytes / 1e6:.0f} MB are copied quickly, and no switch meets a page fault")
    return Placement("mmap", f"{n_bytes / 1e9:.1f} GB load without a copy and are shared between processes")
