"""Run a model whose weights do not fit on the device, forward and backward, one decoder block at a time.

A streamed block's weights stay where they are (in main memory). Whenever the block runs it gets a copy of them on the
device, and nothing of that run is kept but its input: backward runs the block once more and lets go of it again
(activation checkpointing; Chen et al., 2016). At any moment the device holds what lies around the blocks (embeddings,
norm, output layer), every block's input, and the weights and activations of one block.

What it costs: one more forward pass for every backward pass, and all weights cross to the device once per forward and
once more per backward. What it does not change: the numbers, because the same kernels see the same operands. Weights
edited in place (masked_model.py) count from the next run on. Streaming to the device the weights are on already copies
nothing and only spares the memory of activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from persona_edge.errors import UnsupportedModelError
from persona_edge.machine import available_memory

if TYPE_CHECKING:
    import torch

    from persona_edge.modeling import TorchModel

__all__ = ["exceeds_memory", "start_streaming", "streamed"]

# Above this share of a device's free memory the weights leave too little for activations and logits.
LARGEST_SHARE = 0.6


def exceeds_memory(model: Any, device: str) -> bool:
    """Whether the weights of `model`, which lies in main memory, take more than LARGEST_SHARE of what is free for it.

    On a CUDA device that is what is free there; on a CPU what the weights have and what is still free, as far as that
    can be told. False on any other device.
    """
    import torch

    weight_bytes = sum(int(p.numel() * p.element_size()) for p in model.parameters())
    if device.startswith("cuda"):
        free_bytes: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        available = available_memory() if device == "cpu" else None
        free_bytes = None if available is None else available + weight_bytes
    return free_bytes is not None and weight_bytes > LARGEST_SHARE * free_bytes


@contextmanager
def streamed(model: TorchModel, device: str) -> Iterator[None]:
    """While open, the decoder blocks of `model` run on `device` one at a time; all else is moved there and back.

    Raises UnsupportedModelError when the model has no list of decoder blocks.
    """
    home = model.device
    stop = start_streaming(model.model, device)
    try:
        yield
    finally:
        stop()
        model.model.to(home)


def start_streaming(model: Any, device: str) -> Callable[[], None]:
    """Move all but the decoder blocks of a Hugging Face `model` to `device` and stream the blocks from where they are.

    Returns what makes the blocks run as before, on the device that their weights are on; it moves nothing. Raises
    UnsupportedModelError when the model has no list of decoder blocks.
    """
    import torch

    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, torch.nn.ModuleList):
        raise UnsupportedModelError(f"{type(model).__name__}: no decoder blocks to stream; load it without streaming")
    decoder.layers = torch.nn.ModuleList()
    try:
        model.to(device)
    finally:
        decoder.layers = blocks
    return stream_blocks(list(blocks), lambda weights: weights.to(device))


def stream_blocks(
    blocks: Sequence[torch.nn.Module], place: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], None]:
    """Make each block run on `place(weights)` instead of its weights; the returned function takes that back."""

    def stop() -> None:
        for block in blocks:
            vars(block).pop("forward", None)

    stop()  # a second start replaces the first
    for block in blocks:
        block.forward = _StreamedForward(block, place)
    return stop


class _StreamedForward:
    """Stands in for the `forward` of one block. Arguments are the block's own, whatever its architecture."""

    def __init__(self, block: torch.nn.Module, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._block = block
        self._place = place
        self._forward = block.forward
        self._placed = False

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils.checkpoint import checkpoint

        if self._placed:
            return self._forward(hidden_states, *args, **kwargs)
        run = partial(self._run, args, kwargs)
        if not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return run(hidden_states)
        # Reentrant: the first run records nothing, so hooks that watch for gradients (collect.py) see a block once.
        return checkpoint(run, hidden_states, use_reentrant=True, preserve_rng_state=False)

    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any], hidden_states: torch.Tensor) -> Any:
        import torch

        tensors = itertools.chain(self._block.named_parameters(), self._block.named_buffers())
        placed = {name: self._place(tensor) for name, tensor in tensors}
        self._placed = True
        try:  # functional_call calls the block, and with it this object, again
            return torch.func.functional_call(self._block, placed, (hidden_states, *args), dict(kwargs))
        finally:
            self._placed = False
