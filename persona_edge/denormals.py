"""Denormal numbers flushed to zero while torch calculates, and only then.

Gradients of far-away tokens underflow into denormals, which cost a CPU a hundred cycles each (docs/method.md). The
switch is a register of each thread that everything else in the process would feel, so it is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["denormals_flushed"]


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """While open, torch's CPU threads flush denormals; then they do as before. Also a decorator.

    Does nothing where the processor cannot.
    """
    import torch

    if _are_flushed():
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _are_flushed() -> bool:
    import torch

    smallest_normal = torch.finfo(torch.float32).tiny
    return float(torch.tensor([smallest_normal]) * 0.5) == 0.0
