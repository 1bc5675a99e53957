"""What `--model` may be, and the files it stands for.

    smollm2-135m              a name of the catalogue (`persona-edge models list`)
    ./weights.gguf            a GGUF file, whatever it is called (Ollama's blobs too)
    ./Llama-3.2-1B-Instruct   a folder in Hugging Face's layout: config.json beside the weights
    org/name                  a repository on the Hugging Face hub

Anything with a path separator that exists on disk is a path; a bare name is looked up in the catalogue first, so write
`./name` for a file or folder that is called like a model.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from persona_edge.cache import cache_folder
from persona_edge.catalogue_entries import DEFAULT_MODEL, CatalogueEntry, load_catalogue
from persona_edge.downloads import Progress, silent
from persona_edge.errors import ModelError, ModelNotFoundError
from persona_edge.gguf_magic import check_is_gguf
from persona_edge.sources import locate, pull

__all__ = [
    "DEFAULT_MODEL",
    "CatalogueEntry",
    "ResolvedModel",
    "cache_folder",
    "find_entry",
    "load_catalogue",
    "pull",
    "resolve_model",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LIST_COMMAND = "persona-edge models list"


@dataclass(frozen=True)
class ResolvedModel:
    """What a model argument stands for. Exactly one of `gguf_path`, `folder` and `hub_id` is set.

    `folder` holds original weights in Hugging Face's layout, `hub_id` names them on the hub (nothing was downloaded).
    `entry` is the catalogue's, when the argument named one.
    """

    name: str
    gguf_path: Path | None
    folder: Path | None
    hub_id: str | None
    entry: CatalogueEntry | None

    def require_gguf(self) -> Path:
        """The GGUF file; ModelError when the argument stands for original weights."""
        if self.gguf_path is None:
            raise ModelError(
                f"{self.folder or self.hub_id} holds original weights; pass a .gguf file or a name of {_LIST_COMMAND}"
            )
        return self.gguf_path


def resolve_model(
    argument: str | os.PathLike[str],
    *,
    want: Literal["gguf", "original"] = "gguf",
    fetch: bool = True,
    progress: Progress = silent,
) -> ResolvedModel:
    """The files that `argument` stands for; see the module's docstring for what it may be.

    `want` chooses between the GGUF and the original weights of a catalogue name; a path or hub id is what it is. With
    `fetch` a GGUF that is not on this machine is fetched (`persona_edge.sources.pull` lists what that raises); original
    weights on the hub are only named. Raises ModelNotFoundError for what cannot be found, ModelFileError for a file
    that is not a GGUF.
    """
    text = os.fspath(argument)
    entry = load_catalogue().get(text.casefold())
    if entry is not None:
        return _resolve_original(entry) if want == "original" else _resolve_gguf(entry, fetch, progress)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return ResolvedModel(path.resolve().name, None, _checked_folder(path), None, None)
    if text and path.exists():
        check_is_gguf(path)
        return ResolvedModel(path.stem, path, None, None, None)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return ResolvedModel(text.partition("/")[2], None, None, text, None)
    raise _not_found(text)


def find_entry(name: str) -> CatalogueEntry:
    """The catalogue entry `name`, case-insensitive; ModelNotFoundError suggests similar names."""
    entry = load_catalogue().get(name.casefold())
    if entry is None:
        raise _not_found(name)
    return entry


def _resolve_gguf(entry: CatalogueEntry, fetch: bool, progress: Progress) -> ResolvedModel:
    path = pull(entry, progress) if fetch else locate(entry)
    if path is None:
        raise ModelNotFoundError(f"{entry.name} is not on this machine; run persona-edge models pull {entry.name}")
    check_is_gguf(path)
    return ResolvedModel(entry.name, path, None, None, entry)


def _resolve_original(entry: CatalogueEntry) -> ResolvedModel:
    """The first original that is a folder here, otherwise the first on the hub."""
    for original in entry.originals:
        if original.path is not None and original.path.is_dir():
            return ResolvedModel(entry.name, None, _checked_folder(original.path), None, entry)
    for original in entry.originals:
        if original.repo is not None:
            return ResolvedModel(entry.name, None, None, original.repo, entry)
    raise ModelNotFoundError(
        f"{entry.name}: the catalogue knows no original weights; pass a Hugging Face folder or a hub id"
    )


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(file.name for file in path.glob("*.gguf"))
    if files:
        raise ModelNotFoundError(f"{path}: a folder without config.json; pass one of its files, e.g. {path / files[0]}")
    raise ModelNotFoundError(
        f"{path}: a folder without config.json is not a Hugging Face model; pass one, or a .gguf file"
    )


def _not_found(text: str) -> ModelNotFoundError:
    if not text:
        return ModelNotFoundError(f"the model's name is empty; see {_LIST_COMMAND}")
    if text.endswith(".gguf") or _looks_like_path(text):
        return ModelNotFoundError(f"no such file or folder: {text}; {_LIST_COMMAND} shows names that need no path")
    return ModelNotFoundError(f"no model {text!r}{_suggestion(text, load_catalogue())}; {_LIST_COMMAND} shows all")


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "~")) or "/" in text or os.sep in text


def _suggestion(text: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(text.casefold(), list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
