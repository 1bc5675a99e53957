"""`persona-edge chat`: parses, opens model and pack, and connects a chat (persona_edge.repl) to the terminal."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_edge.catalogue_entries import DEFAULT_MODEL
from persona_edge.cli.progress import ProgressLine

if TYPE_CHECKING:
    from persona_edge.chat_start import ChatModel
    from persona_edge.chat_values import ChatSettings
    from persona_edge.onnx_start import Backend
    from persona_edge.runtime.placement import WeightsMode
    from persona_edge.runtime.values import KvPolicy, SamplingOptions

__all__ = ["chat"]

_Function = Callable[..., None]


def _together(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    """Several options as one decorator, in the order in which the help shows them."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_conversation_options = _together(
    click.option(
        "--model", default=DEFAULT_MODEL, show_default=True, help="A catalogue name, a GGUF file or an ONNX folder."
    ),
    click.option(
        "--pack",
        type=click.Path(path_type=Path),
        help="The mask pack.  [default: the newest next to the model, or one that ships]",
    ),
    click.option("--persona", help="Who answers, such as INFP.  [default: the unmodified model]"),
    click.option(
        "--strength", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="How strongly it acts."
    ),
    click.option(
        "--message", "messages", multiple=True, help="Ask this, print the answer, leave. Again: the next turn."
    ),
    click.option("--system", help="The system prompt."),
    click.option(
        "--compare", metavar="A,B,...", help="Ask each question of all of these; `base` is the unmodified model."
    ),
)
_sampling_options = _together(
    click.option("--temperature", default=0.7, show_default=True, help="0 takes the likeliest token, always."),
    click.option(
        "--repeat-penalty", default=1.1, show_default=True, help="Above 1 keeps small models from repeating themselves."
    ),
    click.option("--max-tokens", default=256, show_default=True, help="The longest answer, in tokens."),
    click.option("--seed", type=int, help="Makes the answers repeatable."),
)
_runtime_options = _together(
    click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]"),
    click.option(
        "--context", "n_ctx", default=4096, show_default=True, help="Tokens that question and history may have."
    ),
    click.option(
        "--backend",
        type=click.Choice(["auto", "gguf", "onnx"]),
        default="auto",
        show_default=True,
        help="What runs the model; auto goes by the file.",
    ),
    click.option(
        "--kv",
        type=click.Choice(["reprefill", "snapshot", "keep"]),
        default="reprefill",
        show_default=True,
        help="After a switch: read the conversation anew, keep a copy for the persona's return, "
        "or go on (approximate).",
    ),
    click.option(
        "--weights",
        type=click.Choice(["auto", "heap", "mmap", "repacked"]),
        default="auto",
        show_default=True,
        help="Where the weights lie: copied to memory, in the mapped file, or repacked (slower switches).",
    ),
    click.option(
        "--gpu-layers", default=0, show_default=True, help="Layers to put on a GPU, from the last; -1 for all."
    ),
)


@dataclass(frozen=True)
class _Request:
    """What was typed: the options by their names."""

    model: str
    pack: Path | None
    persona: str | None
    strength: float
    messages: tuple[str, ...]
    system: str | None
    compare: str | None
    temperature: float
    repeat_penalty: float
    max_tokens: int
    seed: int | None
    threads: int | None
    n_ctx: int
    backend: Backend
    kv: KvPolicy
    weights: WeightsMode
    gpu_layers: int
    as_json: bool

    @property
    def compared(self) -> tuple[str, ...]:
        """Whom each question is asked of; nobody in an ordinary chat."""
        return tuple(name.strip() for name in (self.compare or "").split(",") if name.strip())

    def sampling(self) -> SamplingOptions:
        """How answers are drawn. InputError for a value that makes no sense."""
        from persona_edge.runtime.values import SamplingOptions

        return SamplingOptions(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            repeat_penalty=self.repeat_penalty,
            seed=self.seed,
        )

    def open_model(self) -> ChatModel:
        """The model with its pack, and a progress line meanwhile."""
        from persona_edge.chat_start import open_chat_model

        with ProgressLine() as progress:
            return open_chat_model(
                self.model,
                pack=self.pack,
                wanted=[*self.compared, *([self.persona] if self.persona else [])],
                look_for_pack=not self.messages,
                n_ctx=self.n_ctx,
                n_threads=self.threads,
                weights=self.weights,
                n_gpu_layers=self.gpu_layers,
                kv=self.kv,
                backend=self.backend,
                progress=progress,
            )

    def settings(self, sampling: SamplingOptions, no_pack: str) -> ChatSettings:
        """How the chat begins; without a seed, with one drawn now."""
        from persona_edge.chat_values import ChatSettings

        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        return ChatSettings(sampling, seed, self.strength, self.system, self.compared, no_pack)


@click.command()
@_conversation_options
@_sampling_options
@_runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per answer, one per line.")
@click.pass_context
def chat(context: click.Context, /, **typed: Any) -> None:
    """Talk to a model and switch its persona as you go.

    At a prompt, /help lists the commands. In a pipe, each line of input is a question or a command, and the answers
    are printed without decoration. A question goes on from the turns before it.
    """
    from persona_edge.chat_output import JsonOutput, TextOutput
    from persona_edge.repl import Repl
    from persona_edge.terminal_input import accept_any_bytes, is_interactive, talk, work_through

    request = _Request(**typed)
    sampling = request.sampling()
    opened = request.open_model()
    with opened.runtime as runtime:
        interactive = is_interactive() and not request.messages and not request.as_json
        output = TextOutput(sys.stdout, sys.stderr, interactive=interactive)
        answers = JsonOutput(sys.stdout, sys.stderr) if request.as_json else output
        repl = Repl(runtime, answers, request.settings(sampling, opened.no_pack))
        for note in opened.notes:
            output.note(note)
        if request.persona:
            repl.choose(request.persona)
        if request.messages:
            for message in request.messages:
                repl.ask(message)
        elif interactive:
            output.note(opened.greeting)
            talk(repl, output)
        else:
            accept_any_bytes(sys.stdin)
            work_through(repl, sys.stdin)
        context.exit(2 if repl.n_problems and not interactive else 0)
