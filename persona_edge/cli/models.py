"""`persona-edge models`: what the catalogue knows, where it is on this machine, and fetching it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from persona_edge.catalogue import CatalogueEntry, find_entry, load_catalogue, resolve_model
from persona_edge.cli.progress import ProgressLine, bytes_text
from persona_edge.find_packs import shipped_packs
from persona_edge.sources import locate, place_of, pull

__all__ = ["models"]

_COLUMNS = ("name", "parameters", "architecture", "quantization", "kind", "size", "licence", "packs", "where")


@click.group()
def models() -> None:
    """List, locate and fetch the models of the catalogue."""


@models.command("list", short_help="Show every model and where it is.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with everything the catalogue knows.")
def list_models(as_json: bool) -> None:
    """Show every model and where it is: cached, packaged, local, damaged, or still to be downloaded."""
    entries = load_catalogue().values()
    if as_json:
        click.echo(json.dumps([_as_json(entry) for entry in entries], indent=2))
        return
    for line in _table([_COLUMNS, *(_row(entry) for entry in entries)]):
        click.echo(line)
    click.echo("\n~ estimated; sources of these are public knowledge that has not been tried (docs/models.md)")


@models.command("path", short_help="Print where a model's GGUF lies.")
@click.argument("name")
def model_path(name: str) -> None:
    """Print where the GGUF of model NAME lies on this machine; fails when it does not."""
    click.echo(resolve_model(find_entry(name).name, fetch=False).require_gguf())


@models.command("pull", short_help="Fetch models and check them.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--verify", is_flag=True, help="Compute the SHA-256 also of a file that is here; fetch again if it is wrong."
)
def pull_models(names: tuple[str, ...], verify: bool) -> None:
    """Fetch models into the cache, check them, and print where they are."""
    entries = [find_entry(name) for name in names]
    for entry in entries:
        with ProgressLine() as progress:
            path = pull(entry, progress, verify=verify)
        click.echo(path)


def _row(entry: CatalogueEntry) -> tuple[str, ...]:
    quantization = entry.sources[0].quantization if entry.sources else "-"
    return (
        entry.name,
        _parameters(entry.parameters),
        entry.architecture,
        quantization,
        entry.kind,
        _size(entry),
        entry.licence.name,
        ", ".join(_sets(entry)) or "-",
        place_of(entry),
    )


def _packs(entry: CatalogueEntry) -> list[Path]:
    """The packs that ship for the files that `entry` knows."""
    return [
        pack for file in dict.fromkeys(source.file for source in entry.sources) for pack in shipped_packs(Path(file))
    ]


def _sets(entry: CatalogueEntry) -> list[str]:
    """The names of the persona sets of those packs: `m.Q4.mbti16.maskpack` holds `mbti16`."""
    return [pack.stem.rpartition(".")[2] for pack in _packs(entry)]


def _parameters(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _size(entry: CatalogueEntry) -> str:
    if not entry.sources:
        return "-"
    source = entry.sources[0]
    if source.size is not None:
        return bytes_text(source.size)
    estimate = source.estimated_size(entry.parameters)
    return f"~{bytes_text(estimate)}" if estimate is not None else "?"


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _as_json(entry: CatalogueEntry) -> dict[str, object]:
    path = locate(entry)
    return {
        "name": entry.name,
        "title": entry.title,
        "architecture": entry.architecture,
        "parameters": entry.parameters,
        "kind": entry.kind,
        "licence": entry.licence.name,
        "licence_url": entry.licence.url,
        "note": entry.note,
        "where": place_of(entry),
        "path": str(path) if path is not None else None,
        "packs": [str(pack) for pack in _packs(entry)],
        "sources": [
            {
                "source": str(source),
                "file": source.file,
                "quantization": source.quantization,
                "sha256": source.sha256,
                "size": source.size,
                "verified": source.verified,
            }
            for source in entry.sources
        ],
        "originals": [
            {
                "repo": original.repo,
                "path": str(original.path) if original.path else None,
                "verified": original.verified,
            }
            for original in entry.originals
        ],
    }
