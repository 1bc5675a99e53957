"""`python -m benchmarks [NAME…] [--write]`: measurements, printed as Markdown; README.md says which."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import decode, pages, record, roofline, switching
from persona_edge.catalogue import DEFAULT_MODEL, resolve_model
from persona_edge.errors import PersonaEdgeError
from persona_edge.find_packs import find_pack, open_pack
from persona_edge.maskpack import MaskPack


@dataclass(frozen=True)
class Settings:
    """What the command line says. Counts are those that the benchmark's name in README.md explains."""

    model: str
    pack: Path | None
    threads: int
    rounds: int
    prompt_rounds: int
    repeats: int
    tokens: int
    positions: int
    parity_models: tuple[str, ...]
    runtime_models: tuple[str, ...]
    minutes: float
    quick: bool
    heavy: bool

    @property
    def gguf(self) -> Path:
        """The model's file, fetched when it is not on this machine."""
        return resolve_model(self.model).require_gguf()

    def pack_with(self, *personas: str) -> MaskPack:
        """The pack that was named, or the newest beside the model; it has to hold `personas`."""
        if self.pack is not None:
            return open_pack(self.pack, personas).pack
        return find_pack(self.gguf, personas, self.model).pack


def _switching(settings: Settings) -> record.Result:
    return switching.measure(
        settings.gguf,
        settings.pack_with("INFP", "ENTJ"),
        n_rounds=settings.rounds,
        n_prompt_rounds=settings.prompt_rounds,
        n_threads=settings.threads,
    )


def _roofline(settings: Settings) -> record.Result:
    pack = settings.pack_with("INFP", "ENTJ")
    return roofline.measure(settings.gguf, pack, n_rounds=min(settings.rounds, 50), n_threads=settings.threads)


def _pages(settings: Settings) -> record.Result:
    return pages.measure(
        settings.gguf,
        settings.pack_with("INFP", "ENTJ"),
        n_rounds=min(settings.rounds, 60),
        n_tokens=settings.tokens,
        n_threads=settings.threads,
        seconds=60 * settings.minutes,
    )


def _decode(settings: Settings) -> record.Result:
    return decode.measure(
        settings.gguf,
        settings.pack_with("INFP"),
        n_repeats=settings.repeats,
        n_tokens=settings.tokens,
        n_threads=settings.threads,
    )


def _parity(settings: Settings) -> record.Result:
    from benchmarks.reports import measure_models

    paths = [resolve_model(name).require_gguf() for name in settings.parity_models]
    return measure_models(paths, settings.gguf, n_positions=settings.positions, n_threads=settings.threads)


def _runtime(settings: Settings) -> record.Result:
    from benchmarks import runtime

    plan = runtime.Plan(
        rounds=settings.rounds,
        prompt_rounds=settings.prompt_rounds,
        repeats=settings.repeats,
        n_tokens=settings.tokens,
        seconds=60 * settings.minutes,
        n_threads=settings.threads,
    )
    return runtime.measure(settings.runtime_models, plan.quick() if settings.quick else plan)


def _export(settings: Settings) -> record.Result:
    from benchmarks import export_cost

    n_contrasts = _QUICK_CONTRASTS if settings.quick else _CONTRASTS
    return export_cost.measure(settings.gguf, n_contrasts=n_contrasts, heavy=settings.heavy)


def _onnx(settings: Settings) -> record.Result:
    from benchmarks import onnx_backend
    from persona_edge.onnx_start import onnx_model_for

    graph = onnx_model_for(str(settings.gguf), "onnx")
    assert graph is not None  # it raises when there is none
    pack = settings.pack or find_pack(settings.gguf, onnx_backend.PERSONAS, settings.model).path
    job = onnx_backend.Job(
        settings.gguf, graph, pack, settings.rounds, settings.repeats, settings.tokens, settings.positions,
        settings.threads,
    )  # fmt: skip
    return onnx_backend.measure(job)


