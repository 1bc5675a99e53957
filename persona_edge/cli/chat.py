"""`persona-edge chat`: parses, opens model and pack, and connects a chat (persona_edge.repl) to the terminal."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from persona_edge.catalogue_entries import DEFAULT_MODEL
from persona_edge.cli.progress import ProgressLine

if TYPE_CHECKING:
    from persona_edge.onnx_start import Backend
    from persona_edge.runtime.placement import WeightsMode
    from persona_edge.runtime.values import KvPolicy

__all__ = ["chat"]


@click.command()
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="A catalogue name, a GGUF file or an ONNX folder."
)
@click.option("--pack", type=click.Path(path_type=Path), help="The mask pack.  [default: the newest next to the model]")
@click.option("--persona", help="Who answers, such as INFP.  [default: the unmodified model]")
@click.option("--strength", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="How strongly it acts.")
@click.option("--message", "messages", multiple=True, help="Ask this, print the answer, leave. Again: the next turn.")
@click.option("--system", help="The system prompt.")
@click.option("--compare", metavar="A,B,...", help="Ask each question of all of these; `base` is the unmodified model.")
@click.option("--temperature", default=0.7, show_default=True, help="0 takes the likeliest token, always.")
@click.option(
    "--repeat-penalty", default=1.1, show_default=True, help="Above 1 keeps small models from repeating themselves."
)
@click.option("--max-tokens", default=256, show_default=True, help="The longest answer, in tokens.")
@click.option("--seed", type=int, help="Makes the answers repeatable.")
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--context", "n_ctx", default=4096, show_default=True, help="Tokens that question and history may have.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "gguf", "onnx"]),
    default="auto",
    show_default=True,
    help="What runs the model; auto goes by the file.",
)
@click.option(
    "--kv",
    type=click.Choice(["reprefill", "snapshot", "keep"]),
    default="reprefill",
    show_default=True,
    help="After a switch: read the conversation anew, keep a copy for the persona's return, or go on (approximate).",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "heap", "mmap", "repacked"]),
    default="auto",
    show_default=True,
    help="Where the weights lie: copied to memory, in the mapped file, or repacked (slower switches).",
)
@click.option("--gpu-layers", default=0, show_default=True, help="Layers to put on a GPU, from the last; -1 for all.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per answer, one per line.")
@click.pass_context
def chat(
    context: click.Context,
    *,
    model: str,
    pack: Path | None,
    persona: str | None,
    strength: float,
    messages: Sequence[str],
    system: str | None,
    compare: str | None,
    temperature: float,
    repeat_penalty: float,
    max_tokens: int,
    seed: int | None,
    threads: int | None,
    n_ctx: int,
    backend: Backend,
    kv: KvPolicy,
    weights: WeightsMode,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Talk to a model and switch its persona as you go.

    At a prompt, /help lists the commands. In a pipe, each line of input is a question or a command, and the answers
    are printed without decoration. A question goes on from the turns before it.
    """
    from persona_edge.chat_output import JsonOutput, TextOutput
    from persona_edge.chat_start import open_chat_model
    from persona_edge.chat_values import ChatSettings
    from persona_edge.repl import Repl
    from persona_edge.runtime.values import SamplingOptions
    from persona_edge.terminal_input import accept_any_bytes, is_interactive, talk, work_through

    options = SamplingOptions(max_tokens=max_tokens, temperature=temperature, repeat_penalty=repeat_penalty, seed=seed)
    compared = tuple(name.strip() for name in (compare or "").split(",") if name.strip())
    with ProgressLine() as progress:
        opened = open_chat_model(
            model,
            pack=pack,
            wanted=[*compared, *([persona] if persona else [])],
            look_for_pack=not messages,
            n_ctx=n_ctx,
            n_threads=threads,
            weights=weights,
            n_gpu_layers=gpu_layers,
            kv=kv,
            backend=backend,
            progress=progress,
        )
    with opened.runtime as runtime:
        interactive = is_interactive() and not messages and not as_json
        output = TextOutput(sys.stdout, sys.stderr, interactive=interactive)
        used_seed = secrets.randbelow(2**32) if seed is None else seed
        settings = ChatSettings(options, used_seed, strength, system, compared, opened.no_pack)
        repl = Repl(runtime, JsonOutput(sys.stdout, sys.stderr) if as_json else output, settings)
        for note in opened.notes:
            output.note(note)
        if persona:
            repl.choose(persona)
        if messages:
            for message in messages:
                repl.ask(message)
        elif interactive:
            output.note(opened.greeting)
            talk(repl, output)
        else:
            accept_any_bytes(sys.stdin)
            work_through(repl, sys.stdin)
        context.exit(2 if repl.n_problems and not interactive else 0)
