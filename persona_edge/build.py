"""The offline line in one place: a model and a persona set in, personas with their masks and quality report out.

    statistics (calibration.py) -> scores and ranking (pole_masks.py) -> budget by measured drift (budget_search.py)
    -> planes -> report on held-out data (evaluation.py) -> PersonaSet

Each pole's budget is the largest whose drift on held-out neutral text stays within the limits. Every measured number is
cached, so that a repeated or resumed build measures nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from persona_edge import __version__
from persona_edge.budget_search import BudgetResult, Drift, Trial, search_budget
from persona_edge.calibration import Calibrator
from persona_edge.contrasts import CalibrationSet
from persona_edge.encoding import EncodedText, encode_contrast
from persona_edge.errors import CalibrationError, InputError, SelectionError
from persona_edge.evaluation import BaseBehaviour, MarginResult, margins, mean_kl, measure_base
from persona_edge.masked_model import masked
from persona_edge.masks import Granularity, PersonaSet, Plane, Pole
from persona_edge.persona_sets import PersonaSpec
from persona_edge.pole_masks import Gates, Method, PlaneMaker, Side, fisher_planes, paper_planes, tensor_damage
from persona_edge.statistics import Statistics
from persona_edge.tensor_filter import filter_tensors

__all__ = ["BuildSettings", "build_personas"]

FIRST_BUDGET = 0.002


@dataclass(frozen=True)
class BuildSettings:
    """How masks are made.

    Limits, per pole, on held-out neutral text: `max_perplexity_ratio` (masked / base) and `max_chat_kl` (nats per
    token). `budget` (nats per token) or `density` (share of units) fixes the amount instead of searching for it; the
    paper's methods need `density`.
    """

    method: Method = "contrastive-fisher"
    granularity: Granularity = 32
    suppress_gate: float = 0.0
    amplify_gate: float | None = None
    max_perplexity_ratio: float | None = 1.015
    max_chat_kl: float | None = 0.1
    budget: float | None = None
    density: float | None = None
    include: Sequence[str] = field(default=())
    exclude: Sequence[str] = field(default=())
    layers: str | None = None
    search_steps: int = 6

    def check(self) -> None:
        """InputError when the settings contradict each other."""
        if self.budget is not None and self.density is not None:
            raise InputError("give --budget or --density, not both")
        if self.method != "contrastive-fisher" and self.density is None:
            raise InputError(f"--method {self.method} suppresses a share of the weights; give --density, such as 0.3")


@dataclass(frozen=True)
class _Bench:
    """What drift and effect are measured on, with the base model's own numbers."""

    web: BaseBehaviour
    chat: BaseBehaviour


def build_personas(calibrator: Calibrator, spec: PersonaSpec, settings: BuildSettings) -> PersonaSet:
    """Calibrate, score, select and measure every pole of `spec` on the calibrator's model.

    Raises CalibrationError for data without contrasts, InputError for settings that contradict each other and
    SelectionError when no mask keeps within the limits.
    """
    settings.check()
    if settings.method == "contrastive-fisher" and settings.granularity != calibrator.settings.granularity:
        raise InputError(
            f"masks at granularity {settings.granularity} need statistics of the same, "
            f"not of {calibrator.settings.granularity}"
        )
    for axis_set in spec.sets:
        _require_both_parts(axis_set)
    return _Builder(calibrator, spec, settings).build()


def _require_both_parts(axis_set: CalibrationSet) -> None:
    parts = axis_set.split()
    if not all(len(part) for part in parts):
        raise CalibrationError(
            f"{axis_set.name}: of its {len(axis_set)} contrasts {len(parts[0])} are for calibration, {len(parts[1])} "
            "for measuring; add contrasts with other prompts, a few dozen at least"
        )


