"""`persona-edge export`: calibrate, score, select, and write a mask pack next to the model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from persona_edge.cli.progress import ProgressLine, StageProgress, bytes_text

__all__ = ["export"]

_METHODS = ("contrastive-fisher", "wanda", "contrastive-wanda", "contrastive-sparse")


@click.command()
@click.option(
    "--model", required=True, metavar="MODEL", help="Catalogue name, path to a .gguf, or a Hugging Face folder."
)
@click.option(
    "--personas", required=True, metavar="SET", help="A shipped set such as mbti16, or a .jsonl or .csv of contrasts."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="The pack; default: next to the model.")
@click.option(
    "--format", "formats", default="gguf", show_default=True, metavar="FORMATS", help="gguf, onnx, or gguf,onnx."
)
@click.option("--original", metavar="MODEL", help="Calibrate on these original weights instead of the GGUF's own.")
@click.option("--method", type=click.Choice(_METHODS), default="contrastive-fisher", show_default=True)
@click.option("--granularity", type=click.Choice(["group", "weight"]), default=None, help="What one gate multiplies.")
@click.option("--max-chat-kl", type=float, default=0.18, show_default=True, help="Most drift on chat, nats per token.")
@click.option("--max-perplexity-ratio", type=float, default=1.018, show_default=True, help="Most perplexity, vs base.")
@click.option(
    "--composition-limit",
    type=float,
    default=2.5,
    show_default=True,
    help="Most drift of composed personas, in limits of a pole.",
)
@click.option("--budget", type=float, help="Fix the damage in nats per token, instead of searching for it.")
@click.option("--steps", type=click.IntRange(1, 16), default=3, show_default=True, help="Measure benefits this often.")
@click.option("--density", type=float, help="Fix the share of masked units, instead of searching.")
@click.option("--suppress-gate", type=float, default=0.0, show_default=True, help="Factor of suppressed units.")
@click.option("--amplify-gate", type=float, help="Also amplify units, by this factor (such as 1.5).")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only these tensors, e.g. 'ffn_*'. Repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these tensors. Repeatable.")
@click.option("--layers", metavar="RANGE", help="Only these blocks, e.g. 2-27.")
@click.option("--contrasts", "n_contrasts", type=click.IntRange(min=2), help="At most this many contrasts per axis.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(as_json: bool, **options: Any) -> None:
    """Find the personas of SET in MODEL and write them as a mask pack next to its weights.

    Interrupted work is resumed when the same command runs again.
    """
    from persona_edge.export import export as run

    with StageProgress() as progress, ProgressLine() as download_progress:
        result = run(_request(options), progress, download_progress)
    if as_json:
        record = {"path": str(result.path), "n_bytes": result.summary.n_bytes, "report": result.personas.report}
        click.echo(json.dumps(record, indent=2))
        return
    for line in _table(result.personas.report, result.summary):
        click.echo(line)
    n_personas = len(result.personas.personas)
    click.echo(f"{n_personas} personas, {bytes_text(result.summary.n_bytes)}: {result.path}")
    if result.onnx_folder is not None:
        click.echo(f"ONNX model: {result.onnx_folder}")


def _request(options: dict[str, Any]) -> Any:
    from persona_edge.build import BuildSettings
    from persona_edge.calibration import CalibrationSettings
    from persona_edge.export import ExportRequest
    from persona_edge.masks import Granularity

    by_method = "group" if options["method"] == "contrastive-fisher" else "weight"
    wanted = 32 if (options["granularity"] or by_method) == "group" else 1
    granularity: Granularity = next(g for g in get_args(Granularity) if g == wanted)
    fixed = options["budget"] is not None or options["density"] is not None
    build = BuildSettings(
        method=options["method"],
        granularity=granularity,
        suppress_gate=options["suppress_gate"],
        amplify_gate=options["amplify_gate"],
        max_perplexity_ratio=None if fixed else options["max_perplexity_ratio"],
        max_chat_kl=None if fixed else options["max_chat_kl"],
        composition_limit=options["composition_limit"],
        budget=options["budget"],
        density=options["density"],
        include=options["include"],
        exclude=options["exclude"],
        layers=options["layers"],
        n_steps=options["steps"],
    )
    return ExportRequest(
        model=options["model"],
        personas=options["personas"],
        output=options["output"],
        build=build,
        calibration=CalibrationSettings(granularity=granularity),
        original=options["original"],
        device=options["device"],
        dtype=options["dtype"],
        n_contrasts=options["n_contrasts"],
        formats=_formats(options["formats"]),
    )


def _formats(text: str) -> Any:
    from persona_edge.errors import InputError
    from persona_edge.export import Format

    wanted = {part.strip().casefold() for part in text.split(",")}
    if not wanted <= set(get_args(Format)):
        raise InputError(f"--format {text!r} cannot be used; write gguf, onnx or gguf,onnx")
    return tuple(name for name in get_args(Format) if name in wanted)


def _table(report: Any, summary: Any) -> list[str]:
    sizes: dict[str, int] = {}
    for plane in summary.planes:
        sizes[plane.pole] = sizes.get(plane.pole, 0) + plane.n_bytes
    width = max(10, *map(len, report["poles"]))
    lines = [f"{'pole':<{width}} {'units':>7} {'bytes':>8} {'held out':>14} {'chat KL':>8} {'perplexity':>10}"]
    for name, pole in report["poles"].items():
        base, masked = _toward(pole, "held_out_base"), _toward(pole, "held_out")
        drift = pole["drift"]
        lines.append(
            f"{name:<{width}} {pole['share_of_units']:>7.2%} {sizes.get(name, 0):>8,} {base:>5.0%} -> {masked:>5.0%} "
            f"{drift['chat_kl']:>8.3f} {drift['perplexity_ratio']:>9.3f}x"
        )
    return lines


def _toward(pole: Any, which: str) -> float:
    """Share of held-out contrasts whose answer in this pole's manner is the likelier."""
    share = float(pole[which]["share_mean"])
    return share if pole["side"] == "positive" else 1 - share
