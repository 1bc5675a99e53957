"""The runtime beside what people use today (LoRA, control vectors, baked models, prompts), on models of all sizes.

    python -m benchmarks runtime --write                       # all models: hours
    python -m benchmarks runtime --models smollm2-135m --quick # minutes

Each stage of each model runs in a process of its own (runtime_job). Models are catalogue names, paths, or shapes of
synthetic_models; packs are random at 1 % density, and for a model that has a pack of MBTI types, that one too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.measured import Measured
from benchmarks.record import Result
from benchmarks.runtime_job import Job, Stage, run_job
from benchmarks.runtime_memory import ARMS
from benchmarks.runtime_plot import size_and_density_plot
from benchmarks.runtime_tables import Artefact, ModelResult, runtime_tables
from benchmarks.synthetic_models import SHAPES, make_model, synthetic_folder
from benchmarks.synthetic_personas import PERSONAS, Rivals, control_vector_bytes, make_pack, make_rivals
from persona_edge.catalogue import resolve_model
from persona_edge.errors import PersonaEdgeError
from persona_edge.find_packs import find_pack
from persona_edge.maskpack import MaskPack, write_pack

__all__ = ["Plan", "left_out", "measure"]

_LARGE = 2 << 30  # bytes of a file: from here on, prompts are short and tokens few
_SYSTEM_PROMPT_BYTES = 400  # a paragraph that describes a character


@dataclass(frozen=True)
class Plan:
    """How much is measured. `seconds` bounds the rounds of a stage; a first round is always made."""

    rounds: int = 200
    prompt_rounds: int = 5
    repeats: int = 12
    n_tokens: int = 64
    n_prompt: int = 512
    lengths: tuple[int, ...] = (512, 2048)
    density: float = 0.01
    densities: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    seconds: float = 600.0
    n_threads: int = 2

    def quick(self) -> Plan:
        """The same with few rounds: minutes for small models, to see that everything works."""
        return replace(
            self,
            rounds=min(self.rounds, 10),
            prompt_rounds=1,
            repeats=2,
            n_tokens=min(self.n_tokens, 16),
            n_prompt=min(self.n_prompt, 128),
            lengths=self.lengths[:1],
            densities=(self.density,),
            seconds=60.0,
        )

    def of_size(self, n_bytes: int) -> Plan:
        """The same for a model file of `n_bytes`."""
        if n_bytes < _LARGE:
            return self
        return replace(self, n_prompt=min(self.n_prompt, 128), n_tokens=min(self.n_tokens, 16))


def measure(models: Sequence[str], plan: Plan, folder: Path | None = None) -> Result:
    """Everything for each of `models`. What fails is noted and left out; raises only when a model cannot be had.

    What is there after each model is kept in `folder` as runtime.unfinished.json.
    """
    folder = folder or synthetic_folder()
    problems: list[str] = []
    found = []
    for name in models:
        found.append(_measure_model(name, _path_of(name), plan, folder, problems))
        unfinished = json.dumps([each.to_json() for each in found], indent=2)  # hours, should a later model fail
        (folder / "runtime.unfinished.json").write_text(unfinished + "\n", encoding="utf-8")
    values = {
        "plan": asdict(plan),
        "models": [each.to_json() for each in found],
        "problems": problems,
    }
    notes = [f"Left out: {problem}." for problem in problems]
    try:
        plot = size_and_density_plot(found)
    except PersonaEdgeError as error:
        plot, notes = "", [*notes, f"No plot: {error}."]
    return Result("The runtime beside its rivals", runtime_tables(found), values, tuple(notes), plot)


def _path_of(name: str) -> Path:
    return make_model(SHAPES[name]) if name in SHAPES else resolve_model(name).require_gguf()


def _measure_model(name: str, path: Path, plan: Plan, folder: Path, problems: list[str]) -> ModelResult:
    label = f"{name} shape" if name in SHAPES else path.stem
    plan = plan.of_size(path.stat().st_size)
    rivals = make_rivals(path, folder, plan.density)
    real = None if name in SHAPES else _real_pack(path, name, folder)
    measured: list[Measured] = []
    for stage, job in _jobs(path, plan, rivals, folder):
        print(f"{label}: {stage} {job.arm}", file=sys.stderr, flush=True)
        try:
            found = run_job(job)
        except PersonaEdgeError as error:
            problems.append(f"{label}: {error}")
            print(problems[-1], file=sys.stderr, flush=True)
            continue
        problems += [f"{label}: {missing}" for missing in left_out(job, found)]
        measured += found
    real_switch: list[Measured] = []
    if real is not None:
        job = replace(_job("density", path, plan, rivals), packs=((0.0, str(real)),))
        real_switch = run_job(job)
    artefacts = list(_artefacts(path, rivals, real))
    return ModelResult(label, path.stat().st_size, _merged(measured), tuple(real_switch), tuple(artefacts))


def left_out(job: Job, found: Sequence[Measured]) -> list[str]:
    """Why lengths that `job` asks for are not among what it found."""
    there = {each.what for each in found}
    reason = "the model's context is shorter, or one round takes more than four times --minutes"
    return [f"a context of {n} tokens, for {reason}" for n in job.lengths if f"{n} tokens" not in there]


def _jobs(path: Path, plan: Plan, rivals: Rivals, folder: Path) -> Iterator[tuple[Stage, Job]]:
    yield "switch", _job("switch", path, plan, rivals)
    packs = tuple((density, str(make_pack(path, folder, density))) for density in plan.densities)
    yield "density", replace(_job("density", path, plan, rivals), packs=packs, rounds=min(plan.rounds, 50))
    first = _job("first_token", path, plan, rivals)
    yield "first_token", replace(first, lengths=plan.lengths, rounds=plan.prompt_rounds)
    yield "speed", replace(_job("speed", path, plan, rivals), rounds=plan.repeats)
    memory = replace(_job("memory", path, plan, rivals), n_prompt=64)
    for _ in range(min(3, plan.prompt_rounds)):
        for arm in ARMS:
            yield "memory", replace(memory, arm=arm)


def _job(stage: Stage, path: Path, plan: Plan, rivals: Rivals) -> Job:
    first, second = rivals.loras
    return Job(
        stage,
        str(path),
        str(rivals.pack),
        (str(first), str(second)),
        (str(rivals.vectors[0]), str(rivals.vectors[1])),
        plan.n_threads,
        plan.rounds,
        plan.seconds,
        n_tokens=plan.n_tokens,
        n_prompt=plan.n_prompt,
    )


def _merged(measured: Sequence[Measured]) -> tuple[Measured, ...]:
    """Values of the same arm and thing from several processes, together."""
    found: dict[tuple[str, str], Measured] = {}
    for each in measured:
        earlier = found.get((each.arm, each.what))
        found[each.arm, each.what] = each if earlier is None else replace(each, values=earlier.values + each.values)
    return tuple(found.values())


def _real_pack(path: Path, name: str, folder: Path) -> Path | None:
    """The pack of MBTI types beside the model, as a file; None when there is none."""
    try:
        pack = find_pack(path, PERSONAS, name).pack
    except PersonaEdgeError:
        return None
    copy = folder / f"{path.stem}.real.maskpack"
    folder.mkdir(parents=True, exist_ok=True)
    write_pack(copy, pack.load())
    return copy


def _artefacts(path: Path, rivals: Rivals, real: Path | None) -> Iterator[Artefact]:
    """Bytes that one persona takes in each way."""
    yield from _pack_artefacts(rivals.pack, f"pack, random, {rivals.density:.1%} of the groups")
    if real is not None:
        yield from _pack_artefacts(real, "pack, real")
    yield Artefact("LoRA r16, float16", rivals.loras[0].stat().st_size)
    yield Artefact("control vector, float32", control_vector_bytes(rivals.vectors[0]))
    yield Artefact("system prompt, a paragraph", _SYSTEM_PROMPT_BYTES)
    yield Artefact("baked GGUF", path.stat().st_size)


def _pack_artefacts(path: Path, label: str) -> Iterator[Artefact]:
    pack = MaskPack.open(path)
    planes = pack.summary().planes
    mine = [plane for plane in planes if plane.pole in pack.personas[PERSONAS[0]]]
    bound = sum(plane.entropy_bound_bytes for plane in mine)
    yield Artefact(f"{label}: {PERSONAS[0]}", sum(plane.n_bytes for plane in mine), bound)
    bound = sum(plane.entropy_bound_bytes for plane in planes)
    contents = f"{len(pack.personas)} personas of {len(pack.pole_names)} poles"
    yield Artefact(f"{label}: the file, {contents}", pack.n_bytes, bound)
