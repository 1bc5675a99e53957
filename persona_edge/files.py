"""Files that appear whole or not at all.

What is written goes to a temporary file in the target's folder, is flushed to the disk, and then takes the target's
place in one step. After any failure, Ctrl-C included, the target is what it was before and the temporary file is gone.
(A process killed outright can leave a `.persona-edge-*.tmp` behind, never half a target.)
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from persona_edge.errors import OutputError

__all__ = ["atomic_output", "write_atomically"]


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Make `data` the content of the file at `path`; OutputError names the path and the reason."""
    with atomic_output(path) as file:
        file.writelines([data] if isinstance(data, bytes) else data)


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which becomes `path` when the block ends without an exception.

    OSError from writing, in the block too, becomes OutputError. Other exceptions pass, and nothing is left behind.
    """
    temporary = path.parent / f".persona-edge-{secrets.token_hex(8)}.tmp"
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise  # the block failed to read some other file: not ours to explain
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}; nothing was written. {_remedy(path, error)}") from error
    _sync_folder(path.parent)


def _remedy(path: Path, error: OSError) -> str:
    if not path.parent.is_dir():
        return f"Create the folder {path.parent} first."
    if isinstance(error, PermissionError):
        return "Choose a folder that you may write to."
    return "Free some space, or choose another place."


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system has such a thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
