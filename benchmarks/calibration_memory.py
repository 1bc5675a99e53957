"""Memory that calibrating an 8B model takes: measured on its shape with a few blocks, by arithmetic for the rest.

Each model runs in a process of its own (calibration_memory_run) through the product's code. What a block adds to each
phase's peak is fitted, set beside memory_arithmetic's number, and carried to 32 blocks. The models that blocks are
counted on have a small vocabulary, since unpacking a large output matrix would hide a few blocks; one with the whole
vocabulary shows that the arithmetic holds there too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.calibration_memory_run import HELD_OUT_TOKENS
from benchmarks.memory_arithmetic import PHASES, Job, phases
from benchmarks.record import Result, Table
from benchmarks.synthetic_models import SHAPES, Shape, make_model
from persona_edge.errors import GenerationError

__all__ = ["Plan", "Run", "measure", "report", "slopes"]

GIB = 1 << 30
_EXPORT_TOKENS, _EXPORT_HELD_OUT = 1024, 28 * 127  # of a batch; of the neutral texts held out, at most


@dataclass(frozen=True)
class Plan:
    """What is measured: numbers of blocks at a small vocabulary, tokens per batch, and a check with the whole one."""

    blocks: tuple[int, ...] = (1, 2, 3)
    n_vocab: int = 16032
    n_tokens: int = 256
    check: bool = True

    def quick(self) -> Plan:
        """Little data, to see that it works."""
        return replace(self, blocks=self.blocks[:2], n_tokens=64, check=False)


@dataclass(frozen=True)
class Run:
    """One process: what it ran, resident bytes before the model was loaded, and at each phase's peak."""

    job: Job
    before: int
    peaks: Mapping[str, int]

    def beyond(self, phase: str) -> int:
        """Bytes at a phase's peak that neither the arithmetic nor what was there before accounts for."""
        n, found = self.job.shape.n_layers, {found.name: found for found in phases(self.job)}[phase]
        return self.peaks[phase] - self.before - found.at(n) - found.mapped - n * found.mapped_per_block


def measure(shape: Shape = SHAPES["8b"], plan: Plan = Plan()) -> Result:
    """Run the plan on `shape`; GenerationError when a process fails. Needs 10 GB of memory and 3 GB of disk for 8B."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for job in _jobs(shape, plan):
            print(f"memory: {_label(job)}", file=sys.stderr, flush=True)
            runs.append(_run(job, Path(folder)))
    return report(shape, plan, runs)


def report(shape: Shape, plan: Plan, runs: Sequence[Run]) -> Result:
    """Tables and values of the plan's runs on `shape`."""
    fitted = [run for run in runs if run.job.shape.n_vocab == plan.n_vocab]
    whole = [Job(shape, _EXPORT_TOKENS, streams, _EXPORT_HELD_OUT) for streams in (False, True)]
    beyond = max(run.before + run.beyond(phase) for run in runs for phase in PHASES)
    tables = (_measured(runs), _slopes(fitted), _estimate(whole, fitted, beyond))
    values = {
        "shape": asdict(shape),
        "plan": asdict(plan),
        "runs": [{"label": _label(run.job), "before": run.before, "peaks": dict(run.peaks)} for run in runs],
        "bytes_per_block": {str(streams): slopes(fitted, streams) for streams in (False, True)},
        "beyond_arithmetic_bytes": beyond,
        "estimate_bytes": {
            str(j.is_streaming): {p.name: p.at(shape.n_layers) + beyond for p in phases(j)} for j in whole
        },
        "device_bytes": whole[1].device_peak,
    }
    return Result(f"Memory of calibrating: the {shape.name} shape", tables, values, _notes(whole[1], beyond))


def slopes(runs: Sequence[Run], is_streaming: bool) -> dict[str, float]:
    """Bytes that a block adds to each phase's peak: least squares over runs of one kind that differ in blocks only."""
    chosen = [run for run in runs if run.job.is_streaming == is_streaming]
    blocks = [run.job.shape.n_layers for run in chosen]
    return {phase: float(np.polyfit(blocks, [run.peaks[phase] for run in chosen], 1)[0]) for phase in PHASES}


def _jobs(shape: Shape, plan: Plan) -> Iterator[Job]:
    held_out = 2 * (HELD_OUT_TOKENS - 1)
    for n_layers in plan.blocks:
        few = replace(shape, name=f"{shape.name}-{n_layers}", n_layers=n_layers, n_vocab=plan.n_vocab)
        for streams in (False, True):
            yield Job(few, plan.n_tokens, streams, held_out)
    if plan.check:
        yield Job(replace(shape, name=f"{shape.name}-whole", n_layers=1), plan.n_tokens, True, held_out)