def _memory(settings: Settings) -> record.Result:
    from benchmarks import calibration_memory

    plan = calibration_memory.Plan()
    return calibration_memory.measure(plan=plan.quick() if settings.quick else plan)


def _size(_settings: Settings) -> record.Result:
    from benchmarks.reports import measure_size

    return measure_size()


BENCHMARKS: Mapping[str, Callable[[Settings], record.Result]] = {
    "switching": _switching,
    "roofline": _roofline,
    "decode": _decode,
    "pages": _pages,
    "parity": _parity,
    "size": _size,
    "runtime": _runtime,
    "onnx": _onnx,
    "export": _export,
    "memory": _memory,
}
_FILES = {"memory": "calibration-memory"}  # what results are called that have another name than their benchmark
_CONTRASTS, _QUICK_CONTRASTS = 32, 4
_PARITY_MODELS = (DEFAULT_MODEL, "qwen2.5-0.5b", "gemma3-270m")
_COUNT = click.IntRange(min=1)
_TWO = click.IntRange(min=2)  # fewer have no spread, or no time between them


@click.command("python -m benchmarks")
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)), metavar="[NAME]...")
@click.option("--write", is_flag=True, help="Store the results in docs/results as well.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="A catalogue name, or a path to a GGUF file.")
@click.option("--pack", type=click.Path(path_type=Path), help="The mask pack.  [default: the newest beside the model]")
@click.option("--threads", default=2, show_default=True, type=_COUNT, help="CPU threads.")
@click.option("--rounds", default=200, show_default=True, type=_COUNT, help="switching: rounds of weight switches.")
@click.option("--prompt-rounds", default=5, show_default=True, type=_COUNT, help="switching: prompts, and reloads.")
@click.option("--repeats", default=12, show_default=True, type=_COUNT, help="decode: rounds.")
@click.option("--tokens", default=64, show_default=True, type=_TWO, help="decode: tokens per run.")
@click.option("--positions", default=512, show_default=True, type=_COUNT, help="parity: tokens compared.")
@click.option(
    "--parity-model", "parity_models", multiple=True, default=_PARITY_MODELS, show_default=True, help="May be repeated."
)
@click.option(
    "--models",
    default="smollm2-135m,qwen2.5-0.5b,1.7b,8b",
    show_default=True,
    help="runtime: catalogue names, paths, or shapes of random weights, with commas between.",
)
@click.option(
    "--minutes", default=10.0, show_default=True, type=float, help="runtime: no new round of a stage after these."
)
@click.option("--quick", is_flag=True, help="runtime, export, memory: little data, to see that it works.")
@click.option("--heavy", is_flag=True, help="export: ours with its own method on everything, too.")
def main(
    *,
    names: tuple[str, ...],
    write: bool,
    models: str,
    **options: Any,
) -> None:
    """Run the benchmarks called NAME, or all: switching, roofline, decode, pages, parity, size, runtime, onnx,
    export, memory.

    When all are run, one that lacks its pack, model or data is passed over with a line that says what it needs.
    """
    runtime_models = tuple(name.strip() for name in models.split(",") if name.strip())
    settings = Settings(runtime_models=runtime_models, **options)
    for name in names or BENCHMARKS:
        try:
            _run(name, settings, write)
        except PersonaEdgeError as error:
            if names:
                raise click.ClickException(f"{name}: {error}") from None
            click.echo(f"{name} was left out: {error}", err=True)


def _run(name: str, settings: Settings, write: bool) -> None:
    measured = record.conditions(sys.argv[1:])
    result = BENCHMARKS[name](settings)
    click.echo(record.markdown(result, measured))
    if write:
        for path in record.write(_file_name(name, settings.model), result, measured):
            click.echo(f"wrote {path}", err=True)


def _file_name(name: str, model: str) -> str:
    """Results of another model than the usual one have its name, and take no file's place."""
    name = _FILES.get(name, name)
    return name if model == DEFAULT_MODEL else f"{name}-{Path(model).name.removesuffix('.gguf')}"


if __name__ == "__main__":
    main()
