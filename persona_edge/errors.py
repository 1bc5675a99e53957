"""Every error that persona-edge raises on purpose.

Each message is one line that names the thing, shows the numbers and says what to do. The command line prints that line
and exits with the error's `exit_code`; a traceback is a bug.

    PersonaEdgeError
    ├── InputError                   an option or argument that cannot be used (exit code 2)
    │   └── PersonaNotFoundError     the pack or the shipped sets hold no such persona
    ├── CalibrationError             an empty or malformed calibration file
    │   └── CharacterCardError       a file that is not a character card, or a damaged one
    ├── SelectionError               no mask satisfies what was asked
    ├── ModelError
    │   ├── ModelNotFoundError       no such catalogue name, file or folder, or no source reachable
    │   ├── ModelFileError           a damaged model file: wrong checksum, truncated, not a GGUF
    │   ├── UnsupportedModelError    an architecture or a quantization that masks cannot be applied to
    │   └── ModelMismatchError       the pack was made from another model
    ├── PackError                    a file that is not a valid mask pack; see persona_edge.maskpack for its named kinds
    ├── WeightAccessError            the weights in memory cannot be found or written
    ├── GenerationError              the backend could not evaluate or generate
    ├── MissingDependencyError       an optional package is not installed
    └── OutputError                  a file cannot be written: read-only folder, full disk
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CalibrationError",
    "CharacterCardError",
    "GenerationError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
    "ModelFileError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "OutputError",
    "PackError",
    "PersonaEdgeError",
    "PersonaNotFoundError",
    "SelectionError",
    "UnsupportedModelError",
    "WeightAccessError",
]


class PersonaEdgeError(Exception):
    """Base of the tree. `exit_code` is what the command line exits with."""

    exit_code: ClassVar[int] = 1


class InputError(PersonaEdgeError):
    """An option or argument that cannot be used."""

    exit_code: ClassVar[int] = 2


class PersonaNotFoundError(InputError):
    """The pack, or the shipped calibration sets, hold no persona of this name."""


class CalibrationError(PersonaEdgeError):
    """An empty or malformed calibration file."""


class CharacterCardError(CalibrationError):
    """A file that is not a character card (V2 or V3, JSON or PNG), or a damaged one."""


class SelectionError(PersonaEdgeError):
    """No mask satisfies what was asked."""


class ModelError(PersonaEdgeError):
    """Something is wrong with the model."""


class ModelNotFoundError(ModelError):
    """No such catalogue name, file or folder, or none of its sources can be reached."""


class ModelFileError(ModelError):
    """A damaged model file: wrong checksum, truncated, or not a model at all."""


class UnsupportedModelError(ModelError):
    """An architecture or a quantization that masks cannot be applied to."""


class ModelMismatchError(ModelError):
    """The pack was made from another model."""


class PackError(PersonaEdgeError):
    """A file that is not a valid mask pack."""


class WeightAccessError(PersonaEdgeError):
    """The weights in memory cannot be found or written."""


class GenerationError(PersonaEdgeError):
    """The backend could not evaluate or generate."""


class MissingDependencyError(PersonaEdgeError):
    """An optional package is not installed."""


class OutputError(PersonaEdgeError):
    """A file cannot be written."""
