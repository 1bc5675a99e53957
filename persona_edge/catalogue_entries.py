"""What the catalogue knows of a model, as data, and the TOML files it is read from.

One file per model (`models/<name>.toml`, format in docs/models.md). A user's own files join them through the
environment variable `PERSONA_EDGE_CATALOGUE` (a folder); an entry there replaces the shipped one of the same name.
Nothing here touches the network or the cache: see `persona_edge.sources`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar, cast

from persona_edge.errors import ModelError

__all__ = [
    "DEFAULT_MODEL",
    "CatalogueEntry",
    "HubSource",
    "Licence",
    "Original",
    "PathSource",
    "Source",
    "WheelSource",
    "load_catalogue",
    "parse_entry",
]

DEFAULT_MODEL = "smollm2-135m"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Of whole files, embeddings and all. The mixed kinds vary a little between models.
_BITS_PER_WEIGHT = {"Q4_0": 4.6, "Q4_1": 5.1, "Q4_K_M": 4.9, "Q5_K_M": 5.7, "Q6_K": 6.6, "Q8_0": 8.5, "F16": 16.0}

T = TypeVar("T")


@dataclass(frozen=True)
class Licence:
    """`name` is the SPDX identifier where there is one, otherwise the licence's title; `url` is its text."""

    name: str
    url: str | None = None


@dataclass(frozen=True)
class Source:
    """One way to get the model's GGUF. `file` is its name in the cache, `size` is in bytes.

    `verified` says that this very file was fetched from this source and that `sha256` and `size` are what came. Without
    it the names are public knowledge that nobody has tried.
    """

    file: str
    quantization: str
    sha256: str | None
    size: int | None
    verified: bool

    def estimated_size(self, parameters: int) -> int | None:
        """Bytes that `parameters` weights take in this quantization, roughly; None for an unknown one."""
        bits = _BITS_PER_WEIGHT.get(self.quantization)
        return round(parameters * bits / 8) if bits is not None else None


@dataclass(frozen=True)
class HubSource(Source):
    """File `path` of the Hugging Face repository `repo`."""

    repo: str
    path: str

    def __str__(self) -> str:
        return f"hub {self.repo}/{self.path}"


@dataclass(frozen=True)
class WheelSource(Source):
    """Parts to be concatenated: `members[i]` is a path inside the wheel of `packages[i]` (`name==version`)."""

    packages: tuple[str, ...]
    members: tuple[str, ...]

    def __str__(self) -> str:
        more = f" … {self.packages[-1]}" if len(self.packages) > 1 else ""
        return f"wheel {self.packages[0]}{more}"


@dataclass(frozen=True)
class PathSource(Source):
    """A GGUF that already lies on this machine; it is used where it is."""

    path: Path

    def __str__(self) -> str:
        return f"path {self.path}"


@dataclass(frozen=True)
class Original:
    """The weights before quantization: a hub repository or a local Hugging Face folder; exactly one is set."""

    repo: str | None
    path: Path | None
    verified: bool


@dataclass(frozen=True)
class CatalogueEntry:
    """One model. `architecture` is GGUF's `general.architecture`; sources and originals are in order of preference."""

    name: str
    title: str
    architecture: str
    parameters: int
    kind: Literal["chat", "base"]
    licence: Licence
    note: str
    sources: tuple[Source, ...]
    originals: tuple[Original, ...]


def load_catalogue() -> Mapping[str, CatalogueEntry]:
    """Every entry by name, sorted: the shipped ones and those of the folder `PERSONA_EDGE_CATALOGUE`.

    Raises ModelError naming the file and the field when a TOML file is malformed, or when that folder does not exist.
    """
    entries = dict(_read_folder(resources.files("persona_edge.models"), None))
    own = os.environ.get("PERSONA_EDGE_CATALOGUE")
    if own:
        folder = Path(own).expanduser()
        if not folder.is_dir():
            raise ModelError(
                f"PERSONA_EDGE_CATALOGUE={own}: no such folder; name a folder of model TOML files or unset it"
            )
        entries.update(_read_folder(folder, folder))
    return {name: entries[name] for name in sorted(entries)}


def _read_folder(folder: Traversable, base: Path | None) -> Iterator[tuple[str, CatalogueEntry]]:
    for file in folder.iterdir():
        if file.name.endswith(".toml"):
            entry = parse_entry(file.read_bytes(), file.name, base)
            yield entry.name, entry


def parse_entry(data: bytes, file_name: str, base: Path | None = None) -> CatalogueEntry:
    """The entry in the TOML text `data`. Relative `path`s are taken from the folder `base`.

    Raises ModelError, prefixed with `file_name`, for anything but a complete and consistent entry.
    """
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file_name}: not valid TOML: {error}") from None
    fields = _Fields(table, file_name)
    entry = CatalogueEntry(
        name=fields.text("name", _NAME),
        title=fields.text("title"),
        architecture=fields.text("architecture"),
        parameters=fields.count("parameters"),
        kind=_kind(fields),
        licence=_licence(fields),
        note=fields.optional_text("note") or "",
        sources=tuple(_source(source, base) for source in fields.tables("source")),
        originals=tuple(_original(original, base) for original in fields.tables("original")),
    )
    fields.finish()
    if f"{entry.name}.toml" != file_name:
        raise ModelError(f"{file_name}: name is {entry.name!r}; the file must be called {entry.name}.toml")
    if not entry.sources and not entry.originals:
        raise ModelError(f"{file_name}: needs at least one [[source]] or [[original]]")
    return entry


