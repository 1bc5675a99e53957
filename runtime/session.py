"""A GGUF model you can talk to, whose personas switch in place: the session on llama.cpp.

    with PersonaRuntime.open("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.mbti16.maskpack") as model:
        model.switch("INFP")
        print(model.chat([{"role": "user", "content": "What do you do on a free evening?"}]).text)
        model.base()

`persona_session` has what it does; here is what a GGUF needs: loading it, and a pack on its tensors.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Self

import numpy as np
from numpy.typing import NDArray

from persona_edge.maskpack import MaskPack
from persona_edge.masks import TensorShape
from persona_edge.runtime.attached import AttachedPack
from persona_edge.runtime.dequantize import dequantize
from persona_edge.runtime.llama_backend import LlamaBackend
from persona_edge.runtime.llama_device import DeviceMirror
from persona_edge.runtime.llama_weights import LlamaModel, find_tensors, weights_digest
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.placement import Placement, WeightsMode
from persona_edge.runtime.programs import PersonaProgram
from persona_edge.runtime.switcher import Switcher, WeightTensor
from persona_edge.runtime.values import Completion, FinishReason, KvPolicy, Message, SamplingOptions, SwitchReport
from persona_edge.sketch import check_identity

__all__ = ["Completion", "FinishReason", "KvPolicy", "Message", "PersonaRuntime", "SamplingOptions", "SwitchReport"]


class PersonaRuntime(PersonaSession):
    """A loaded GGUF model, an optional mask pack, and one conversation's KV cache. Make one with `open`."""

    _backend: LlamaBackend  # what the constructor is given

    def __init__(
        self, model: LlamaModel, backend: LlamaBackend, seed: int, kv: KvPolicy = "reprefill", kv_megabytes: int = 256
    ) -> None:
        """Takes over `model` and `backend` and closes them; `open` is the usual way."""
        template = model.metadata("tokenizer.chat_template")
        super().__init__(backend, template, seed=seed, kv=kv, kv_megabytes=kv_megabytes)
        self._model, self._tensors = model, find_tensors(model)

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        pack: str | os.PathLike[str] | MaskPack | None = None,
        *,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        seed: int = 0,
        weights: WeightsMode = "auto",
        n_gpu_layers: int = 0,
        library: str | os.PathLike[str] | None = None,
        kv: KvPolicy = "reprefill",
        kv_megabytes: int = 256,
    ) -> Self:
        """Load the GGUF file `model` and attach `pack` if given. Nothing is written to the weights yet.

        `n_ctx` is capped at what the model was trained for; `n_threads` None takes the physical cores. The seed makes
        a whole session repeatable. `weights` says where they lie: "heap", "mmap" (the file, mapped copy-on-write), or
        "auto", whichever is better. `n_gpu_layers` of the last layers go to a GPU if there is one; negative means all.
        `library` is the path of a libllama to use instead of the installed one, as is the environment's
        PERSONA_EDGE_LIBLLAMA; a process can use one. `kv` says what becomes of the KV cache when the weights change,
        and `kv_megabytes` what its snapshots may take in all (`kv_cache`). Raises InputError, ModelNotFoundError,
        ModelFileError, UnsupportedModelError, WeightAccessError, MissingDependencyError, and what `attach` raises.
        """
        with ExitStack() as on_failure:
            loaded = LlamaModel(model, weights=weights, n_gpu_layers=n_gpu_layers, library=library)
            on_failure.callback(loaded.close)
            backend = LlamaBackend(loaded, n_ctx=n_ctx, n_threads=n_threads)
            on_failure.callback(backend.close)
            runtime = cls(loaded, backend, seed, kv, kv_megabytes)
            if pack is not None:
                runtime.attach(pack)
            on_failure.pop_all()
        return runtime

    @property
    def placement(self) -> Placement:
        """Where the weights lie, and why there."""
        return self._model.placement

    @property
    def has_gpu(self) -> bool:
        """Whether the llama.cpp in use finds a GPU, so that `n_gpu_layers` has an effect."""
        return self._model.library.has_gpu

    def _attached_to(self, pack: MaskPack) -> AttachedPack:
        return _LlamaAttached(pack, self._model.architecture, self._tensors)

    def _digest(self) -> str:
        return weights_digest(self._tensors.values())

    def _release(self) -> None:
        self._tensors = {}
        self._model.close()


class _LlamaAttached(AttachedPack):
    """A pack on the tensors of a GGUF model in llama.cpp's memory."""

    def __init__(self, pack: MaskPack, architecture: str, tensors: dict[str, WeightTensor]) -> None:
        """Raises ModelMismatchError unless the pack was made from these weights, UnsupportedModelError."""
        shapes = (TensorShape(tensor.name, tensor.n_rows, tensor.n_columns) for tensor in tensors.values())
        check_identity(pack.identity, architecture, shapes, lambda name, at: _weights_at(tensors[name], at))
        super().__init__(pack)
        gated = {shape.name: tensors[shape.name] for shape in pack.identity.tensors}
        self._switcher, self._devices = Switcher(gated), DeviceMirror(gated)

    def check(self, program: PersonaProgram | None) -> None:
        if program is not None:
            self._switcher.check(program)

    def write(self, program: PersonaProgram | None) -> tuple[int, int]:
        self._devices.will_change(self._switcher.active, program)
        stats = self._switcher.restore() if program is None else self._switcher.apply(program)
        self._devices.send()
        return stats.n_units_written, stats.n_bytes


def _weights_at(tensor: WeightTensor, positions: NDArray[np.uint32]) -> NDArray[np.float32]:
    return dequantize(tensor.data, tensor.ggml_type, positions)
