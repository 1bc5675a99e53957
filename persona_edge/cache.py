"""The cache folder, and the fetched models in it: their lock, and the receipts by which damage shows.

    <cache>/models/<name>/<file>.gguf        the weights
    <cache>/models/<name>/<file>.gguf.json   the receipt: SHA-256, size in bytes and source, written when it was fetched
    <cache>/models/<name>/.lock              held while a process fetches into the folder
    <cache>/models/<name>/.downloads/        what a fetch that did not finish may reuse
    <cache>/statistics/<fingerprint>/        what calibration computed (persona_edge.calibration)

Knows nothing of the catalogue or the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from persona_edge.errors import OutputError
from persona_edge.files import write_atomically

__all__ = [
    "Receipt",
    "cache_folder",
    "exclusive",
    "file_sha256",
    "model_folder",
    "remove_stale_parts",
    "writing_to",
]

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """`PERSONA_EDGE_CACHE` when set, otherwise `persona-edge` in the platform's cache folder of this user."""
    chosen = os.environ.get("PERSONA_EDGE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "persona-edge"


def model_folder(name: str) -> Path:
    """Where the files of catalogue entry `name` are kept; it need not exist."""
    return cache_folder() / "models" / name


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns an OSError of the block into an OutputError about `folder`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write to the cache {folder}: {reason}; "
            "free space there or set PERSONA_EDGE_CACHE to another folder"
        ) from error


def file_sha256(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """SHA-256 of the file, hexadecimal. `progress` is told the bytes read so far. Raises OSError."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(done)
    return digest.hexdigest()


@dataclass(frozen=True)
class Receipt:
    """What was fetched: with it a later run notices damage, also where the catalogue knows no checksum."""

    sha256: str
    size: int
    source: str

    @classmethod
    def read(cls, path: Path) -> Receipt | None:
        """The receipt of the cached file `path`; None when there is none that can be read."""
        try:
            data = json.loads(_receipt_path(path).read_bytes())
            return cls(sha256=str(data["sha256"]), size=int(data["size"]), source=str(data["source"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Leaves the receipt next to the cached file `path`. Raises OutputError."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(_receipt_path(path), text.encode())


def _receipt_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def remove_stale_parts(folder: Path) -> None:
    """Removes half-written files of processes that were killed. Only the holder of the folder's lock may call it."""
    for path in folder.glob(".persona-edge-*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of `folder`, which is created; calls `waiting` once when another process has it.

    The lock belongs to the open file, so a killed process leaves none behind. Raises OSError when the folder cannot be
    written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        if not _try_lock(file.fileno()):
            waiting()
            while not _try_lock(file.fileno()):
                time.sleep(0.2)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
