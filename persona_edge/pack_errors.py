"""What can be wrong with a mask pack, one class per kind. Raised for files that are read and for content to be written.

PackError                              persona_edge.errors
└── MalformedPackError
    ├── PackUnreadableError            the file cannot be opened or read
    ├── NotAPackError                  it does not begin with the magic bytes
    ├── PackVersionError               a version that this reader does not know
    ├── PackTruncatedError             it ends before its header or sections do
    ├── PackHeaderError
    │   ├── PackHeaderTooLargeError    the header is longer than a header may be
    │   ├── PackHeaderMalformedError   not UTF-8, not JSON, a key missing, unknown or twice, a value of another type
    │   └── PackHeaderNotCanonicalError   valid JSON, spelled otherwise than the format demands
    ├── PackChecksumError              header or section bytes differ from their SHA-256
    ├── PackSectionTableError          holes, overlaps, bytes after the last section, wrong names or kinds
    ├── PackIdentityError              no valid architecture or tensor list
    ├── PackSketchError                the sign sketch is missing or cannot be decoded
    ├── PackCompositionError           poles and personas: none, twice, unknown, or with unprintable names
    ├── PackPlaneError                 a plane's positions or counts are impossible
    └── PackGateError                  a gate that is not a finite number a scale can be multiplied by
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from persona_edge.errors import PackError

__all__ = [
    "MalformedPackError",
    "NotAPackError",
    "PackChecksumError",
    "PackCompositionError",
    "PackGateError",
    "PackHeaderError",
    "PackHeaderMalformedError",
    "PackHeaderNotCanonicalError",
    "PackHeaderTooLargeError",
    "PackIdentityError",
    "PackPlaneError",
    "PackSectionTableError",
    "PackSketchError",
    "PackTruncatedError",
    "PackUnreadableError",
    "PackVersionError",
    "reading",
    "writing",
]


class MalformedPackError(PackError):
    """Base of the kinds; `remedy` is what the reader of a bad file can do."""

    remedy: ClassVar[str] = "the tool that wrote it is at fault; ask its publisher for a valid pack"


class PackUnreadableError(MalformedPackError):
    """The file cannot be opened or read."""

    remedy = "check the path and its permissions"


class NotAPackError(MalformedPackError):
    """The file does not begin with the magic bytes."""

    remedy = "name a .maskpack file; if this is one, it was damaged on its way: download it again"


class PackVersionError(MalformedPackError):
    """A version of the format that this reader does not know."""

    remedy = "upgrade persona-edge, or get a pack of a version that it reads"


class PackTruncatedError(MalformedPackError):
    """The file ends before its header or its sections do."""

    remedy = "download it again"


class PackHeaderError(MalformedPackError):
    """Something is wrong with the header."""


class PackHeaderTooLargeError(PackHeaderError):
    """The header is longer than a header may be."""


class PackHeaderMalformedError(PackHeaderError):
    """Not UTF-8, not JSON, a key missing, unknown or given twice, or a value of another type."""


class PackHeaderNotCanonicalError(PackHeaderError):
    """Valid JSON that is spelled otherwise than the format demands."""


class PackChecksumError(MalformedPackError):
    """Header or section bytes differ from their SHA-256."""

    remedy = "download it again"


class PackSectionTableError(MalformedPackError):
    """Holes, overlaps, bytes after the last section, wrong names or kinds."""


class PackIdentityError(MalformedPackError):
    """No valid architecture or tensor list."""


class PackSketchError(MalformedPackError):
    """The sign sketch is missing or cannot be decoded."""


class PackCompositionError(MalformedPackError):
    """Poles and personas: none, twice, unknown, or with names that cannot be printed."""


class PackPlaneError(MalformedPackError):
    """A plane's positions or counts are impossible."""


class PackGateError(MalformedPackError):
    """A gate that is not a finite number that a scale can be multiplied by."""


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Complete the errors of the block to one line: which file, what, what to do."""
    try:
        yield
    except MalformedPackError as error:
        raise type(error)(f"{source}: {error}; {error.remedy}") from error.__cause__


@contextlib.contextmanager
def writing(target: str) -> Iterator[None]:
    """Complete the errors of the block for content that cannot become a pack."""
    try:
        yield
    except MalformedPackError as error:
        raise type(error)(f"cannot make {target}: {error}; nothing was written") from error.__cause__
