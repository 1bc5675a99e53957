"""A calibration set of one's own: from a file of answers, from two descriptions, or from a character card.

What can be known to be wrong is found before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from persona_edge.contrast_writer import (
    Manner,
    Progress,
    WritingRequest,
    generation_prompts,
    manner_of_card,
    manner_of_description,
    neutral_manner,
    write_contrasts,
)
from persona_edge.contrasts import CalibrationSet, load_contrasts
from persona_edge.downloads import Progress as DownloadProgress
from persona_edge.downloads import silent
from persona_edge.errors import InputError
from persona_edge.set_file import check_output, checked_name, renamed, write_set

__all__ = ["NewSet", "NewSetRequest", "new_set"]

_CONTEXT = 2048
_SOURCES = "--from FILE, --card FILE, or --positive-description and --negative-description"


@dataclass(frozen=True)
class NewSetRequest:
    """What to make a set from: `answers`, `card`, or descriptions; the rest says how. None leaves it to the source.

    `n_contrasts` None takes 100, or as many as there are prompts; it, `prompts`, `seed`, `temperature` and `n_threads`
    concern sets that a model writes.
    """

    output: Path
    answers: Path | None = None
    card: Path | None = None
    positive_description: str | None = None
    negative_description: str | None = None
    axis: str | None = None
    positive: str | None = None
    negative: str | None = None
    model: str | None = None
    n_contrasts: int | None = None
    prompts: Path | None = None
    seed: int = 0
    temperature: float = 0.7
    n_threads: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class NewSet:
    """The set that was written, and what is worth knowing about how."""

    contrasts: CalibrationSet
    notes: tuple[str, ...]


def new_set(request: NewSetRequest, progress: Progress, download_progress: DownloadProgress = silent) -> NewSet:
    """Write the set that `request` describes to its output.

    Raises InputError for options that do not go together, CalibrationError for the source file, OutputError, and what
    opening a model and writing with it raise.
    """
    by_description = request.positive_description is not None or request.negative_description is not None
    if (request.answers is not None) + (request.card is not None) + by_description != 1:
        raise InputError(f"say what to make the set from, in one way: {_SOURCES}")
    check_output(request.output, overwrite=request.overwrite)
    if request.answers is not None:
        return _from_answers(request, request.answers)
    positive, negative = _manners(request)
    return _from_model(request, positive, negative, progress, download_progress)


def _from_answers(request: NewSetRequest, answers: Path) -> NewSet:
    found = renamed(load_contrasts(answers), axis=request.axis, positive=request.positive, negative=request.negative)
    write_set(request.output, found)
    return NewSet(found, ())


def _manners(request: NewSetRequest) -> tuple[Manner, Manner]:
    if request.card is not None:
        from persona_edge.character_card import load_card

        character = manner_of_card(load_card(request.card))
        pole = checked_name(request.positive, "--positive") if request.positive is not None else character.pole
        return Manner(pole, character.description), _neutral(request)
    if request.positive is None or request.positive_description is None:
        raise InputError("a described pole needs a name and a description: --positive and --positive-description")
    positive = manner_of_description(request.positive, request.positive_description)
    if request.negative_description is None:
        return positive, _neutral(request)
    if request.negative is None:
        raise InputError("the described opposite has no name; pass --negative")
    return positive, manner_of_description(request.negative, request.negative_description)


def _neutral(request: NewSetRequest) -> Manner:
    return neutral_manner() if request.negative is None else neutral_manner(request.negative)


def _from_model(
    request: NewSetRequest, positive: Manner, negative: Manner, progress: Progress, download_progress: DownloadProgress
) -> NewSet:
    from persona_edge.catalogue import resolve_model
    from persona_edge.model_speaker import ModelSpeaker
    from persona_edge.runtime.session import PersonaRuntime

    if request.model is None:
        raise InputError("the answers are written by a model; pass --model")
    prompts = generation_prompts(request.prompts)
    n_contrasts = request.n_contrasts if request.n_contrasts is not None else min(100, len(prompts))
    axis = checked_name(request.axis if request.axis is not None else request.output.stem, "the axis")
    wanted = WritingRequest(axis, positive, negative, prompts, n_contrasts, request.seed)
    wanted.check()
    path = resolve_model(request.model, progress=download_progress).require_gguf()
    with PersonaRuntime.open(path, n_ctx=_CONTEXT, n_threads=request.n_threads) as runtime:
        # Files of one name and size are taken for one model.
        speaker = ModelSpeaker(runtime, f"{path.name}, {path.stat().st_size} bytes", temperature=request.temperature)
        written = write_contrasts(wanted, speaker, request.output, progress)
    reasons = ", ".join(f"{reason} {n}" for reason, n in written.dropped.items()) or "none"
    notes = [f"{written.n_attempts} pairs of answers tried; dropped: {reasons}"]
    if len(written.contrasts) < n_contrasts:
        notes.append(
            f"only {len(written.contrasts)} of {n_contrasts} contrasts; a larger model or more prompts make more"
        )
    return NewSet(written.contrasts, tuple(notes))
