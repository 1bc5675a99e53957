"""The process that onnxruntime-genai's model builder runs in: how it ended as an exit code, and why as a last line.

The builder is a program that knows no callers: whatever it cannot do, it raises. What it says is for people and changes
with its versions, so only the types of its exceptions are read: NotImplementedError for a model that it does not know,
OSError for a disk that has no room.
"""

from __future__ import annotations

import errno
import runpy
import sys
import textwrap
from typing import Final

__all__ = ["FAILED", "FULL_DISK", "UNKNOWN_MODEL", "main"]

BUILDER: Final = "onnxruntime_genai.models.builder"
FAILED: Final = 1
UNKNOWN_MODEL: Final = 10
FULL_DISK: Final = 11


def main() -> int:
    """Run the builder with this process's arguments: 0, or one of the exit codes above after one line on stderr."""
    try:
        runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)
    except NotImplementedError as error:
        return _ended(error, UNKNOWN_MODEL)
    except OSError as error:
        return _ended(error, FULL_DISK if error.errno == errno.ENOSPC else FAILED)
    except Exception as error:
        return _ended(error, FAILED)
    return 0


def _ended(error: Exception, exit_code: int) -> int:
    said = f"{type(error).__name__}: {error}"
    print(textwrap.shorten(said, 300, placeholder=" …"), file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
