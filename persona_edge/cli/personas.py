"""`persona-edge personas`: the sets that ship, a look into one, a check of one's own, and writing a new one."""

from __future__ import annotations

import click

__all__ = ["personas"]


@click.group()
def personas() -> None:
    """List, show, check and write calibration sets: what personas are found from."""


@personas.command(short_help="Hold a calibration set to the rules.")
@click.argument("name", metavar="FILE")
@click.option(
    "--contrasts", "n_contrasts", type=click.IntRange(min=1), help="How many there have to be.  [default: 40]"
)
@click.option("--any-length", is_flag=True, help="Leave out lengths, for an axis whose poles differ in length.")
@click.pass_context
def check(context: click.Context, *, name: str, n_contrasts: int | None, any_length: bool) -> None:
    """Hold the contrasts of FILE, or of a set that ships, to the rules. Exit code 1 when one is broken.

    Contrasts are numbered from 1 in the order of the file, without its header.
    """
    from persona_edge.persona_sets import load_persona_set
    from persona_edge.set_checker import Rules
    from persona_edge.set_report import check_report

    rules = Rules(min_contrasts=n_contrasts or Rules.min_contrasts, equal_lengths=not any_length)
    reports = [check_report(item, rules) for item in load_persona_set(name).sets]
    for report in reports:
        for line in report.lines:
            click.echo(line)
    context.exit(1 if any(report.has_errors for report in reports) else 0)
