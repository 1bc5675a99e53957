"""The offline line in one place: a model and a persona set in, personas with their masks and quality report out.

    statistics (calibration.py) -> ranking (pole_masks.py) -> steps up to the limits on drift (growth.py)
    -> planes -> report on held-out data (evaluation.py) -> PersonaSet

Each pole's budget is the largest whose drift on held-out neutral text stays within the limits. Every measured number is
cached, so that a repeated or resumed build measures nothing twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_edge import __version__
from persona_edge.budget_search import Drift
from persona_edge.calibration import Calibrator
from persona_edge.composition import Effects, strengths_within
from persona_edge.contrasts import CalibrationSet
from persona_edge.encoding import EncodedText, encode_contrast
from persona_edge.errors import CalibrationError, InputError
from persona_edge.evaluation import BaseBehaviour, MarginResult, margins, mean_kl, measure_base, score_answers
from persona_edge.growth import Grown, Growth, Limits, expected, fixed
from persona_edge.masked_model import masked
from persona_edge.masks import Granularity, PersonaSet, Plane, Pole, planes_digest
from persona_edge.persona_sets import PersonaSpec, neutral_prompts
from persona_edge.pole_masks import Gates, Method, PlaneMaker, Side, fisher_planes, paper_planes, tensor_damages
from persona_edge.repetition import RepetitionProbe
from persona_edge.separation import NO_OTHERS, Other, Others
from persona_edge.tensor_filter import filter_tensors

__all__ = ["BuildSettings", "build_personas"]

BASE_CONTRASTS, COMPOSED_CONTRASTS, COMPOSED_SEED = 120, 40, 7
"""How many calibration contrasts of an axis say where the base model stands and how far masks move it; the differences
of the few are as steady as the positions of the many."""
ASKED_OF_ALL, ASKED_OF_AXIS = 64, 96
"""How many neutral and how many of an axis's own prompts a masked model is asked, to see where it repeats itself."""
LEAST_SPREAD = 1e-6  # nats per token, where all margins are the same


