"""From calibration data to statistics, on a model: cached, interruptible, resumable.

    Calibrator(model, fingerprint).margins(calibration_set)   margin statistics of one axis
    Calibrator(...).damage()                                   damage statistics on web text and on chat turns
    Calibrator(...).drift_gradient(planes, …)                  how a masked model's drift on these changes by the gates
    Calibrator(...).neutral_turns()                            the model's own answers to the neutral prompts

Everything is kept in the cache folder under a key of what it was computed from (the model file, the data, the settings,
the version of the formulas), and half-done sums are kept every few batches, so that an interrupted run goes on where
it was. What is done with the statistics is build.py's business.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from persona_edge.cache import cache_folder, writing_to
from persona_edge.collect import Focus, collect_damage, collect_drift, collect_margins
from persona_edge.contrasts import CalibrationSet
from persona_edge.encoding import Batch, EncodedText, batches, encode_chat, encode_contrast, encode_text
from persona_edge.errors import CalibrationError
from persona_edge.files import write_atomically
from persona_edge.generate import answer
from persona_edge.machine import release_freed_memory
from persona_edge.masks import Granularity, Plane
from persona_edge.modeling import LinearLayer, TorchModel
from persona_edge.packed_pairs import ContrastPair, contrast_batches
from persona_edge.per_tensor import PerTensor
from persona_edge.persona_sets import neutral_prompts, neutral_texts
from persona_edge.scores import suppression_benefit
from persona_edge.statistics import Statistics, load_statistics, merge, save_statistics, stored_means

__all__ = ["CalibrationSettings", "Calibrator", "DamageStatistics", "NeutralData", "Progress", "divided", "silent"]

# Raised whenever the same data and settings would give other sums.
FORMULA_VERSION = 3
SECONDS_BETWEEN_CHECKPOINTS = 20.0

Progress = Callable[[str, int, int], None]
Contrasts = CalibrationSet | Sequence[ContrastPair]
"""Contrasts, or their answers as tokens after the tokens of what was said before."""
_Text = TypeVar("_Text")


def silent(_stage: str, _done: int, _total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What besides model and data the statistics depend on.

    `max_batch_tokens` bounds a padded batch, and with it memory. Neutral texts are cut to `neutral_tokens`, answers to
    `answer_tokens`. `held_out` and `held_out_web` are the shares of neutral turns and passages kept for measuring.
    """

    max_batch_tokens: int = 1024
    neutral_tokens: int = 128
    answer_tokens: int = 64
    held_out: float = 0.25
    held_out_web: float = 1 / 3
    gate_fisher: bool = True
    granularity: Granularity = 32
    seed: int = 0


@dataclass(frozen=True)
class NeutralData:
    """Encoded neutral text: one part to compute damage on and one to measure drift on."""

    web: tuple[EncodedText, ...]
    chat: tuple[EncodedText, ...]
    held_out_web: tuple[EncodedText, ...]
    held_out_chat: tuple[EncodedText, ...]


@dataclass(frozen=True)
class DamageStatistics:
    """Damage statistics on neutral web text and on neutral chat turns."""

    web: Statistics
    chat: Statistics


@dataclass(frozen=True)
class _Place:
    """Where statistics are kept, and what they were computed from."""

    path: Path
    key: Mapping[str, object]


