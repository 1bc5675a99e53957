"""`persona-edge personas`: the sets that ship, a look into one, a check of one's own, and writing a new one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_edge.cli.progress import ProgressLine, StageProgress

if TYPE_CHECKING:
    from persona_edge.contrasts import CalibrationSet
    from persona_edge.set_checker import Rules
    from persona_edge.set_report import CheckReport

__all__ = ["personas"]

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def personas() -> None:
    """List, show, check and write calibration sets: what personas are found from."""


@personas.command("list", short_help="Show the sets that ship.")
def list_sets() -> None:
    """Show the sets that ship: their axes and poles, how many contrasts they have, and what they are about."""
    from persona_edge.set_report import list_lines
    from persona_edge.terminal_text import spell

    for line in list_lines():
        click.echo(spell(line, sys.stdout))


@personas.command(short_help="Show some contrasts of a set.")
@click.argument("name", metavar="NAME")
@click.option("--contrasts", "n_shown", default=3, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--seed", default=0, show_default=True, help="Which ones.")
def show(*, name: str, n_shown: int, seed: int) -> None:
    """Show the personas of NAME, a set that ships or a file, and for each axis some contrasts, both answers of each."""
    from persona_edge.persona_sets import load_persona_set
    from persona_edge.set_report import show_lines

    for line in show_lines(load_persona_set(name), n_shown, seed, shutil.get_terminal_size().columns):
        click.echo(line)


@personas.command(short_help="Hold a calibration set to the rules.")
@click.argument("name", metavar="FILE")
@click.option(
    "--contrasts", "n_contrasts", type=click.IntRange(min=1), help="How many there have to be.  [default: 40]"
)
@click.option("--any-length", is_flag=True, help="Leave out lengths, for an axis whose poles differ in length.")
@click.option("--model", help="Also ask this model how plain and how even the answers are: a name, a GGUF, a folder.")
@click.pass_context
def check(context: click.Context, *, name: str, n_contrasts: int | None, any_length: bool, model: str | None) -> None:
    """Hold the contrasts of FILE, or of a set that ships, to the rules. Exit code 1 when one is broken.

    Contrasts are numbered from 1 in the order of the file, without its header. With --model, answers that the model
    would hardly give itself, and pairs of which it much prefers one, are warned of.
    """
    from persona_edge.persona_sets import load_persona_set
    from persona_edge.set_checker import Rules
    from persona_edge.set_report import check_report

    rules = Rules(min_contrasts=n_contrasts or Rules.min_contrasts, equal_lengths=not any_length)
    sets = load_persona_set(name).sets
    reports = [check_report(item, rules) for item in sets] if model is None else _asked(model, sets, rules)
    for report in reports:
        for line in report.lines:
            click.echo(line)
    context.exit(1 if any(report.has_errors for report in reports) else 0)


def _asked(argument: str, sets: Sequence[CalibrationSet], rules: Rules) -> list[CheckReport]:
    """Reports with what the model says of the answers."""
    from persona_edge.export import weights_of
    from persona_edge.modeling import load_torch_model, require_offline
    from persona_edge.plainness import plainness_findings, plainness_lines, score_set
    from persona_edge.set_report import check_report

    require_offline()  # before anything is fetched
    with ProgressLine() as progress:
        weights = weights_of(argument, progress)
    model = load_torch_model(weights, name=weights.stem)
    reports = []
    with StageProgress() as progress:
        for item in sets:
            scores = score_set(model, item, progress)
            lines, findings = plainness_lines(scores, model.name), plainness_findings(scores)
            reports.append(check_report(item, rules, more=lines, found=findings))
    return reports


@personas.command(short_help="Write a set from answers, descriptions or a character card.")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--from", "answers", metavar="FILE", type=_FILE, help="JSONL or CSV with both answers to each prompt.")
@click.option("--card", metavar="FILE", type=_FILE, help="A character card V2 or V3, JSON or PNG; against neutral.")
@click.option("--positive-description", metavar="TEXT", help="Who answers in the positive manner, in a sentence.")
@click.option("--negative-description", metavar="TEXT", help="The opposite.  [default: an ordinary assistant]")
@click.option("--positive", metavar="NAME", help="What the positive pole is called.")
@click.option("--negative", metavar="NAME", help="What the negative pole is called.")
@click.option("--axis", metavar="NAME", help="What the axis is called.  [default: as the file]")
@click.option("--model", help="Who writes the answers: a catalogue name, or a path to a GGUF file.")
@click.option("--contrasts", "n_contrasts", type=click.IntRange(min=1), help="How many to write.  [default: 100]")
@click.option("--prompts", metavar="FILE", type=_FILE, help='JSONL of {"prompt": ...}.  [default: 156 ordinary ones]')
@click.option("--seed", default=0, show_default=True, help="Other prompts first, and other answers.")
@click.option("--temperature", default=0.7, show_default=True, help="How freely the answers are chosen.")
@click.option("--threads", "n_threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
def new(**options: Any) -> None:
    """Write a calibration set to OUTPUT, a .jsonl file.

    Answers to descriptions and cards are written by a model on this machine. That may be interrupted: the same command
    goes on from there.
    """
    from persona_edge.contrast_writer import journal_path
    from persona_edge.new_set import NewSetRequest, new_set
    from persona_edge.set_checker import Rules
    from persona_edge.set_report import check_report, new_set_lines

    request = NewSetRequest(**options)
    try:
        with StageProgress() as progress, ProgressLine() as download_progress:
            found = new_set(request, progress, download_progress)
    except KeyboardInterrupt:
        if journal_path(request.output).exists():
            click.echo("\nthe answers so far are kept; the same command goes on from there", err=True)
        raise
    for line in (*new_set_lines(found, request), "", *check_report(found.contrasts, Rules()).lines):
        click.echo(line)