@dataclass(frozen=True)
class BuildSettings:
    """How masks are made.

    Limits, per pole, on held-out neutral text: `max_perplexity_ratio` (masked / base) and `max_chat_kl` (nats per
    token). `budget` (nats per token) or `density` (share of units) fixes the amount instead of searching for it, and is
    spent in one step; the paper's methods need `density`. A composition may drift `composition_limit` times as far as a
    pole, and takes its poles at strengths that keep it there (composition.py); None takes all of them, as does a fixed
    amount. `n_steps` is how often benefits are measured, each time but the first on `step_contrasts` contrasts and with
    the mask so far (growth.py). `separate_axes` keeps a pole from moving the axes that it is composed with
    (separation.py); a mask cut at a `density` does not. `avoid_repetition` keeps the steps after the first from making
    replies repeat themselves (repetition.py).
    """

    method: Method = "contrastive-fisher"
    granularity: Granularity = 32
    suppress_gate: float = 0.0
    amplify_gate: float | None = None
    max_perplexity_ratio: float | None = 1.018
    max_chat_kl: float | None = 0.18
    composition_limit: float | None = 2.5
    budget: float | None = None
    density: float | None = None
    include: Sequence[str] = field(default=())
    exclude: Sequence[str] = field(default=())
    layers: str | None = None
    n_steps: int = 3
    step_contrasts: int = 64
    separate_axes: bool = True
    avoid_repetition: bool = True
    search_trials: int = 6

    def check(self) -> None:
        """InputError when the settings contradict each other."""
        if self.budget is not None and self.density is not None:
            raise InputError("give --budget or --density, not both")
        if self.method != "contrastive-fisher" and self.density is None:
            raise InputError(f"--method {self.method} suppresses a share of the weights; give --density, such as 0.3")
        if self.n_steps < 1 or self.step_contrasts < 1 or self.search_trials < 1:
            raise InputError("a mask needs at least 1 step, 1 contrast in each and 1 trial of the budget search")
        if self.composition_limit is not None and self.composition_limit <= 0:
            raise InputError(f"a composition may not drift {self.composition_limit} times as far as a pole; give 2.5")


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

    def build(self) -> PersonaSet:
        poles: list[Pole] = []
        reports: dict[str, Any] = {}
        for axis_set in self.spec.sets:
            for pole, report in self._axis(axis_set):
                poles.append(pole)
                reports[pole.name] = report
        personas = dict(self.spec.personas)
        found = self._compositions(poles, personas)
        strengths = {name: strengths for name, (strengths, _) in found.items() if min(strengths) < 1}
        report = self._report(reports, {name: asdict(drift) for name, (_, drift) in found.items()})
        return PersonaSet(self.model.identity(), tuple(poles), personas, report, strengths)

    def _axis(self, axis_set: CalibrationSet) -> list[tuple[Pole, dict[str, Any]]]:
        calibration, held_out = axis_set.split()
        base = self._margins(held_out, ())
        others = self._others(axis_set)
        made = []
        sides: tuple[tuple[Side, str], ...] = (
            ("positive", axis_set.positive_pole),
            ("negative", axis_set.negative_pole),
        )
        for side, name in sides:
            grown = self._grow(calibration, side, name, others)
            effect = self._margins(held_out, grown.planes)
            pole = Pole(name, axis_set.axis, grown.planes)
            made.append((pole, self._pole_report(axis_set, side, grown=grown, base=base, effect=effect)))
        return made

    def _others(self, axis_set: CalibrationSet) -> Others:
        """What closing each gate does to the axes that this one is composed with in some persona."""
        settings = self.settings
        if not settings.separate_axes or settings.method != "contrastive-fisher" or settings.density is not None:
            return NO_OTHERS
        mine = {axis_set.positive_pole, axis_set.negative_pole}
        partners = {pole for poles in self.spec.personas.values() if mine.intersection(poles) for pole in poles} - mine
        halves = [
            self.calibrator.benefits_of_halves(other.split()[0])
            for other in self.spec.sets
            if partners.intersection((other.positive_pole, other.negative_pole))
        ]
        return [Other(benefits[0], benefits[-1]) for benefits in halves]

    def _grow(self, calibration: CalibrationSet, side: Side, name: str, others: Others) -> Grown:
        """The planes at the amount asked for, or as many as the limits allow."""
        settings = self.settings
        amount = settings.budget if settings.density is None else settings.density
        if amount is None:
            benefits = self.calibrator.benefits_by_halves(calibration)
            return self._growth.grow(
                calibration, benefits, side, name, others=others, repetition=self._repetition(calibration)
            )
        planes = self._maker(calibration, side, others)(amount)
        return fixed(planes, amount, self._drift(planes))

    def _repetition(self, calibration: CalibrationSet) -> RepetitionProbe | None:
        """What asks a model with a mask of this axis what ordinary people ask, and what the axis is about."""
        if not self.settings.avoid_repetition:
            return None
        asked = [contrast.prompt for contrast in calibration.limit(ASKED_OF_AXIS).contrasts]
        return RepetitionProbe(self.calibrator, [*neutral_prompts()[:ASKED_OF_ALL], *asked])

    def _maker(self, calibration: CalibrationSet, side: Side, others: Others) -> PlaneMaker:
        settings = self.settings
        if settings.method != "contrastive-fisher":
            statistics = self.calibrator.margins_by_halves(calibration)
            return paper_planes(
                self.model, self.names, statistics, method=settings.method, side=side, gate=settings.suppress_gate
            )
        damage = self._growth.damages.weighted(1.0, self._limits.chat_weight)
        ranked = fisher_planes(
            self.calibrator.benefits_by_halves(calibration),
            damage,
            side,
            self._gates,
            settings.granularity,
            others=others,
            budget=settings.budget or 0.0,
        )
        return ranked.take_density if settings.density is not None else ranked.take

    @cached_property
    def _growth(self) -> Growth:
        settings = self.settings
        statistics = self.calibrator.damage()
        return Growth(
            self.calibrator,
            tensor_damages(self.model, self.names, statistics, granularity=settings.granularity),
            self._drift,
            limits=self._limits,
            gates=self._gates,
            granularity=settings.granularity,
            n_steps=settings.n_steps,
            n_trials=settings.search_trials,
            n_contrasts=settings.step_contrasts,
            progress=self.calibrator.progress,
        )

    @property
    def _limits(self) -> Limits:
        return Limits(self.settings.max_perplexity_ratio, self.settings.max_chat_kl)

    @property
    def _gates(self) -> Gates:
        return Gates(self.settings.suppress_gate, self.settings.amplify_gate)

    def _drift(self, planes: Sequence[Plane]) -> Drift:
        def compute() -> object:
            bench = self._bench  # before the mask is on
            with masked(self.model, planes):
                web, chat = mean_kl(self.model, bench.web), mean_kl(self.model, bench.chat)
            return asdict(Drift(web.perplexity_ratio, chat.kl_divergence, web.kl_divergence))

        found = self.calibrator.cached_json(
            "drift", {"mask": planes_digest(planes), "texts": self._neutral_key}, compute
        )
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

        key = {"mask": planes_digest(planes), "held_out": held_out.content_hash()}
        return MarginResult(**self.calibrator.cached_json("margins", key, compute))  # type: ignore[arg-type]

    def _compositions(
        self, poles: Sequence[Pole], personas: Mapping[str, tuple[str, ...]]
    ) -> dict[str, tuple[tuple[float, ...], Drift]]:
        """How much of each of its poles every composed persona takes, and its drift."""
        by_name = {pole.name: pole for pole in poles}
        composed = {name: parts for name, parts in personas.items() if len(parts) > 1}
        found = {}
        for i, (name, parts) in enumerate(composed.items()):
            self.calibrator.progress("compositions", i, len(composed))
            chosen = [by_name[part] for part in parts]
            strengths = self._strengths(chosen)
            found[name] = strengths, self._drift(_planes(chosen, strengths))
        if composed:
            self.calibrator.progress("compositions", len(composed), len(composed))
        return found

    def _strengths(self, poles: Sequence[Pole]) -> tuple[float, ...]:
        """The strengths at which `poles` are composed (composition.py); all of them where the amount was given."""
        settings = self.settings
        if settings.composition_limit is None or settings.budget is not None or settings.density is not None:
            return (1.0,) * len(poles)
        limits = self._limits.share(settings.composition_limit)

        def measure(strengths: Iterable[float]) -> NDArray[np.float64]:
            return limits.used(expected(self._drift(_planes(poles, strengths))))

        costs = np.stack([limits.used(expected(self._drift(pole.planes))) for pole in poles], axis=1)
        found = strengths_within(measure, costs, self._effects(poles))
        return tuple(map(float, found))

    def _effects(self, poles: Sequence[Pole]) -> Effects:
        """How far each of `poles` moves its axis, alone and with each of the others beside it."""
        before = [mean / spread for mean, spread in map(self._standing, poles)]
        alone = [self._moved(pole, (pole,)) for pole in poles]
        beside = [
            [0.0 if other is pole else self._moved(pole, (pole, other)) - alone[p] for other in poles]
            for p, pole in enumerate(poles)
        ]
        return Effects(np.array(before), np.array(alone), np.array(beside))

    def _standing(self, pole: Pole) -> tuple[float, float]:
        """Mean and spread of the margins toward `pole` without a mask, nats per token."""
        contrasts, toward = self._contrasts_of(pole)
        values = toward * self._contrast_margins(contrasts.limit(BASE_CONTRASTS, seed=COMPOSED_SEED), ())
        return float(values.mean()), max(float(values.std()), LEAST_SPREAD)

    def _moved(self, pole: Pole, on: Sequence[Pole]) -> float:
        """How far the poles `on`, whole, move that mean, in that spread."""
        contrasts, toward = self._contrasts_of(pole)
        some = contrasts.limit(COMPOSED_CONTRASTS, seed=COMPOSED_SEED)
        # One key in the cache for a pair, whichever of the two is asked about.
        in_order = sorted(on, key=lambda one: one.name)
        planes = _planes(in_order, [1.0] * len(on))
        moved = toward * (self._contrast_margins(some, planes) - self._contrast_margins(some, ()))
        return float(moved.mean()) / self._standing(pole)[1]

    def _contrasts_of(self, pole: Pole) -> tuple[CalibrationSet, int]:
        """The calibration part of the pole's axis, and +1 where it is the positive pole of it, else -1."""
        axis_set = next(item for item in self.spec.sets if item.axis == pole.axis)
        return axis_set.split()[0], 1 if pole.name == axis_set.positive_pole else -1

    def _contrast_margins(self, contrasts: CalibrationSet, planes: Sequence[Plane]) -> NDArray[np.float64]:
        """The margin of each contrast with `planes` on, nats per token toward the positive pole."""

        def compute() -> object:
            pairs = [encode_contrast(self.model.tokenizer, c, i) for i, c in enumerate(contrasts.contrasts)]
            with masked(self.model, planes):
                positive, negative = score_answers(self.model, pairs).levels
            return [float(value) for value in positive - negative]

        key = {"mask": planes_digest(planes), "contrasts": contrasts.content_hash()}
        return np.array(self.calibrator.cached_json("contrast-margins", key, compute), np.float64)

    def _pole_report(
        self,
        axis_set: CalibrationSet,
        side: Side,
        *,
        grown: Grown,
        base: MarginResult,
        effect: MarginResult,
    ) -> dict[str, Any]:
        granularity = grown.planes[0].granularity if grown.planes else self.settings.granularity
        n_units = sum(self.model.layer(n).shape.n_units(granularity) for n in self.names)
        return {
            "axis": axis_set.axis,
            "side": side,
            "calibration_set": {"sha256": axis_set.content_hash(), "n_contrasts": len(axis_set)},
            "budget_nats": grown.budget if self.settings.density is None else None,
            "share_of_units": sum(plane.n_positions for plane in grown.planes) / n_units,
            "drift": asdict(grown.drift),
            "n_trials": grown.n_trials,
            "n_steps": len(grown.steps),
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


def _planes(poles: Sequence[Pole], strengths: Iterable[float]) -> list[Plane]:
    """All planes of `poles`, each at its strength."""
    return [plane for pole, strength in zip(poles, strengths, strict=True) for plane in pole.at(strength).planes]