class _Builder:
    def __init__(self, calibrator: Calibrator, spec: PersonaSpec, settings: BuildSettings) -> None:
        self.calibrator, self.spec, self.settings = calibrator, spec, settings
        self.model = calibrator.model
        all_names = [layer.name for layer in calibrator.layers]
        self.names = filter_tensors(all_names, settings.include, settings.exclude, settings.layers)
        self.damage: dict[str, Any] = {}
        self._start = FIRST_BUDGET

    def build(self) -> PersonaSet:
        if self.settings.method == "contrastive-fisher":
            statistics = self.calibrator.damage()
            self.damage = tensor_damage(self.model, self.names, statistics, granularity=self.settings.granularity)
        poles: list[Pole] = []
        reports: dict[str, Any] = {}
        for axis_set in self.spec.sets:
            for pole, report in self._axis(axis_set):
                poles.append(pole)
                reports[pole.name] = report
        personas = dict(self.spec.personas)
        composed = self._compositions(poles, personas)
        return PersonaSet(self.model.identity(), tuple(poles), personas, self._report(reports, composed))

    def _axis(self, axis_set: CalibrationSet) -> list[tuple[Pole, dict[str, Any]]]:
        calibration, held_out = axis_set.split()
        statistics = self.calibrator.margins(calibration)
        base = self._margins(held_out, ())
        made = []
        sides: tuple[tuple[Side, str], ...] = (
            ("positive", axis_set.positive_pole),
            ("negative", axis_set.negative_pole),
        )
        for side, name in sides:
            maker = self._maker(statistics, side)
            planes, search = self._planes(maker, name)
            effect = self._margins(held_out, planes)
            pole = Pole(name, axis_set.axis, planes)
            made.append(
                (pole, self._pole_report(axis_set, side, planes=planes, search=search, base=base, effect=effect))
            )
        return made

    def _maker(self, statistics: Statistics, side: Side) -> PlaneMaker:
        settings = self.settings
        if settings.method != "contrastive-fisher":
            return paper_planes(
                self.model, self.names, statistics, method=settings.method, side=side, gate=settings.suppress_gate
            )
        gates = Gates(settings.suppress_gate, settings.amplify_gate)
        ranked = fisher_planes(statistics, self.damage, side, gates, settings.granularity)
        return ranked.take_density if settings.density is not None else ranked.take

    def _planes(self, maker: PlaneMaker, label: str) -> tuple[tuple[Plane, ...], BudgetResult]:
        """The planes at the amount asked for, or at the largest budget within the limits."""
        fixed = self.settings.budget if self.settings.density is None else self.settings.density
        if fixed is not None:
            planes = maker(fixed)
            drift = self._drift(planes)
            return planes, BudgetResult(fixed, drift, (Trial(fixed, drift, True),))
        n_steps = self.settings.search_steps
        done = 0

        def measure(budget: float) -> Drift:
            nonlocal done
            self.calibrator.progress(f"budget {label}", done, n_steps)
            done += 1
            try:
                planes = maker(budget)
            except SelectionError:  # too little for even the best unit: no mask, no drift, look higher
                return Drift(1.0, 0.0, 0.0)
            return _cautious(self._drift(planes))

        result = search_budget(
            measure,
            start=self._start,
            max_perplexity_ratio=self.settings.max_perplexity_ratio,
            max_chat_kl=self.settings.max_chat_kl,
            n_steps=n_steps,
        )
        self.calibrator.progress(f"budget {label}", n_steps, n_steps)
        self._start = result.budget  # the next pole's is rarely far
        planes = maker(result.budget)
        return planes, replace(result, drift=self._drift(planes))

    def _drift(self, planes: Sequence[Plane]) -> Drift:
        def compute() -> object:
            bench = self._bench  # before the mask is on
            with masked(self.model, planes):
                web, chat = mean_kl(self.model, bench.web), mean_kl(self.model, bench.chat)
            return asdict(Drift(web.perplexity_ratio, chat.kl_divergence, web.kl_divergence))

        found = self.calibrator.cached_json("drift", {"mask": _digest(planes), "texts": self._neutral_key}, compute)
        return Drift(**found)  # type: ignore[arg-type]

    @cached_property
    def _neutral_key(self) -> str:
        tokens = [[text.tokens for text in texts] for texts in self._held_out_texts]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    @cached_property
    def _held_out_texts(self) -> tuple[Sequence[EncodedText], Sequence[EncodedText]]:
        data = self.calibrator.neutral_data()
        return data.held_out_web, data.held_out_chat

    @cached_property
    def _bench(self) -> _Bench:
        web, chat = self._held_out_texts
        return _Bench(measure_base(self.model, web), measure_base(self.model, chat))

    def _margins(self, held_out: CalibrationSet, planes: Sequence[Plane]) -> MarginResult:
        def compute() -> object:
            pairs = [encode_contrast(self.model.tokenizer, c, i) for i, c in enumerate(held_out.contrasts)]
            with masked(self.model, planes):
                return asdict(margins(self.model, pairs))

        key = {"mask": _digest(planes), "held_out": held_out.content_hash()}
        return MarginResult(**self.calibrator.cached_json("margins", key, compute))  # type: ignore[arg-type]

    def _compositions(self, poles: Sequence[Pole], personas: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        """Drift of each persona that is composed of several poles."""
        by_name = {pole.name: pole for pole in poles}
        composed = {name: parts for name, parts in personas.items() if len(parts) > 1}
        reports = {}
        for i, (name, parts) in enumerate(composed.items()):
            self.calibrator.progress("compositions", i, len(composed))
            planes = [plane for part in parts for plane in by_name[part].planes]
            reports[name] = asdict(self._drift(planes))
        if composed:
            self.calibrator.progress("compositions", len(composed), len(composed))
        return reports

    def _pole_report(
        self,
        axis_set: CalibrationSet,
        side: Side,
        *,
        planes: Sequence[Plane],
        search: BudgetResult,
        base: MarginResult,
        effect: MarginResult,
    ) -> dict[str, Any]:
        granularity = planes[0].granularity if planes else self.settings.granularity
        n_units = sum(self.model.layer(n).shape.n_units(granularity) for n in self.names)
        return {
            "axis": axis_set.axis,
            "side": side,
            "calibration_set": {"sha256": axis_set.content_hash(), "n_contrasts": len(axis_set)},
            "budget_nats": search.budget if self.settings.density is None else None,
            "share_of_units": sum(plane.n_positions for plane in planes) / n_units,
            "drift": asdict(search.drift),
            "n_trials": len(search.trials),
            # Shares toward the axis's positive pole: a negative pole should lower them.
            "held_out_base": asdict(base),
            "held_out": asdict(effect),
        }

    def _report(self, poles: Mapping[str, Any], compositions: Mapping[str, Any]) -> dict[str, Any]:
        settings = asdict(self.settings)
        return {
            "tool": f"persona-edge {__version__}",
            "model": self.model.name,
            "dtype": self.model.dtype_name,
            "settings": {**settings, "include": list(self.settings.include), "exclude": list(self.settings.exclude)},
            "poles": dict(poles),
            "compositions": dict(compositions),
        }


def _cautious(drift: Drift) -> Drift:
    """`drift` with the larger of the measured perplexity ratio and exp(web KL), which other text would show.

    A persona can make a few held-out passages likelier by their style while it harms text in general; on text that the
    model itself would write, the expected logarithm of the ratio is the KL divergence.
    """
    expected = math.exp(drift.web_kl or 0.0)
    return replace(drift, perplexity_ratio=max(drift.perplexity_ratio, expected))


def _digest(planes: Sequence[Plane]) -> str:
    """SHA-256 of exactly what a mask is, so that no measurement is ever taken for another mask's."""
    digest = hashlib.sha256()
    for plane in planes:
        for name, positions in plane.positions.items():
            digest.update(json.dumps([name, plane.gate, plane.granularity, len(positions)]).encode())
            digest.update(positions.astype("<u4").tobytes())
    return digest.hexdigest()
