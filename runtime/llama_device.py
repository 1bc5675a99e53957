"""Weights in a GPU's memory, or repacked: edited in a private copy of the file's pages, and what changed is sent there.

The CPU cannot address such a tensor as the file has it, but its contents are the file's. So an edit goes to the file,
mapped copy-on-write, which takes memory for the touched pages only; then the stretches of the tensor that hold an
edited block are written through ggml (`ggml_backend_tensor_set`). Reading, for a digest, goes through ggml too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_edge.errors import WeightAccessError
from persona_edge.runtime.layouts import LAYOUTS
from persona_edge.runtime.llama_files import ModelPart
from persona_edge.runtime.llama_library import LlamaLibrary
from persona_edge.runtime.programs import PersonaProgram
from persona_edge.runtime.switcher import WeightTensor

__all__ = ["DeviceMirror", "DeviceTensor", "check_device", "file_copy"]

STRETCH = 1 << 18  # bytes sent at once: about what a bus moves in the time that a call takes
REPACKED = "CPU_REPACK"
_DEVICES = ("CUDA", "ROCm", "MUSA", "MTL", "Metal", "Vulkan", "SYCL")
_SAMPLE = 4096  # bytes compared at the beginning and at the end of each tensor


@dataclass(frozen=True, eq=False)
class DeviceTensor(WeightTensor):
    """A tensor that ggml alone can address. `data` is what it should hold; `write` sends a part of that there.

    A `repacked` tensor takes the whole of it or nothing, and cannot be read back. `owner` is the model, which lives as
    long as this.
    """

    library: LlamaLibrary
    handle: int
    owner: object
    repacked: bool = False

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Bytes `start` to `stop` as the device has them; of a repacked tensor, as they were sent."""
        if self.repacked:
            return self.data[start:stop]
        found = np.empty((self.data.size if stop is None else stop) - start, np.uint8)
        self.library.ggml.ggml_backend_tensor_get(self.handle, found.ctypes.data, start, found.size)
        return found

    def write(self, start: int, stop: int) -> None:
        """Send bytes `start` to `stop` of `data` to the device."""
        self.library.ggml.ggml_backend_tensor_set(self.handle, self.data.ctypes.data + start, start, stop - start)


def check_device(name: str, buffer_kind: str) -> None:
    """WeightAccessError unless buffers of `buffer_kind` take a tensor's bytes as the file has them."""
    if not buffer_kind.startswith((*_DEVICES, REPACKED)):
        raise WeightAccessError(
            f"{name} lies in a {buffer_kind} buffer, whose weights cannot be edited; open the model with n_gpu_layers=0"
        )


def file_copy(parts: Iterable[ModelPart]) -> dict[str, NDArray[np.uint8]]:
    """Each tensor's bytes in its file, to be edited without changing the file: shape (n_bytes,), writable."""
    found: dict[str, NDArray[np.uint8]] = {}
    for part in parts:
        whole: NDArray[np.uint8] = np.memmap(part.path, np.uint8, mode="c")
        found |= {t.name: whole[t.offset : t.offset + t.n_bytes] for t in part.tensors}
    return found


class DeviceMirror:
    """Keeps the devices' tensors the same as their `data`. MUTATES device memory; nobody may evaluate meanwhile."""

    def __init__(self, tensors: Mapping[str, WeightTensor]) -> None:
        """Raises WeightAccessError when a tensor on a device is not what is in the file."""
        self._tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DeviceTensor)}
        self._stale: dict[str, NDArray[np.int64]] = {}  # numbers of stretches, ascending
        for tensor in self._tensors.values():
            for start in {0, max(0, tensor.data.size - _SAMPLE)}:
                stop = min(start + _SAMPLE, tensor.data.size)
                if not np.array_equal(tensor.read(start, stop), tensor.data[start:stop]):
                    raise WeightAccessError(
                        f"{tensor.name} on the device is not what is in the file; open the model with n_gpu_layers=0"
                    )

    def will_change(self, *programs: PersonaProgram | None) -> None:
        """The blocks that these programs touch may be about to change."""
        for program in filter(None, programs):
            for name in self._tensors.keys() & set(program.names):
                touched = _stretches(self._tensors[name], *program.units(name)[:2])
                self._stale[name] = np.union1d(self._stale.get(name, touched), touched)

    def send(self) -> None:
        """Send what may have changed since. When it is interrupted, the next call sends the rest."""
        for name in list(self._stale):
            tensor = self._tensors[name]
            end = -(-tensor.data.size // STRETCH)
            for first, last in [(0, end)] if tensor.repacked else _runs(self._stale[name]):
                tensor.write(first * STRETCH, min(last * STRETCH, tensor.data.size))
            del self._stale[name]


def _stretches(tensor: WeightTensor, granularity: int, positions: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Numbers of the stretches that hold a block with one of `positions`."""
    layout = LAYOUTS[tensor.ggml_type]
    starts = np.unique(positions.astype(np.int64) * granularity // layout.block_weights) * layout.block_bytes
    return np.union1d(starts // STRETCH, (starts + layout.block_bytes - 1) // STRETCH)


def _runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each unbroken series in the ascending `numbers`."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for run in np.split(numbers, breaks):
        yield int(run[0]), int(run[-1]) + 1
