"""`persona-edge doctor`: prints what `persona_edge.doctor` finds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click

from persona_edge.doctor import Check, can_chat, run_checks

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with every check.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check what is installed, what would be slow or fail, and what to do about it.

    Exit code 0 when chatting can work, 1 when something that it needs is broken.
    """
    checks = run_checks()
    if as_json:
        click.echo(json.dumps({"can_chat": can_chat(checks), "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        for line in _lines(checks):
            click.echo(line)
    context.exit(0 if can_chat(checks) else 1)


def _lines(checks: Sequence[Check]) -> Iterator[str]:
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = click.style(f"{check.status:4}", fg=_COLOURS[check.status])
        yield f"{mark}  {check.name:{width}}  {check.detail}"
        if check.remedy:
            yield f"{'':{width + 8}}-> {check.remedy}"
