"""The session on ONNX Runtime: the same methods, the same packs, an ONNX folder instead of a GGUF file.

    with OnnxRuntime.open("smollm2.onnx-int4", "smollm2.mbti16.maskpack") as model:
        model.switch("INFP")
        print(model.chat([{"role": "user", "content": "What do you do on a free evening?"}]).text)

`persona_session` has what it does. What differs lies below: `onnx_mechanism` chooses how weights are edited,
`onnx_backend` evaluates, and the tokenizer and chat template are the files beside the model.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Self

from persona_edge.maskpack import MaskPack
from persona_edge.onnx_model import OnnxModel, read_onnx_model
from persona_edge.onnx_weights import check_onnx
from persona_edge.runtime.attached import AttachedPack
from persona_edge.runtime.onnx_backend import OnnxBackend, onnx_n_threads
from persona_edge.runtime.onnx_editors import Editor, Mechanism
from persona_edge.runtime.onnx_geometry import Geometry
from persona_edge.runtime.onnx_mechanism import ChosenEditor, open_editor
from persona_edge.runtime.onnx_vocabulary import OnnxVocabulary, chat_template_of
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.placement import Placement
from persona_edge.runtime.programs import PersonaProgram
from persona_edge.runtime.values import KvPolicy

__all__ = ["OnnxRuntime"]


class OnnxRuntime(PersonaSession):
    """A loaded ONNX model, an optional mask pack, and one conversation's KV cache. Make one with `open`."""

    _backend: OnnxBackend  # what the constructor is given

    def __init__(
        self,
        model: OnnxModel,
        chosen: ChosenEditor,
        backend: OnnxBackend,
        seed: int,
        *,
        kv: KvPolicy = "reprefill",
        kv_megabytes: int = 256,
    ) -> None:
        """Takes over everything and closes it; `open` is the usual way."""
        super().__init__(backend, chat_template_of(model.folder), seed=seed, kv=kv, kv_megabytes=kv_megabytes)
        self._model, self._editor = model, chosen.editor
        self.mechanism: Mechanism = chosen.editor.mechanism
        self.mechanism_notes = chosen.notes

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        pack: str | os.PathLike[str] | MaskPack | None = None,
        *,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        seed: int = 0,
        mechanism: Mechanism | None = None,
        kv: KvPolicy = "reprefill",
        kv_megabytes: int = 256,
    ) -> Self:
        """Load the ONNX folder (or its .onnx file) `model` and attach `pack` if given; nothing is masked yet.

        The first time on a machine takes some seconds: the model is packed for it, in the cache. `mechanism` None takes
        the best that works; `mechanism_notes` then says why better ones did not. The rest is as for a GGUF. Raises
        InputError, ModelNotFoundError, ModelFileError, UnsupportedModelError, WeightAccessError, OutputError,
        MissingDependencyError, and what `attach` raises.
        """
        found = read_onnx_model(Path(model))
        with ExitStack() as on_failure:
            chosen = open_editor(found, n_threads=onnx_n_threads(n_threads), mechanism=mechanism)
            on_failure.callback(chosen.editor.close)
            geometry = Geometry.of(found)
            vocabulary = OnnxVocabulary(found.folder, n_tokens=geometry.n_vocab, end_tokens=geometry.end_tokens)
            backend = OnnxBackend(found, chosen.editor, vocabulary, n_ctx=n_ctx)
            runtime = cls(found, chosen, backend, seed, kv=kv, kv_megabytes=kv_megabytes)
            if pack is not None:
                runtime.attach(pack)
            on_failure.pop_all()
        return runtime

    @property
    def placement(self) -> Placement:
        """Where the weights lie and how they are changed; `is_fallback` when the fastest way does not work here."""
        why = {
            "mapped": "ONNX Runtime's packed weights, written in place",
            "images": "ONNX Runtime's packed weights, written in place with images packed once per persona",
            "scales": "scales that ONNX Runtime reads from our memory, with activations in float32",
            "session": "a new ONNX Runtime session for each persona",
        }[self.mechanism]
        reason = f" ({'; '.join(self.mechanism_notes)})" if self.mechanism_notes else ""
        kind: Literal["heap", "mmap"] = "mmap" if self.mechanism in ("mapped", "images") else "heap"
        return Placement(kind, why + reason, is_fallback=bool(self.mechanism_notes))

    @property
    def has_gpu(self) -> bool:
        """Sessions are made for the CPU."""
        return False

    def _attached_to(self, pack: MaskPack) -> AttachedPack:
        return _OnnxAttached(pack, self._model, self._editor)

    def _digest(self) -> str:
        return self._editor.digest()

    def _release(self) -> None:
        self._editor.close()


class _OnnxAttached(AttachedPack):
    """A pack on the weights that `editor` changes."""

    def __init__(self, pack: MaskPack, model: OnnxModel, editor: Editor) -> None:
        check_onnx(pack.identity, model)
        super().__init__(pack)
        self._editor = editor

    def check(self, program: PersonaProgram | None) -> None:
        if program is not None:
            self._editor.check(program)

    def write(self, program: PersonaProgram | None) -> tuple[int, int]:
        return self._editor.restore() if program is None else self._editor.apply(program)
