"""What an export costs beside the paper's procedure: time, processor time, peak memory, files and bytes.

Each way runs in a process of its own and from nothing: without cached statistics, into an empty folder. The paper's
procedure (paper_export) and ours with the paper's method make the same kind of mask from the same contrasts; ours also
measures drift and effect of every pole and composition, which the other does not. The heavy part is ours with its own
method, on all contrasts and with its search: what `persona-edge export --personas mbti16` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.paper_export import SUPPRESSED
from benchmarks.record import Result, Table
from persona_edge.errors import GenerationError

__all__ = ["Cost", "measure", "run_measured"]

_SET = "mbti16"
_CLI = "from persona_edge.cli import main; main()"
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Cost:
    """What one way took, in seconds and bytes; None where the system does not tell."""

    way: str
    seconds: float
    processor_seconds: float | None
    peak_bytes: int | None
    n_files: int
    n_bytes: int


def measure(model: Path, *, n_contrasts: int = 32, personas: str = _SET, heavy: bool = False) -> Result:
    """The cost of each way on `model`, with at most `n_contrasts` per axis; GenerationError when one of them fails."""
    costs = [_cost(way, command, output) for way, command, output in _ways(model, n_contrasts, personas, heavy)]
    headers = (
        "way",
        "s",
        "processor s",
        "peak MB",
        "files",
        "bytes",
        "times the paper's s",
        "of its peak",
        "of its bytes",
    )
    table = Table(
        headers, tuple(_row(cost, costs[0]) for cost in costs), f"{personas}, {n_contrasts} contrasts per axis:"
    )
    values = {"model": model.name, "n_contrasts": n_contrasts, "costs": [asdict(cost) for cost in costs]}
    return Result(f"What an export costs: {model.stem}", (table,), values, _notes(heavy))


def run_measured(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float | None, int | None]:
    """Seconds, processor seconds and peak resident bytes of a process; GenerationError with its last line if it fails.

    The latter two are None where the system does not tell.
    """
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryFile() as said:
        started = perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=dict(environment), cwd=root)
        processor: float | None = None
        peak: int | None = None
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            processor, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _UNIT
        else:
            process.wait()
        elapsed = perf_counter() - started
        if process.returncode:
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines() or ["nothing said"]
            raise GenerationError(f"{command[2]} ended with code {process.returncode}: {lines[-1]}")
    return elapsed, processor, peak


def _ways(model: Path, n_contrasts: int, personas: str, heavy: bool) -> Iterator[tuple[str, list[str], str]]:
    """What each way is called, its command where {output} stands for a folder, and its output in that folder."""
    paper = [sys.executable, "-m", "benchmarks.paper_export", str(model), "{output}", str(n_contrasts), personas]
    yield "the paper's procedure", paper, ""
    ours = [sys.executable, "-c", _CLI, "export", "--model", str(model), "--personas", personas]
    ours += ["--device", "cpu", "--dtype", "float32", "--output", "{output}/a.maskpack"]
    few = ["--contrasts", str(n_contrasts)]
    yield "ours, method wanda", [*ours, *few, "--method", "wanda", "--density", str(SUPPRESSED)], "a.maskpack"
    yield "ours, contrastive-fisher, 1 % of groups", [*ours, *few, "--density", "0.01"], "a.maskpack"
    if heavy:
        yield "ours, contrastive-fisher, all contrasts, with the search", ours, "a.maskpack"


def _cost(way: str, command: Sequence[str], output: str) -> Cost:
    print(f"export: {way}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as folder:
        filled = [word.replace("{output}", folder) for word in command]
        took = run_measured(filled, {**os.environ, "PERSONA_EDGE_CACHE": cache})
        written = [path for path in Path(folder, output).rglob("*") if path.is_file()] or [Path(folder, output)]
        return Cost(way, *took, len(written), sum(path.stat().st_size for path in written))


def _row(cost: Cost, paper: Cost) -> tuple[str, ...]:
    peaks = (cost.peak_bytes, paper.peak_bytes)
    return (
        cost.way,
        f"{cost.seconds:.0f}",
        "" if cost.processor_seconds is None else f"{cost.processor_seconds:.0f}",
        "" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:,.0f}",
        f"{cost.n_files:,}",
        f"{cost.n_bytes:,}",
        f"{cost.seconds / paper.seconds:.2f}",
        f"{peaks[0] / peaks[1]:.2f}" if peaks[0] and peaks[1] else "",
        f"{cost.n_bytes / paper.n_bytes:.4f}",
    )


def _notes(heavy: bool) -> tuple[str, ...]:
    scope = (
        "Ours measures drift and effect of every pole and composition on held-out text as well; the paper's does not."
    )
    return (scope,) if heavy else (scope, "The export with its search is left out; --heavy runs it.")
