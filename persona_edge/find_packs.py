"""Which mask packs there are for a model, and which of them holds a persona.

The exporter writes `<model>.<set>.maskpack` next to `<model>.gguf`; those are the packs that are found without being
named. When several hold what is wanted, the newest is taken, and a note says so. A pack that is damaged is passed over
with a note as long as another one serves. Some models of the catalogue have a pack that ships with persona-edge, beside
their entry in `models/`; it serves when none next to the model does.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from persona_edge.errors import InputError, PackError, PersonaNotFoundError
from persona_edge.maskpack import PACK_SUFFIX, MaskPack
from persona_edge.masks import match_name

__all__ = ["FoundPack", "export_command", "find_pack", "missing_personas", "open_pack", "packs_beside", "shipped_packs"]


@dataclass(frozen=True)
class FoundPack:
    """A pack that was read and checked, where it lies, and what the user should know about the choice."""

    path: Path
    pack: MaskPack
    note: str | None = None


def packs_beside(model: Path) -> tuple[Path, ...]:
    """The packs of GGUF file `model` in its folder, newest first (by modification time, then by name)."""
    stems = [file.stem for file in model.parent.glob("*.gguf")]
    found = [path for path in model.parent.glob(f"*{PACK_SUFFIX}") if _owner(path, [*stems, model.stem]) == model.stem]
    return tuple(sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name)))


def shipped_packs(model: Path) -> tuple[Path, ...]:
    """The packs of persona-edge's own for GGUF file `model` or the ONNX graph in the folder exported from it, by name.

    They are found by the file's name. Whether they belong to its weights is checked when they are attached.
    """
    file = Path(model.parent.name if model.suffix == ".onnx" else model.name)
    folder = Path(str(resources.files("persona_edge.models")))
    return tuple(sorted(path for path in folder.glob(f"*{PACK_SUFFIX}") if path.stem.rpartition(".")[0] == file.stem))


def open_pack(path: Path, wanted: Sequence[str] = ()) -> FoundPack:
    """The pack at `path`, which has to hold every persona of `wanted`. PackError or PersonaNotFoundError otherwise."""
    pack = MaskPack.open(path)
    lacking = missing_personas(pack, wanted)
    if lacking:
        raise PersonaNotFoundError(f"no persona {lacking[0]!r} in {path}; it has {', '.join(pack.personas)}")
    return FoundPack(path, pack)


def find_pack(model: Path, wanted: Sequence[str], model_argument: str) -> FoundPack:
    """The newest pack next to `model` that holds every persona of `wanted` (none: any pack), or else a shipped one.

    `model_argument` is what the user calls the model; the message tells them how to make a pack for it. Raises
    PersonaNotFoundError when packs lack a persona, InputError when there is no pack at all, and the PackError of the
    only pack when that is damaged.
    """
    beside = packs_beside(model)
    readable, damaged = _read_all([*beside, *shipped_packs(model)])
    holding = [found for found in readable if not missing_personas(found.pack, wanted)]
    if holding:
        n_beside = sum(found.path in beside for found in holding)
        return FoundPack(holding[0].path, holding[0].pack, _note(holding[0].path, n_beside, damaged, wanted))
    if damaged and not readable:
        raise damaged[0]
    if readable:
        nearest = min(readable, key=lambda found: len(missing_personas(found.pack, wanted)))
        lacking = missing_personas(nearest.pack, wanted)[0]
        raise PersonaNotFoundError(
            f"no persona {lacking!r} in {_names([found.path for found in readable])}, which has "
            f"{', '.join(nearest.pack.personas)}; pass another pack with --pack, or make one with: "
            f"{export_command(model_argument, lacking)}"
        )
    first = wanted[0] if wanted else None
    raise InputError(
        f"no mask pack next to {model}; make one with: {export_command(model_argument, first)} (or pass --pack)"
    )


def export_command(model_argument: str, persona: str | None = None) -> str:
    """The command that makes a pack with `persona`: of a set that ships, otherwise of a file of the user's own."""
    return f"persona-edge export --model {shlex.quote(model_argument)} --personas {_set_with(persona)}"


def missing_personas(pack: MaskPack, wanted: Sequence[str]) -> list[str]:
    """Those of `wanted` that `pack` does not hold, whatever their letter case."""
    return [name for name in wanted if match_name(name, pack.personas) is None]


def _owner(pack: Path, stems: Sequence[str]) -> str:
    """The model a pack is named after: beside `a.gguf` and `a.Q4.gguf`, `a.Q4.x.maskpack` belongs to the second."""
    return max((stem for stem in stems if pack.name.startswith(f"{stem}.")), key=len, default="")


def _read_all(paths: Sequence[Path]) -> tuple[list[FoundPack], list[PackError]]:
    readable, damaged = [], []
    for path in paths:
        try:
            readable.append(FoundPack(path, MaskPack.open(path)))
        except PackError as error:
            damaged.append(error)
    return readable, damaged


def _note(chosen: Path, n_beside: int, damaged: Sequence[PackError], wanted: Sequence[str]) -> str | None:
    notes = []
    if n_beside > 1:
        held = f" with {', '.join(wanted)}" if wanted else ""
        notes.append(f"using {chosen.name}, the newest of {n_beside} packs{held}; --pack chooses another")
    notes += [f"passed over a damaged pack: {error}" for error in damaged]
    return "; ".join(notes) or None


def _names(paths: Sequence[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"the {len(paths)} packs of the model, e.g. {paths[0].name}"


def _set_with(persona: str | None) -> str:
    from persona_edge.persona_sets import load_persona_set, shipped_sets

    names = [shipped.name for shipped in shipped_sets()]
    if persona is None:
        return names[0]
    for name in names:
        if persona.casefold() in {known.casefold() for known in load_persona_set(name).personas}:
            return name
    return "CONTRASTS.jsonl"