class Calibrator:
    """Computes, or finds in the cache, the statistics of one model.

    `fingerprint` identifies the weights (a file's SHA-256 or the like). `layers` are watched; by default all. Creates
    its folder at once, so that a place that cannot be written to is an OutputError before the work, not after it.
    """

    def __init__(
        self,
        model: TorchModel,
        fingerprint: str,
        *,
        settings: CalibrationSettings = CalibrationSettings(),
        layers: Sequence[LinearLayer] | None = None,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self.model = model
        self.settings = settings
        self.layers = tuple(model.layers if layers is None else layers)
        self.progress = progress
        self._folder = (cache_folder() / "statistics" if folder is None else folder) / fingerprint[:16]
        with writing_to(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._base_key: dict[str, object] = {
            "version": FORMULA_VERSION,
            "model": fingerprint,
            "dtype": model.dtype_name,
            "layers": _hash([layer.name for layer in self.layers]),
            "seed": settings.seed,
        }

    @property
    def model_key(self) -> Mapping[str, object]:
        """What identifies the model as it computes here: its weights, number format and layers; and the seed."""
        return dict(self._base_key)

    def margins(
        self, calibration_set: Contrasts, *, focus: Focus | None = None, mask: str = "", label: str = ""
    ) -> Statistics:
        """Margin statistics of all contrasts of `calibration_set`; give it the calibration part of a split.

        On a masked model, `mask` says which mask is on (planes_digest), so that the cache knows; `focus` weighs the
        contrasts. `label` is what progress is told.
        """
        groups = self._contrast_batches(calibration_set)
        granularity = self.settings.granularity

        def one(i: int, onto: Statistics | None) -> Statistics:
            return collect_margins(self.model, self.layers, groups[i], granularity=granularity, focus=focus, onto=onto)

        place = self._margin_place(calibration_set, groups, focus, mask)
        by_default = f"contrasts {calibration_set.axis}" if isinstance(calibration_set, CalibrationSet) else "contrasts"
        return self._sum(label or by_default, place, [len(g) for g in groups], one)

    def margins_by_halves(self, calibration_set: CalibrationSet) -> Statistics:
        """The same as `margins`, computed and kept by halves, as `benefits_by_halves` does."""
        first, *second = (self.margins(half, label=label) for half, label in _halves(calibration_set))
        return merge(first, *second) if second else first

    def gate_benefits(
        self, calibration_set: Contrasts, *, focus: Focus | None = None, mask: str = "", label: str = ""
    ) -> PerTensor:
        """What closing each gate does toward the positive pole, mean over contrasts; measured if need be.

        Nats of margin, (n_rows, n_units) per tensor; options are those of `margins`. Read from the disk each time it is
        asked for: benefits are looked at beside other axes' (separation.py) and earlier steps' (growth.py), and of an
        8B model are 0.9 GB each.
        """
        self.margins(calibration_set, focus=focus, mask=mask, label=label)
        place = self._margin_place(calibration_set, self._contrast_batches(calibration_set), focus, mask)
        gradients = stored_means(place.path, place.key, "gate_gradient", "contrasts")
        return PerTensor(gradients, lambda name: suppression_benefit(gradients[name]))

    def benefits_by_halves(self, calibration_set: CalibrationSet) -> PerTensor:
        """The same as `gate_benefits`, from the two halves'."""
        first, *second = self.benefits_of_halves(calibration_set)
        if not second:
            return first
        share = np.float32(len(calibration_set.halves()[0]) / len(calibration_set))
        return PerTensor(first, lambda name: share * first[name] + (1 - share) * second[0][name])

    def benefits_of_halves(self, calibration_set: CalibrationSet) -> list[PerTensor]:
        """The `gate_benefits` of both halves; of the set alone when it cannot be halved."""
        return [self.gate_benefits(half, label=label) for half, label in _halves(calibration_set)]

    def damage(self) -> DamageStatistics:
        """Damage statistics on the shipped neutral passages and on the model's answers to the neutral prompts."""
        data = self.neutral_data()
        return DamageStatistics(self._damage("web text", data.web), self._damage("chat turns", data.chat))

    def drift_gradient(self, planes: Sequence[Plane], *, mask: str, chat_weight: float, label: str = "") -> PerTensor:
        """How the drift that `planes` cause changes with each gate: what opening it adds, (n_rows, n_units) per tensor.

        The drift is KL(base || masked) in nats per token of the neutral web passages plus `chat_weight` times that of
        the chat turns, those that damage is measured on. `mask` is the planes_digest of `planes`; the model comes
        unmasked. Read from the disk when asked for, as `gate_benefits` are.
        """
        data, granularity = self.neutral_data(), self.settings.granularity
        weighted = []
        for name, texts, weight in (("web text", data.web, 1.0), ("chat turns", data.chat, chat_weight)):
            groups = list(batches(texts, max_tokens=self.settings.max_batch_tokens, device=self.model.device))

            def one(i: int, onto: Statistics | None, groups: Sequence[Batch] = groups) -> Statistics:
                return collect_drift(self.model, self.layers, groups[i], planes, granularity=granularity, onto=onto)

            what = {"what": "drift", "texts": _hash([text.tokens for text in texts]), "mask": mask}
            place = self._place("drift", {**what, "granularity": granularity}, [group.items for group in groups])
            self._sum(f"{name} {label}".rstrip(), place, [len(group.items) for group in groups], one)
            weighted.append((np.float32(weight), stored_means(place.path, place.key, "drift_gradient", "tokens")))
        (web, on_web), (chat, on_chat) = weighted
        return PerTensor(on_web, lambda name: web * on_web[name] + chat * on_chat[name])

    def neutral_data(self) -> NeutralData:
        """The neutral texts, encoded; generates the chat answers when they are not cached."""
        settings, tokenizer = self.settings, self.model.tokenizer
        web = [encode_text(tokenizer, text, max_tokens=settings.neutral_tokens) for text in neutral_texts()]
        chat = [encode_chat(tokenizer, prompt, text) for prompt, text in self.neutral_turns() if text.strip()]
        if not chat:
            raise CalibrationError("the model answers every neutral prompt with nothing; is it a language model?")
        web_part, held_out_web = divided(web, settings.held_out_web)
        chat_part, held_out_chat = divided(chat, settings.held_out)
        return NeutralData(web=web_part, chat=chat_part, held_out_web=held_out_web, held_out_chat=held_out_chat)

    def neutral_turns(self) -> tuple[tuple[str, str], ...]:
        """(prompt, the unmasked model's own sampled answer) for every neutral prompt."""
        prompts, settings = neutral_prompts(), self.settings
        key = self._key({"what": "turns", "prompts": _hash(prompts), "tokens": settings.answer_tokens})
        path = self._folder / f"turns-{_hash(key)[:12]}.json"
        cached = read_json(path, key)
        if isinstance(cached, list) and len(cached) == len(prompts):
            return tuple(zip(prompts, map(str, cached), strict=True))
        answers = answer(
            self.model, prompts, max_tokens=settings.answer_tokens, seed=settings.seed, progress=self.progress
        )
        write_json(path, key, answers)
        return tuple(zip(prompts, answers, strict=True))

    def cached_json(self, name: str, what: Mapping[str, object], compute: Callable[[], object]) -> object:
        """`compute()`, or what an earlier call with the same name and `what` computed on this model and settings."""
        key = self._key({"what": name, **what})
        path = self._folder / f"{name}-{_hash(key)[:12]}.json"
        value = read_json(path, key)
        if value is None:
            value = compute()
            write_json(path, key, value)
        return value

    def _contrast_batches(self, contrasts: Contrasts) -> list[list[ContrastPair]]:
        pairs: Sequence[ContrastPair]
        if isinstance(contrasts, CalibrationSet):
            pairs = [encode_contrast(self.model.tokenizer, c, i) for i, c in enumerate(contrasts.contrasts)]
        else:
            pairs = contrasts
        return contrast_batches(pairs, max_tokens=self.settings.max_batch_tokens)

    def _margin_place(
        self, contrasts: Contrasts, groups: Sequence[Sized], focus: Focus | None = None, mask: str = ""
    ) -> _Place:
        what: dict[str, object] = {
            "what": "margins",
            "set": _content(contrasts),
            "granularity": self.settings.granularity,
        }
        if focus is not None or mask:
            what.update(mask=mask, focus=None if focus is None else asdict(focus))
        return self._place("margin", what, groups)

    def _damage(self, label: str, texts: Sequence[EncodedText]) -> Statistics:
        settings = self.settings
        groups = list(batches(texts, max_tokens=settings.max_batch_tokens, device=self.model.device))
        key = {"what": "damage", "texts": _hash([text.tokens for text in texts]), "fisher": settings.gate_fisher}

        def one(i: int, onto: Statistics | None) -> Statistics:
            fisher, seed = settings.gate_fisher, settings.seed + i
            return collect_damage(self.model, self.layers, groups[i], seed=seed, gate_fisher=fisher, onto=onto)

        place = self._place("damage", key, [g.items for g in groups])
        return self._sum(f"neutral {label}", place, [len(g.items) for g in groups], one)

    def _place(self, kind: str, what: Mapping[str, object], groups: Sequence[Sized]) -> _Place:
        key = self._key({**what, "batches": [len(group) for group in groups]})
        return _Place(self._folder / f"{kind}-{_hash(key)[:12]}.safetensors", key)

    def _sum(
        self,
        label: str,
        place: _Place,
        sizes: Sequence[int],
        one: Callable[[int, Statistics | None], Statistics],
    ) -> Statistics:
        """Sum over the batches: `one(i, sums so far)` adds batch i. Resumes from, and leaves, checkpoints."""
        path, key = place.path, place.key
        total = load_statistics(path, key)
        if total is not None:
            return total
        partial = path.with_suffix(".partial")
        total = load_statistics(partial, key)
        done = 0 if total is None else total.counts["batches"]
        saved = time.monotonic()
        for i in range(done, len(sizes)):
            self.progress(label, sum(sizes[:i]), sum(sizes))
            total = one(i, total)
            release_freed_memory()
            if i + 1 < len(sizes) and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                save_statistics(partial, total, key)
                saved = time.monotonic()
        self.progress(label, sum(sizes), sum(sizes))
        if total is None:
            raise CalibrationError(f"{label}: nothing to calibrate on")
        save_statistics(path, total, key)
        partial.unlink(missing_ok=True)
        return total

    def _key(self, what: Mapping[str, object]) -> dict[str, object]:
        return {**self._base_key, **what}


def _content(contrasts: Contrasts) -> str:
    """What distinguishes these contrasts from others."""
    if isinstance(contrasts, CalibrationSet):
        return contrasts.content_hash()
    return _hash([[[*text.tokens], text.n_scored] for pair in contrasts for text in pair])


def _halves(calibration_set: CalibrationSet) -> list[tuple[CalibrationSet, str]]:
    """Both halves and what progress calls them; the set alone when it cannot be halved."""
    first, second = calibration_set.halves()
    axis = calibration_set.axis
    if first is second:
        return [(calibration_set, f"contrasts {axis}")]
    return [(first, f"contrasts {axis}, first half"), (second, f"contrasts {axis}, second half")]


def divided(texts: Sequence[_Text], held_out: float) -> tuple[tuple[_Text, ...], tuple[_Text, ...]]:
    """Neutral texts to compute damage on, and about the share `held_out` of them to measure on: every n-th, n >= 2."""
    every = max(2, round(1 / held_out))
    return tuple(text for i, text in enumerate(texts) if i % every), tuple(texts[::every])


def read_json(path: Path, key: Mapping[str, object]) -> object:
    """The value that `write_json` wrote under the same key, else None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("value") if isinstance(found, dict) and found.get("key") == _plain(key) else None


def write_json(path: Path, key: Mapping[str, object], value: object) -> None:
    """Write key and value, whole or not at all. Raises OutputError."""
    write_atomically(path, json.dumps({"key": _plain(key), "value": value}).encode())


def _plain(key: Mapping[str, object]) -> object:
    return json.loads(json.dumps(dict(key)))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
