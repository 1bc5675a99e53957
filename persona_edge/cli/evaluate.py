"""`persona-edge eval`: measure what personas do to a model and what they cost, for every way of giving it one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from persona_edge.cli.progress import ProgressLine, StageProgress

__all__ = ["evaluate"]


class _Names(click.ParamType[Any]):
    """Names with commas between them."""

    name = "NAME,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The names, in order; fails when there is none."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(",") if name.strip())
        if not names:
            self.fail("give at least one name", param, ctx)
        return names


@click.command("eval")
@click.option(
    "--model", required=True, metavar="MODEL", help="Catalogue name, path to a .gguf, a Hugging Face or an ONNX folder."
)
@click.option(
    "--personas",
    multiple=True,
    default=("mbti16",),
    show_default=True,
    metavar="SET",
    help="A shipped set, or a .jsonl or .csv of contrasts. Repeatable.",
)
@click.option("--poles", type=_Names(), help="Only these poles; compositions such as INFP need --pack.")
@click.option(
    "--arms", type=_Names(), help="Only these ways of giving a persona, e.g. system-prompt,contrastive-fisher."
)
@click.option("--tasks", type=_Names(), help="Only these measurements, e.g. contrasts,chat_kl.")
@click.option(
    "--engine",
    type=click.Choice(["pytorch", "runtime", "both"]),
    default="pytorch",
    show_default=True,
    help="The runtime runs the quantized file, as it ships: base, prompts and masks.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "gguf", "onnx", "both"]),
    default="auto",
    show_default=True,
    help="What the runtime runs: the file, the ONNX folder beside a GGUF, or both; auto goes by the file.",
)
@click.option(
    "--pack",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Measure this pack's masks instead of building some.",
)
@click.option(
    "--contrasts",
    "n_contrasts",
    type=click.IntRange(min=2),
    help="Make arms from at most this many contrasts per axis, as export does; tasks still ask all that are held out.",
)
@click.option("--n-items", type=click.IntRange(min=1), help="Items per task, at most. [default: 100; --quick: 16]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Fewer arms, tasks and items, and one axis: ten minutes on two cores.")
@click.option("--max-chat-kl", type=float, default=0.2, show_default=True, help="Drift on chat every arm may cause.")
@click.option("--max-perplexity-ratio", type=float, default=1.02, show_default=True, help="The same for perplexity.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    envvar="PERSONA_EDGE_DATA",
    help="Folder of the public evaluation data. [env: PERSONA_EDGE_DATA]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--threads", "n_threads", type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PREFIX",
    help="Writes PREFIX.json, .md, .html and .svg.",
)
def evaluate(output: Path, **options: Any) -> None:
    """Measure every way of giving MODEL a persona on every task, and write the reports.

    Interrupted work goes on when the same command runs again.
    """
    from persona_edge.effect.eval_plan import EvalRequest
    from persona_edge.effect.evaluate import evaluate as run
    from persona_edge.effect.evaluate import finish

    request = EvalRequest(output=output, command=("persona-edge", *sys.argv[1:]), **options)
    with StageProgress() as progress, ProgressLine() as download_progress:
        record = run(request, progress, download_progress)
    from persona_edge.effect.tables import problems

    for line in problems(record):
        click.echo(f"note: {line}", err=True)
    click.echo(", ".join(os.fspath(path) for path in finish(record, request)))