def _kind(fields: _Fields) -> Literal["chat", "base"]:
    kind = fields.text("kind")
    if kind not in ("chat", "base"):
        raise fields.wrong("kind", f"{kind!r} must be 'chat' or 'base'")
    return cast(Literal["chat", "base"], kind)


def _licence(fields: _Fields) -> Licence:
    return Licence(fields.text("licence"), fields.optional_text("licence_url"))


def _original(fields: _Fields, base: Path | None) -> Original:
    kind = fields.text("kind")
    verified = fields.flag("verified")
    if kind == "hub":
        original = Original(repo=fields.text("repo", _REPO), path=None, verified=verified)
    elif kind == "path":
        original = Original(repo=None, path=_local(fields.text("path"), base), verified=verified)
    else:
        raise fields.wrong("kind", f"{kind!r} must be 'hub' or 'path'")
    fields.finish()
    return original


def _source(fields: _Fields, base: Path | None) -> Source:
    kind = fields.text("kind")
    quantization = fields.text("quantization")
    sha256 = fields.optional_text("sha256", _SHA256)
    size = fields.count("size") if "size" in fields.table else None
    verified = fields.flag("verified")
    if verified and (sha256 is None or size is None):
        raise fields.wrong("verified", "a verified source needs sha256 and size")
    source: Source
    if kind == "hub":
        path = fields.text("file")
        source = HubSource(
            PurePosixPath(path).name,
            quantization,
            sha256,
            size,
            verified,
            fields.text("repo", _REPO),
            _inside(fields, path),
        )
    elif kind == "wheel":
        packages, members = _wheel_parts(fields)
        if sha256 is None or size is None:
            raise fields.wrong("sha256", "a wheel source needs sha256 and size: they bound and check what is unpacked")
        source = WheelSource(fields.text("file", _FILE), quantization, sha256, size, verified, packages, members)
    elif kind == "path":
        local = _local(fields.text("path"), base)
        source = PathSource(local.name, quantization, sha256, size, verified, local)
    else:
        raise fields.wrong("kind", f"{kind!r} must be 'hub', 'wheel' or 'path'")
    fields.finish()
    return source


def _wheel_parts(fields: _Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    packages = fields.texts("packages", _REQUIREMENT)
    members = tuple(_inside(fields, member) for member in fields.texts("members"))
    if len(packages) != len(members):
        raise fields.wrong("members", f"{len(packages)} packages but {len(members)} members; one member per package")
    return packages, members


def _inside(fields: _Fields, path: str) -> str:
    """`path` when it stays inside the archive or repository it is relative to and ends in a plain file name."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not _FILE.fullmatch(pure.name):
        raise fields.wrong("file", f"{path!r} is not a plain relative path")
    return path


def _local(path: str, base: Path | None) -> Path:
    expanded = Path(path).expanduser()
    return expanded if expanded.is_absolute() or base is None else base / expanded


class _Fields:
    """One TOML table that checks types and remembers what was read, so that a misspelt key is an error too."""

    def __init__(self, table: Mapping[str, object], where: str) -> None:
        self.table = table
        self.where = where
        self._read: set[str] = set()

    def wrong(self, key: str, reason: str) -> ModelError:
        return ModelError(f"{self.where}: {key}: {reason}")

    def _get(self, key: str, kind: type[T], described: str) -> T:
        self._read.add(key)
        if key not in self.table:
            raise self.wrong(key, f"missing; it must be {described}")
        value = self.table[key]
        # TOML booleans are Python ints too, and no number here may be one.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(key, f"{value!r} must be {described}")
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        return self._checked(key, self._get(key, str, "a text"), pattern)

    def optional_text(self, key: str, pattern: re.Pattern[str] | None = None) -> str | None:
        return self.text(key, pattern) if key in self.table else None

    def texts(self, key: str, pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
        values = self._get(key, list, "a list of texts")
        if not values or not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "must be a list of texts with at least one")
        return tuple(self._checked(key, value, pattern) for value in values)

    def _checked(self, key: str, value: str, pattern: re.Pattern[str] | None) -> str:
        if not value.strip():
            raise self.wrong(key, "is empty")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.wrong(key, f"{value!r} does not have the form {pattern.pattern}")
        return value

    def count(self, key: str) -> int:
        value = self._get(key, int, "a whole number above 0")
        if value <= 0:
            raise self.wrong(key, f"{value} must be above 0")
        return value

    def flag(self, key: str) -> bool:
        return self._get(key, bool, "true or false")

    def tables(self, key: str) -> list[_Fields]:
        if key not in self.table:
            return []
        values = self._get(key, list, f"a list of tables [[{key}]]")
        if not all(isinstance(value, dict) for value in values):
            raise self.wrong(key, f"must be a list of tables [[{key}]]")
        return [_Fields(value, f"{self.where}: {key} {number}") for number, value in enumerate(values, 1)]

    def finish(self) -> None:
        unknown = sorted(set(self.table) - self._read)
        if unknown:
            raise self.wrong(unknown[0], "is not a field of the catalogue; see docs/models.md")
