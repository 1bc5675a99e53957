"""A stage of `runtime` for one model, run in a process of its own, so that nothing of another stage is in its memory.

    python -m benchmarks.runtime_job JSON

prints the values as JSON on its last line. A stage that dies, as stock llama.cpp does on some virtual machines, takes
nothing else with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.measured import Measured
from benchmarks.synthetic_personas import PERSONAS
from persona_edge.errors import GenerationError, PersonaEdgeError

__all__ = ["Job", "Stage", "run_job"]

Stage = Literal["switch", "density", "first_token", "speed", "memory"]


@dataclass(frozen=True)
class Job:
    """What a stage needs. Paths are text, for JSON; `arm` is for `memory`, which measures one at a time.

    `rounds`, `seconds`: stop after whichever comes first. `lengths` are contexts in tokens, `n_tokens` how many are
    decoded at a time, `n_prompt` how many are evaluated before.
    """

    stage: Stage
    model: str
    pack: str
    loras: tuple[str, str]
    vectors: tuple[str, str]
    n_threads: int
    rounds: int
    seconds: float
    lengths: tuple[int, ...] = ()
    n_tokens: int = 0
    n_prompt: int = 0
    arm: str = ""
    packs: tuple[tuple[float, str], ...] = ()
    personas: tuple[str, str] = PERSONAS


def run_job(job: Job) -> list[Measured]:
    """The values of `job`, measured in a new process. GenerationError with its last line when that fails."""
    command = [sys.executable, "-m", "benchmarks.runtime_job", json.dumps(asdict(job))]
    folder = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        said = (done.stderr.strip() or "nothing said").splitlines()[-1]
        raise GenerationError(f"{job.stage} {job.arm} ended with code {done.returncode}: {said}")
    return [Measured.from_json(each) for each in json.loads(done.stdout.splitlines()[-1])]


def _stages() -> Mapping[Stage, Callable[[Job], list[Measured]]]:
    from benchmarks import runtime_first_token, runtime_memory, runtime_speed, runtime_switch

    return {
        "switch": runtime_switch.measure,
        "density": runtime_switch.measure_densities,
        "first_token": runtime_first_token.measure,
        "speed": runtime_speed.measure,
        "memory": runtime_memory.measure,
    }


def main(argument: str) -> int:
    """Run the job that `argument` describes and print its values; 1 and one line on stderr when it fails."""
    content = json.loads(argument)
    for name in ("loras", "vectors", "lengths", "personas"):
        content[name] = tuple(content[name])
    content["packs"] = tuple((density, path) for density, path in content["packs"])
    job = Job(**content)
    try:
        found = _stages()[job.stage](job)
    except PersonaEdgeError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps([each.to_json() for each in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
