"""Opening a model to chat with: which file, which pack next to it, and whether they belong together.

What can be known to be wrong is found before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from persona_edge.catalogue import resolve_model
from persona_edge.chat_values import BASE
from persona_edge.downloads import Progress, silent
from persona_edge.errors import InputError, ModelMismatchError, PackError
from persona_edge.find_packs import FoundPack, find_pack, open_pack
from persona_edge.onnx_start import Backend, onnx_model_for
from persona_edge.runtime.open_runtime import open_runtime
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.placement import WeightsMode
from persona_edge.runtime.values import KvPolicy

__all__ = ["ChatModel", "open_chat_model"]


@dataclass(frozen=True)
class ChatModel:
    """A model that is ready to talk. `pack` is None without personas; `notes` are lines that the user should see."""

    runtime: PersonaSession
    path: Path
    pack: FoundPack | None
    notes: tuple[str, ...]
    no_pack: str

    @property
    def greeting(self) -> str:
        """What an interactive chat begins with."""
        how = "/help lists the commands, Ctrl-D leaves"
        if self.pack is None:
            return f"{self.path.name}, without personas: {self.no_pack}\n{how}"
        return f"{self.path.name} with {len(self.runtime.personas)} personas from {self.pack.path.name}\n{how}"


def open_chat_model(
    model: str,
    *,
    pack: Path | None = None,
    wanted: Sequence[str] = (),
    look_for_pack: bool = True,
    n_ctx: int = 4096,
    n_threads: int | None = None,
    weights: WeightsMode = "auto",
    n_gpu_layers: int = 0,
    kv: KvPolicy = "reprefill",
    backend: Backend = "auto",
    progress: Progress = silent,
) -> ChatModel:
    """Load `model` with the pack that holds every persona of `wanted` (`base` needs none).

    `pack` is used when it is given; otherwise the newest fitting one next to the model, or else one that ships for it.
    When nothing is `wanted`, a pack is attached if `look_for_pack` and one is found that fits. `backend` "auto" goes by
    the file. Raises what `onnx_model_for`, `resolve_model`, `find_pack` and `open_runtime` raise.
    """
    path = onnx_model_for(model, backend) or resolve_model(model, progress=progress).require_gguf()
    personas = [name for name in wanted if name.casefold() != BASE]
    found, why_none = _choose(path, model, pack, personas, look_for_pack)
    progress(f"loading {path.name}", 0, None)
    runtime = open_runtime(path, n_ctx=n_ctx, n_threads=n_threads, weights=weights, n_gpu_layers=n_gpu_layers, kv=kv)
    no_gpu = ("this llama.cpp finds no GPU: all layers are on the CPU",) if n_gpu_layers and not runtime.has_gpu else ()
    try:
        opened = _attached(runtime, path, found, why_none, must_fit=bool(personas) or pack is not None)
        return replace(opened, notes=no_gpu + opened.notes)
    except BaseException:
        runtime.close()
        raise


def _attached(
    runtime: PersonaSession, path: Path, found: FoundPack | None, why_none: str, *, must_fit: bool
) -> ChatModel:
    """`runtime` with the pack that was found."""
    placement = runtime.placement
    notes = (f"weights {placement.text}",) if placement.is_fallback else ()
    if found is None:
        return ChatModel(runtime, path, None, notes, why_none)
    try:
        runtime.attach(found.pack)
    except (PackError, ModelMismatchError) as error:
        if must_fit:
            raise
        # a pack that nobody asked for is no reason not to talk to the model
        return ChatModel(runtime, path, None, (*notes, f"{found.path.name} was left out: {error}"), str(error))
    return ChatModel(runtime, path, found, notes if found.note is None else (*notes, found.note), why_none)


def _choose(
    path: Path, model: str, pack: Path | None, personas: Sequence[str], look_for_pack: bool
) -> tuple[FoundPack | None, str]:
    """The pack to attach, if any, and why there is none."""
    if pack is not None:
        return open_pack(pack, personas), ""
    if personas:
        return find_pack(path, personas, model), ""
    if not look_for_pack:
        return None, "start the chat with --persona"
    try:
        return find_pack(path, (), model), ""
    except (InputError, PackError) as error:
        return None, str(error)
