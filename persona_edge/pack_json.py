"""Canonical JSON and typed access to it, for the header of a mask pack. Knows nothing of what the values mean.

Messages quote at most a few characters of a value, escaped: a header is untrusted and messages reach terminals.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any, NoReturn

from persona_edge.pack_errors import MalformedPackError, PackHeaderMalformedError, PackHeaderNotCanonicalError

__all__ = [
    "NAME_LIMIT",
    "as_array",
    "as_integer",
    "as_members",
    "as_name",
    "as_object",
    "as_text",
    "canonical_json",
    "parse_json",
    "short",
]

NAME_LIMIT = 64  # characters
INTEGER_LIMIT = 2**53  # exact in every JSON reader, those that read numbers as doubles included


def canonical_json(value: object) -> bytes:
    """The one spelling of `value` that the format accepts: sorted keys, no spaces, UTF-8.

    Raises PackHeaderMalformedError for what JSON cannot hold (NaN, half a surrogate pair).
    """
    try:
        spelled = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return spelled.encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise PackHeaderMalformedError(f"not a JSON value: {error}") from None


def parse_json(data: bytes) -> object:
    """The value that `data` spells canonically; PackHeaderMalformedError or PackHeaderNotCanonicalError otherwise."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PackHeaderMalformedError(f"the header is not JSON in UTF-8: {error}") from None
    try:
        canonical = canonical_json(value)
    except PackHeaderMalformedError as error:
        raise PackHeaderNotCanonicalError(str(error)) from None
    if canonical != data:
        raise PackHeaderNotCanonicalError("the header is not canonical JSON (sorted keys, no spaces, shortest numbers)")
    return value


def as_members(value: object, where: str, *keys: str) -> list[Any]:
    """The values of exactly these keys of a JSON object, in this order."""
    found = as_object(value, where)
    if found.keys() != set(keys):
        odd = short(sorted(found.keys() ^ set(keys)))
        raise PackHeaderMalformedError(f"{where} has not exactly the keys {', '.join(keys)}: see {odd}")
    return [found[key] for key in keys]


def as_object(value: object, where: str) -> dict[str, Any]:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise PackHeaderMalformedError(f"{where} is not a JSON object")
    return value


def as_array(value: object, where: str) -> list[Any]:
    """`value` if it is a JSON array."""
    if not isinstance(value, list):
        raise PackHeaderMalformedError(f"{where} is not a JSON array")
    return value


def as_integer(value: object, where: str) -> int:
    """`value` if it is a whole number from 0 to 2**53, spelled as one (no decimal point)."""
    if type(value) is not int or not 0 <= value <= INTEGER_LIMIT:
        raise PackHeaderMalformedError(f"{where} is not a whole number from 0 to 2**53")
    return value


def as_text(value: object, where: str) -> str:
    """`value` if it is a string."""
    if not isinstance(value, str):
        raise PackHeaderMalformedError(f"{where} is not a string")
    return value


def as_name(value: object, where: str, error: type[MalformedPackError]) -> str:
    """A name that is safe to print in a terminal: no control, format or unassigned characters, no odd spaces."""
    found = as_text(value, where)
    if not 0 < len(found) <= NAME_LIMIT or not found.isprintable() or found != found.strip():
        raise error(f"{where}: the name {short(found)} is not 1 to {NAME_LIMIT} printable characters")
    if not unicodedata.is_normalized("NFC", found):
        raise error(f"{where}: the name {short(found)} is not in Unicode's normal form C")
    return found


def short(value: object) -> str:
    """`value` in ASCII, on one line, cut to what a message can carry."""
    spelled = ascii(value[:80] if isinstance(value, str) else value)
    return spelled if len(spelled) <= 80 else spelled[:77] + "..."


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {short(key)} is given twice")
        found[key] = value
    return found


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")
