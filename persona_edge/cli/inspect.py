"""`persona-edge inspect`: prints what a mask pack holds, its report, and where in the model its masks lie."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from persona_edge.cli.progress import ProgressLine

if TYPE_CHECKING:
    from persona_edge.maskpack import MaskPack
    from persona_edge.sketch import SketchResult

__all__ = ["inspect"]


@click.command()
@click.argument("pack_path", metavar="PACK", type=click.Path(path_type=Path))
@click.option("--picture/--no-picture", default=True, show_default=True, help="Draw how much of each tensor is gated.")
@click.option("--layers", is_flag=True, help="Write percentages instead of bars; with --json, add each tensor's share.")
@click.option("--pole", help="Only the mask of this pole in the picture.  [default: all poles together]")
@click.option("--persona", help="Only the mask of this persona in the picture.")
@click.option("--verify", metavar="MODEL", help="Check that the pack belongs to this model.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def inspect(
    *,
    pack_path: Path,
    picture: bool,
    layers: bool,
    pole: str | None,
    persona: str | None,
    verify: str | None,
    as_json: bool,
) -> None:
    """Show what a mask pack holds and how good it is.

    `bound` is the least that a memoryless code would need for a plane's positions. `preferred` is the share of held-out
    questions on which the model likes the answer in the pole's manner better, as base and as the pole.
    """
    from persona_edge.maskpack import MaskPack
    from persona_edge.pack_description import describe, json_text, pack_lines
    from persona_edge.pack_picture import picture_lines
    from persona_edge.terminal_text import can_show, printable, spell

    pack = MaskPack.open(pack_path)
    width, unicode = shutil.get_terminal_size().columns, can_show(sys.stdout, "█▏·")
    drawn = picture_lines(pack, pole=pole, persona=persona, width=width, numbers=layers, unicode=unicode)
    verified = _verify(pack, verify) if verify is not None else None
    if as_json:
        click.echo(json_text({"file": str(pack_path), **describe(pack, tensors=layers, verified=verified)}))
        return
    lines = pack_lines(pack, str(pack_path), width=width)
    if verified is not None:
        agreeing = f"{verified.n_agreeing:,} of {verified.n_samples:,} sampled signs agree"
        lines += ["", f"belongs to {printable(str(verify))}: {agreeing}"]
    for line in [*lines, "", *drawn] if picture or layers else lines:
        click.echo(spell(line, sys.stdout))


def _verify(pack: MaskPack, model: str) -> SketchResult:
    from persona_edge.catalogue import resolve_model
    from persona_edge.exporters.to_gguf import read_gguf
    from persona_edge.sketch import check_identity

    with ProgressLine() as progress:
        file = read_gguf(resolve_model(model, progress=progress).require_gguf())
    return check_identity(pack.identity, file.architecture, file.shapes(), file.read_weights)