def _run(job: Job, folder: Path) -> Run:
    source = make_model(job.shape, folder)
    command = [sys.executable, "-m", "benchmarks.calibration_memory_run", str(source), str(job.n_tokens)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([*command, str(job.is_streaming)], capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing said"]
        raise GenerationError(f"{_label(job)} ended with code {done.returncode}: {lines[-1]}")
    found = json.loads(done.stdout)
    peaks = found["peaks"]
    return Run(job, peaks["before"], {phase: peaks[phase] for phase in PHASES})


def _label(job: Job) -> str:
    how = "streamed" if job.is_streaming else "plain"
    return f"{job.shape.n_layers} blocks, {how}, vocabulary {job.shape.n_vocab:,}"


def _measured(runs: Sequence[Run]) -> Table:
    rows = [
        (_label(run.job), f"{run.before / 1e6:,.0f}", *(f"{run.peaks[phase] / 1e6:,.0f}" for phase in PHASES))
        for run in runs
    ]
    caption = f"Peak resident MB of each phase, {runs[0].job.n_tokens} tokens per batch, bfloat16, on the CPU:"
    return Table(("model", "before", *PHASES), tuple(rows), caption)


def _slopes(runs: Sequence[Run]) -> Table:
    rows = []
    for streams in (False, True):
        job = next(run.job for run in runs if run.job.is_streaming == streams)
        expected = {p.name: p.per_block + p.mapped_per_block for p in phases(job)}
        found = slopes(runs, streams)
        for phase in PHASES:
            cells = (
                f"{found[phase] / 1e6:,.0f}",
                f"{expected[phase] / 1e6:,.0f}",
                f"{found[phase] / expected[phase]:.3f}",
            )
            rows.append((f"{phase}, {'streamed' if streams else 'plain'}", *cells))
    return Table(("phase", "MB per block, fitted", "by arithmetic", "ratio"), tuple(rows), "What a block adds:")


def _estimate(whole: Sequence[Job], runs: Sequence[Run], beyond: int) -> Table:
    """Two ways to the whole model: all by arithmetic, and the fitted slopes with arithmetic for tokens and words."""
    n_layers = whole[0].shape.n_layers
    plain, streamed = (tuple(phases(job)) for job in whole)
    few = next(run.job for run in runs if run.job.is_streaming)
    found = slopes(runs, True)
    rows = []
    for alone, here, small in zip(plain, streamed, phases(few), strict=True):
        more = found[here.name] - small.per_block - small.mapped_per_block
        fitted = here.at(n_layers) + beyond + n_layers * more
        cells = (alone.at(n_layers) + beyond, here.at(n_layers) + beyond, fitted)
        rows.append((here.name, *(f"{cell / GIB:.1f}" for cell in cells)))
    rows.append(("a GPU that blocks are streamed to", "", f"{whole[1].device_peak / GIB:.1f}", ""))
    caption = (
        f"{n_layers} blocks, vocabulary {whole[0].shape.n_vocab:,}, {_EXPORT_TOKENS} tokens per batch as `export` has "
        "them, GiB, beside 24:"
    )
    return Table(("phase", "plain", "streamed", "streamed, fitted slopes"), tuple(rows), caption)


def _notes(job: Job, beyond: int) -> tuple[str, ...]:
    parts = (
        ("weights", job.weights),
        ("each number per group", job.shape.n_layers * job.field),
        ("the unmasked model's predictions on held-out text", job.base_predictions),
        ("logits while labels are sampled", job.logits_moment),
        ("Python, its packages and all else beyond the arithmetic", beyond),
    )
    return (
        f"Of the streamed column: {'; '.join(f'{name} {n_bytes / 1e9:.2f} GB' for name, n_bytes in parts)}.",
        "While the model is loaded, what is resident holds pages of the GGUF file too. The system takes them back when "
        "it needs them, so the whole model's estimate leaves them out. Loading ends with the largest tensors, which "
        f"transformers unpacks with {job.loading_moment / 1e9:.1f} GB beside the blocks.",
        "That, and the copy of the output matrix that a CPU multiplies with, are not our code: their bytes per weight "
        "were found by these measurements. Everything else is counted from the code. A CPU without bfloat16 needs "
        "--dtype bfloat16: in float32 the weights alone are twice as large.",
        "The GPU's line is arithmetic alone: embeddings, norm, output matrix, every block's input, one block with its "
        "activations, and the logits; statistics lie in main memory.",
    )
