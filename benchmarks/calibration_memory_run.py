"""One process of calibration_memory: calibrate one model the way `export` does, and say what each phase peaked at.

    python -m benchmarks.calibration_memory_run MODEL.gguf N_TOKENS STREAMING

prints one line of JSON. Everything is the product's own code but the texts: a batch of web text, one of chat turns, a
batch of contrasts and one short text of either kind to measure drift on, each as long as it has to be.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.memory_arithmetic import PHASES
from persona_edge.machine import release_freed_memory

if TYPE_CHECKING:
    from persona_edge.budget_search import Drift
    from persona_edge.calibration import Calibrator
    from persona_edge.contrasts import CalibrationSet
    from persona_edge.encoding import EncodedText
    from persona_edge.masks import Plane
    from persona_edge.modeling import TorchModel

__all__ = ["HELD_OUT_TOKENS", "Peaks", "run"]

HELD_OUT_TOKENS = 32
_TEXT_TOKENS = 128
_PROMPT_TOKENS = 22  # of a prompt of two characters in the template for models without one
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peaks:
    """Peak resident bytes by phase: of each where the system can forget the peak before (Linux), else of all so far."""

    def __init__(self) -> None:
        self.by_phase: dict[str, int] = {}
        self.is_per_phase = self._forget()

    def end(self, phase: str) -> None:
        """The phase is over: note its peak, give freed memory back, begin the next."""
        self.by_phase[phase] = self._peak()
        release_freed_memory()
        if self.is_per_phase:
            self._forget()

    def _forget(self) -> bool:
        try:
            _RESET.write_text("5", encoding="ascii")  # the kernel then starts VmHWM anew
            return "VmHWM" in _STATUS.read_text(encoding="ascii")
        except OSError:
            return False

    def _peak(self) -> int:
        if self.is_per_phase:
            lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
            return int(lines["VmHWM"].split()[0]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(source: Path, n_tokens: int, *, streaming: bool, dtype: Any = "bfloat16") -> dict[str, Any]:
    """Peak bytes by phase, whether they are per phase, and the bytes of weights and statistics that were there."""
    import torch  # noqa: F401 - its size belongs to what was there before

    from persona_edge.modeling import load_torch_model

    peaks = Peaks()
    peaks.end("before")
    model = load_torch_model(source, name=source.stem, device="cpu", dtype=dtype, streaming=streaming)
    peaks.end(PHASES[0])
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.model.parameters()}.values())
    with tempfile.TemporaryDirectory() as folder:
        held = _calibrate(model, n_tokens, Path(folder), peaks)
    return {"peaks": peaks.by_phase, "is_per_phase": peaks.is_per_phase, "weights": weights, **held}


def _calibrate(model: TorchModel, n_tokens: int, folder: Path, peaks: Peaks) -> dict[str, int]:
    from persona_edge.pole_masks import tensor_damages

    calibrator = _calibrator(model, n_tokens, folder)
    statistics = calibrator.damage()
    peaks.end(PHASES[1])
    held = {"damage_statistics": _n_bytes(statistics.web.sums) + _n_bytes(statistics.chat.sums)}
    damages = tensor_damages(model, [layer.name for layer in model.layers], statistics)
    peaks.end(PHASES[2])
    held["damages"] = sum(array.nbytes for array in (*damages.web.values(), *damages.chat.values()))
    del statistics
    drift, recorded = _drift(model)
    contrasts = _contrasts(model.tokenizer, n_tokens)
    held["margins"] = _n_bytes(calibrator.margins(contrasts).sums)
    peaks.end(PHASES[3])
    _grow(calibrator, damages, drift, contrasts)
    peaks.end(PHASES[4])
    return {**held, "predictions": recorded}


def _n_bytes(sums: Any) -> int:
    return sum(array.nbytes for tensors in sums.values() for array in tensors.values())


def _calibrator(model: TorchModel, n_tokens: int, folder: Path) -> Calibrator:
    from persona_edge.calibration import CalibrationSettings, Calibrator, NeutralData

    class Short(Calibrator):
        def neutral_data(self) -> NeutralData:
            texts = _texts(n_tokens // min(_TEXT_TOKENS, n_tokens), min(_TEXT_TOKENS, n_tokens))
            return NeutralData(texts, texts, (), ())

    return Short(model, "0" * 64, settings=CalibrationSettings(max_batch_tokens=n_tokens), folder=folder)


def _texts(n: int, n_tokens: int) -> tuple[EncodedText, ...]:
    from persona_edge.encoding import EncodedText

    return tuple(EncodedText(tuple(1 + (7 * i + j) % 200 for j in range(n_tokens)), n_tokens - 1) for i in range(n))


def _contrasts(tokenizer: Any, n_tokens: int) -> CalibrationSet:
    """Two contrasts that fill one batch; every character is a token of the synthetic models."""
    from persona_edge.contrasts import CalibrationSet, Contrast
    from persona_edge.encoding import encode_contrast

    n = max(1, (n_tokens // 2 - _PROMPT_TOKENS) // 2)
    rows = tuple(Contrast(f"{i}?", f"{i}" * n, "z" * n) for i in range(2))
    longest = max(len(one.tokens) + other.n_scored for one, other in (encode_contrast(tokenizer, c, 0) for c in rows))
    assert len(rows) * longest <= n_tokens, "the contrasts must fit into one batch"
    return CalibrationSet("memory", "AB", "A", "B", rows)


def _drift(model: TorchModel) -> tuple[Callable[[Sequence[Plane]], Drift], int]:
    from persona_edge.budget_search import Drift
    from persona_edge.evaluation import mean_kl, measure_base
    from persona_edge.masked_model import masked

    bases = [measure_base(model, texts) for texts in (_texts(1, HELD_OUT_TOKENS), _texts(1, HELD_OUT_TOKENS))]

    def drift(planes: Sequence[Plane]) -> Drift:
        with masked(model, planes):
            web, chat = (mean_kl(model, base) for base in bases)
        return Drift(web.perplexity_ratio, chat.kl_divergence, web.kl_divergence)

    return drift, sum(x.numel() * x.element_size() for base in bases for x in base.log_probabilities)


def _grow(calibrator: Calibrator, damages: Any, drift: Any, contrasts: CalibrationSet) -> None:
    """The positive pole's mask in two steps of one trial each; what it is does not matter, so nothing limits it."""
    from persona_edge.calibration import silent
    from persona_edge.growth import Growth, Limits
    from persona_edge.pole_masks import Gates

    growth = Growth(
        calibrator, damages, drift, limits=Limits(1e6, 1e6), gates=Gates(), granularity=32,
        n_steps=2, n_trials=1, n_contrasts=len(contrasts), progress=silent,
    )  # fmt: skip
    growth.grow(contrasts, calibrator.gate_benefits(contrasts), "positive", "A")


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), streaming=sys.argv[3] == "True")))
