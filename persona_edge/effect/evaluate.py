"""`persona-edge eval` as one call: a model and persona sets in, a record of all arms and tasks on all engines out.

What can be refused is refused before the minutes of work. An interrupted run goes on from its journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona_edge.build import BuildSettings
from persona_edge.cache import file_sha256
from persona_edge.calibration import Calibrator, Progress, silent
from persona_edge.conditions import conditions
from persona_edge.contrasts import CalibrationSet
from persona_edge.downloads import Progress as DownloadProgress
from persona_edge.effect.analysis import analyse_pack
from persona_edge.effect.arm_registry import RUNTIME_ARMS, ArmContext, make_arms
from persona_edge.effect.eval_files import EvalFiles, files_of
from persona_edge.effect.eval_plan import EvalRequest, Section, chosen_arms, chosen_tasks, from_pack, sections_of
from persona_edge.effect.even_contrasts import uneven_contrasts
from persona_edge.effect.interfaces import Arm, Engine, EngineName, Task
from persona_edge.effect.journal import Journal
from persona_edge.effect.mask_arms import mask_arm_from_pack
from persona_edge.effect.prompt_arms import base_arm
from persona_edge.effect.record import ArmRecord, Axis, Record, merged
from persona_edge.effect.reports import report_path, write_reports
from persona_edge.effect.run import PlannedArm, Runner, Subject
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.effect.tables import BASE, REFERENCE
from persona_edge.effect.task_registry import TaskContext, make_tasks, skipped_tasks
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.exporters.to_gguf import require_writable
from persona_edge.maskpack import MaskPack
from persona_edge.modeling import TorchModel, load_torch_model, require_offline
from persona_edge.sketch import check_identity

__all__ = ["EvalRequest", "evaluate", "finish", "journal_path"]

N_CTX = 2048  # what prompt arms and answers need, with room
QUICK_BUILD = BuildSettings(n_steps=1, search_trials=3, avoid_repetition=False)


def journal_path(request: EvalRequest) -> Path:
    """Where an unfinished evaluation keeps what it has measured."""
    return report_path(request.output, ".journal.jsonl")


def evaluate(
    request: EvalRequest, progress: Progress = silent, download_progress: DownloadProgress | None = None
) -> Record:
    """Measure everything that `request` asks for.

    Every error is a PersonaEdgeError, before the work where that is possible; what goes wrong with one arm or one task
    is part of the record instead.
    """
    arms, notes = chosen_arms(request)
    chosen_tasks(request)
    pack = None if request.pack is None else MaskPack.open(request.pack)
    sections = sections_of(request, pack)
    if request.engine != "runtime":
        require_offline()
    files = files_of(request, download_progress)
    if files.is_onnx:
        arms, left_out = from_pack(arms, pack)
        notes = (*notes, *left_out)
    require_writable(report_path(request.output, ".json"))
    notes = (*notes, *uneven_contrasts(sections, arms, pack))
    return _Evaluation(request, arms, pack, files, progress).record(sections, notes)


def finish(record: Record, request: EvalRequest) -> tuple[Path, ...]:
    """Write the reports and return their paths. The journal goes, unless something failed and may be tried again."""
    paths = write_reports(record, request.output)
    if not any(arm.error or any(outcome.error for outcome in arm.outcomes) for arm in record.arms):
        Journal(journal_path(request)).remove()
    return paths


class _Evaluation:
    def __init__(
        self,
        request: EvalRequest,
        arms: Sequence[str],
        pack: MaskPack | None,
        files: EvalFiles,
        progress: Progress,
    ) -> None:
        self.request, self.arms, self.pack = request, arms, pack
        self.files, self.progress = files, progress
        self.subject = Subject(files.name, files.fingerprint)
        self.journal = Journal(journal_path(request))
        self.notes: list[str] = []

    @cached_property
    def model(self) -> TorchModel:
        """The model in PyTorch, loaded when it is needed: a pack on the runtime is measured without it."""
        request, weights = self.request, self.files.weights
        return load_torch_model(weights, name=weights.stem, device=request.device, dtype=request.dtype)

    @cached_property
    def context(self) -> ArmContext:
        """What arms are made from."""
        return ArmContext(
            self.model,
            Calibrator(self.model, self.files.fingerprint, progress=self.progress),
            self._build,
            max_chat_kl=self.request.max_chat_kl,
            max_perplexity_ratio=self.request.max_perplexity_ratio,
            seed=self.request.seed,
            progress=self.progress,
        )

    def record(self, sections: Sequence[Section], notes: Sequence[str]) -> Record:
        """Every engine on every section."""
        arms = [arm for name in self.files.engines for arm in self._on_engine(name, sections)]
        record = Record(
            model=self.subject.model,
            fingerprint=self.files.fingerprint,
            axes=tuple(dict.fromkeys(Axis.of(section.axis_set) for section in sections)),
            arms=tuple(arms),
            settings=self._settings(sections),
            conditions=conditions(self.request.command),
            notes=tuple(dict.fromkeys([*notes, *self.notes])),
            analysis=self._analysis(),
        )
        return merged([record])  # base was measured once per axis

    def _analysis(self) -> dict[str, object]:
        """What the masks of the pack look like; hidden states only where the model is there and time is."""
        if self.pack is None:
            return {}
        self.progress("masks of the pack", 0, 1)
        model = None if self.request.quick or self.request.engine == "runtime" else self.model
        found = asdict(analyse_pack(self.pack, model))
        self.progress("masks of the pack", 1, 1)
        return found

    def _on_engine(self, name: EngineName, sections: Sequence[Section]) -> Iterator[ArmRecord]:
        with self._engine(name) as engine:
            subject = replace(self.subject, loaded_as=self._loaded_as(name))
            runner = Runner(engine, progress=self.progress, subject=subject, journal=self.journal)
            for section in sections:
                tasks = self._tasks(section)
                for plan in self._plans(name, section):
                    yield runner.measure(plan, tasks, Axis.of(section.axis_set))

    def _loaded_as(self, name: EngineName) -> str:
        if name == "pytorch":
            return self.model.dtype_name
        return self.files.onnx_fingerprint or "" if name == "onnx" else ""

    @contextmanager
    def _engine(self, name: EngineName) -> Iterator[Engine]:
        """The engine; ModelMismatchError when the pack was made from another model."""
        if name == "pytorch":
            if self.pack is not None:
                _check_pack(self.pack, self.model)
            yield TorchEngine(self.model)
            return
        with RuntimeEngine.open(self.files.runtimes[name], n_ctx=N_CTX, n_threads=self.request.n_threads) as engine:
            if name == "onnx" and engine.runtime.placement.is_fallback:
                self.notes.append(f"onnx: {engine.runtime.placement.text}")
            if self.pack is not None:
                engine.runtime.attach(self.pack)
            yield engine

    def _tasks(self, section: Section) -> list[Task]:
        names, request = chosen_tasks(self.request), self.request
        context = TaskContext(section.axis_set, section.spec, request.data, request.items, request.seed)
        for skipped in skipped_tasks(names, context):
            reason = skipped.reason.replace(str(request.data), "the data")  # where files lie is nobody's business
            self.notes.append(f"axis {section.axis_set.axis}, no {skipped.name}: {reason}")
        return make_tasks(names, context)

    def _plans(self, engine: EngineName, section: Section) -> Iterator[PlannedArm]:
        for name in self.arms:
            if name == BASE:
                yield PlannedArm(BASE, None, 0, base_arm)
            elif engine == "pytorch" or name in RUNTIME_ARMS:
                for persona, toward in section.wearers:
                    yield from self._plan(name, section, persona, toward)

    def _plan(self, name: str, section: Section, persona: str, toward: int) -> Iterator[PlannedArm]:
        axis_set, made_from = section.axis_set, section.made_from
        if name == REFERENCE and self.pack is not None:
            make = partial(mask_arm_from_pack, self.pack, persona, toward)
            yield PlannedArm(name, persona, toward, make, {"pack": self._pack_sha256})
        elif persona in (axis_set.positive_pole, axis_set.negative_pole):
            yield PlannedArm(name, persona, toward, partial(self._made, name, made_from, toward), self._key(made_from))
        else:
            self.notes.append(f"{name} is made for poles, not for compositions such as {persona}")

    def _made(self, name: str, axis_set: CalibrationSet, toward: int) -> Arm:
        return next(make_arms([name], self.context, axis_set, toward))

    @property
    def _build(self) -> BuildSettings:
        return QUICK_BUILD if self.request.quick else BuildSettings()

    @cached_property
    def _pack_sha256(self) -> str:
        return "" if self.request.pack is None else file_sha256(self.request.pack)

    def _key(self, axis_set: CalibrationSet) -> dict[str, object]:
        """What an arm of this axis is made from."""
        request, descriptions = self.request, [axis_set.positive_description, axis_set.negative_description]
        limits = [request.max_chat_kl, request.max_perplexity_ratio]
        return {
            "set": axis_set.content_hash(),
            "descriptions": descriptions,
            "limits": limits,
            "build": asdict(self._build),
            "dtype": request.dtype,
            "seed": request.seed,
        }

    def _onnx_settings(self) -> dict[str, object]:
        """What the engine onnx runs, where the record is of the GGUF file."""
        graph = self.files.runtimes.get("onnx")
        if graph is None or self.files.is_onnx:
            return {}
        return {"ONNX model": f"{graph.parent.name}, SHA-256 {self.files.onnx_fingerprint}"}

    def _settings(self, sections: Sequence[Section]) -> dict[str, object]:
        request = self.request
        return {
            "items per task, at most": request.items,
            "seed": request.seed,
            "chat KL, at most": request.max_chat_kl,
            "perplexity ratio, at most": request.max_perplexity_ratio,
            "number format of PyTorch": None if request.engine == "runtime" else self.model.dtype_name,
            **self._onnx_settings(),
            "pack": None if request.pack is None else f"{request.pack.name}, SHA-256 {self._pack_sha256}",
            "sets": {s.axis_set.axis: f"{s.spec.name}, SHA-256 {s.axis_set.content_hash()}" for s in sections},
            "contrasts that arms are made from, at most": request.n_contrasts,
        }


def _check_pack(pack: MaskPack, model: TorchModel) -> None:
    """ModelMismatchError unless the pack was made from these weights."""

    def read(name: str, positions: NDArray[np.uint32]) -> NDArray[np.float32]:
        return model.layer(name).weights().reshape(-1)[positions]

    check_identity(pack.identity, model.architecture, [layer.shape for layer in model.layers], read)
