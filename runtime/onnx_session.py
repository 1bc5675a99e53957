"""A PersonaRuntime on ONNX Runtime: the same object, the same packs, an ONNX folder instead of a GGUF file.

    with OnnxRuntime.open("smollm2.onnx-int4", "smollm2.mbti16.maskpack") as model:
        model.switch("INFP")
        print(model.chat([{"role": "user", "content": "What do you do on a free evening?"}]).text)

What differs lies below: `onnx_mechanism` chooses how weights are edited, `onnx_backend` evaluates, and the tokenizer
and chat template are the files beside the model.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self, cast

from persona_edge.maskpack import MaskPack
from persona_edge.onnx_model import OnnxModel, read_onnx_model
from persona_edge.onnx_weights import check_onnx
from persona_edge.runtime.attached import AttachedPack
from persona_edge.runtime.chat_template import ChatTemplate
from persona_edge.runtime.fair_lock import FairLock
from persona_edge.runtime.kv_cache import KvKeeper
from persona_edge.runtime.onnx_backend import OnnxBackend, onnx_n_threads
from persona_edge.runtime.onnx_editors import Editor, Mechanism
from persona_edge.runtime.onnx_geometry import Geometry
from persona_edge.runtime.onnx_mechanism import ChosenEditor, open_editor
from persona_edge.runtime.onnx_vocabulary import OnnxVocabulary, chat_template_of
from persona_edge.runtime.placement import Placement
from persona_edge.runtime.programs import PersonaProgram
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.values import KvPolicy, SwitchReport

__all__ = ["OnnxRuntime"]


class OnnxRuntime(PersonaRuntime):
    """A loaded ONNX model, an optional mask pack, and one conversation's KV cache. Make one with `open`."""

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
        self._onnx, self._editor = model, chosen.editor
        self.mechanism: Mechanism = chosen.editor.mechanism
        self.mechanism_notes = chosen.notes
        self._backend, self._seed = cast(Any, backend), seed
        self._kv = KvKeeper(backend, kv, kv_megabytes)
        self._lock = FairLock()
        source = chat_template_of(model.folder)
        self._template = ChatTemplate(source, backend.vocabulary.bos_text, backend.vocabulary.eos_text)
        self._attached: AttachedPack | None = None
        self._last_switch: SwitchReport | None = None
        self._n_generations = 0
        self._persona: str | None = None
        self._strength = 0.0
        self._is_open = True

    @classmethod
    def open(  # type: ignore[override]
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

    def attach(self, pack: str | os.PathLike[str] | MaskPack) -> None:
        """Make the personas of `pack` available, whichever file of this model it was made for.

        Goes back to base, then checks architecture, shapes and signs. Raises PackError, ModelMismatchError or
        UnsupportedModelError; the earlier pack then stays.
        """
        opened = pack if isinstance(pack, MaskPack) else MaskPack.open(Path(pack))
        with self._lock:
            self._check_open()
            if self._persona is not None:
                self._edit(None, None, 0.0)
            self._attached = _OnnxAttached(opened, self._onnx, self._editor)
            self._kv.forget_personas()

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

    def weights_digest(self) -> str:
        """SHA-256 over the weights in use that a persona may change: equal digests mean equal weights."""
        with self._lock:
            self._check_open()
            return self._editor.digest()

    def close(self) -> None:
        """Free the model. A generation that is under way raises GenerationError at its next token."""
        with self._lock:
            self._is_open = False
            self._attached = None
            self._backend.close()
            self._editor.close()


class _OnnxAttached(AttachedPack):
    """A pack that was found to belong to the ONNX model, and the editor of its weights."""

    def __init__(self, pack: MaskPack, model: OnnxModel, editor: Editor) -> None:
        check_onnx(pack.identity, model)
        super().__init__(pack)
        self._editor = editor

    def check(self, program: PersonaProgram | None) -> None:
        if program is not None:
            self._editor.check(program)

    def write(self, program: PersonaProgram | None) -> tuple[int, int]:
        return self._editor.restore() if program is None else self._editor.apply(program)
