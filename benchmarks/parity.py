"""Masked runtime = masked PyTorch: the same mask on the same weights gives the same next-token distributions.

llama.cpp and PyTorch never agree to the last bit, masked or not: llama.cpp rounds the inputs of every quantized matrix
product to 8 bits. So the yardstick is their disagreement on the *unmasked* model. A mask that lands in a wrong row,
group or tensor would add a multiple of it; a right one adds only what the masked model is more sensitive by. That share
is measured without llama.cpp: PyTorch against PyTorch with its activations rounded to 8 bits, masked and unmasked. On a
copy of the model with 32-bit weights llama.cpp rounds nothing, and the engines agree to about 1e-6 nats, masked or not.

Each mask has one or two references in PyTorch:

    exact      the weights are multiplied by the gates (masked_model.py)
    rounded    the weights are what the runtime's edited memory holds, dequantized by the gguf package; measured where
               that is not the same: K-quants keep a group's scale in 6 or 8 bits, so a gate of 0.5 is rounded (a gate
               of 0 never is)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.parity_weights import activation_blocks, as_in_memory, largest_error, rounded_activations
from persona_edge.masked_model import masked
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import PersonaSet, Plane, Pole
from persona_edge.modeling import TorchModel
from persona_edge.persona_sets import neutral_texts
from persona_edge.runtime.layouts import type_name
from persona_edge.runtime.persona_session import PersonaSession
from persona_edge.runtime.session import PersonaRuntime
from persona_edge.runtime.switcher import WeightTensor

if TYPE_CHECKING:
    import torch

__all__ = [
    "Agreement",
    "Comparison",
    "MaskParity",
    "ModelParity",
    "compare",
    "measure_parity",
    "neutral_tokens",
    "random_personas",
]

MAX_KL_RATIO = 1.2
MAX_TOP1_LOSS = 0.01
NEGLIGIBLE_KL = 1e-5  # nats: what two orders of summation may differ by over thirty layers
RANDOM_DENSITY = 0.007

Reference = Literal["exact", "rounded"]
_POSITIONS_AT_ONCE = 64  # a position of a large vocabulary takes a megabyte


@dataclass(frozen=True)
class Agreement:
    """Two engines on the same tokens: KL(torch || other) in nats, mean with its standard error, and median; and the
    share of positions where both find the same token the likeliest.
    """

    n_positions: int
    kl_divergence: float
    kl_error: float
    kl_median: float
    top1: float


@dataclass(frozen=True)
class Comparison:
    """PyTorch against the runtime, and against itself with rounded activations (None where the runtime rounds none)."""

    runtime: Agreement
    rounding: Agreement | None


@dataclass(frozen=True)
class MaskParity:
    """One persona: what the mask adds to the disagreement of the engines.

    `weight_error` is the largest difference between a weight in the runtime's memory and in PyTorch, over its tensor's
    largest weight. Ratios are masked over unmasked; `top1_loss` is unmasked minus masked.
    """

    persona: str
    n_units: int
    reference: Reference
    weight_error: float
    found: Comparison
    base: Comparison

    @property
    def kl_ratio(self) -> float:
        """Mean KL between PyTorch and the runtime."""
        return self.found.runtime.kl_divergence / self.base.runtime.kl_divergence

    @property
    def median_ratio(self) -> float:
        """The same for the median: a mean may hang on one position where the masked model stands on a knife's edge."""
        return self.found.runtime.kl_median / self.base.runtime.kl_median

    @property
    def top1_loss(self) -> float:
        """Agreement on the likeliest token, lost by the mask."""
        return self.base.runtime.top1 - self.found.runtime.top1

    @property
    def sensitivity(self) -> float | None:
        """The KL ratio of PyTorch against itself with rounded activations: no fault of the runtime can enter it."""
        if self.found.rounding is None or self.base.rounding is None:
            return None
        return self.found.rounding.kl_divergence / self.base.rounding.kl_divergence

    @property
    def holds_as_it_stands(self) -> bool:
        """The plain criterion: KL and top-1 no worse than unmasked, within the limits."""
        return self.kl_ratio <= MAX_KL_RATIO and self.top1_loss <= MAX_TOP1_LOSS

    @property
    def holds(self) -> bool:
        """The criterion with the masked model's own sensitivity taken out."""
        loss = max(0.0, self._rounding_top1_loss) + MAX_TOP1_LOSS
        ratio = MAX_KL_RATIO * max(1.0, self.sensitivity or 1.0)
        is_close = self.kl_ratio <= ratio or self.found.runtime.kl_divergence <= NEGLIGIBLE_KL
        return is_close and self.top1_loss <= loss

    @property
    def _rounding_top1_loss(self) -> float:
        if self.found.rounding is None or self.base.rounding is None:
            return 0.0
        return self.base.rounding.top1 - self.found.rounding.top1


@dataclass(frozen=True)
class ModelParity:
    """One file: the quantizations of its maskable tensors, the engines' disagreement unmasked, and per mask."""

    file: str
    formats: tuple[str, ...]
    base: Comparison
    masks: tuple[MaskParity, ...]


def measure_parity(
    model: TorchModel,
    gguf: Path,
    *,
    n_positions: int,
    pack: MaskPack | None = None,
    personas: Sequence[str] | None = None,
    n_threads: int | None = None,
) -> ModelParity:
    """Compare `model` with the runtime on `gguf`, unmasked and under `personas` of `pack` (all; random without a pack).

    `model` must be loaded in float32 on the CPU, from `gguf` or from what `gguf` is a lossless copy of.
    """
    pack = MaskPack.from_bytes(encode_pack(random_personas(model))[0]) if pack is None else pack
    with PersonaRuntime.open(gguf, pack, n_threads=n_threads) as runtime:
        engines = _Engines(model, runtime, neutral_tokens(runtime, n_positions))
        base = engines.compare()
        chosen = pack.personas if personas is None else personas
        masks = tuple(row for name in chosen for row in _measure_persona(engines, pack, name, base))
        formats = sorted({type_name(engines.tensors[layer.name].ggml_type) for layer in model.layers})
    return ModelParity(gguf.stem, tuple(formats), base, masks)


def random_personas(model: TorchModel, *, density: float = RANDOM_DENSITY, seed: int = 0) -> PersonaSet:
    """Two personas of random groups in every maskable tensor: one suppresses, one has a plane at 0.5 and one at 1.5."""
    random = np.random.default_rng(seed)

    def plane(gate: float) -> Plane:
        positions = {}
        for layer in model.layers:
            n_units = layer.shape.n_units(32)
            units = random.choice(n_units, max(1, round(density * n_units)), replace=False)
            positions[layer.name] = np.sort(units).astype(np.uint32)
        return Plane(gate, positions)

    suppress, soften = Pole("suppress", "random", (plane(0.0),)), Pole("soften", "random", (plane(0.5), plane(1.5)))
    return PersonaSet(model.identity(), (suppress, soften), {"suppress": ("suppress",), "soften": ("soften",)})


def compare(
    model: TorchModel, runtime: PersonaSession, texts: Sequence[Sequence[int]], blocks: Mapping[str, int]
) -> Comparison:
    """The next-token distributions of both engines as they stand, at every position of `texts`.

    `blocks` says how many activations of each layer share a scale when llama.cpp rounds them; empty for not at all.
    """
    with_runtime, with_rounding = _Tally(), _Tally()
    for tokens in texts:
        reference = _torch_logits(model, tokens)
        with_runtime.add(reference, _from_numpy(runtime.logits(tokens)))
        if blocks:
            with rounded_activations(model, blocks):
                with_rounding.add(reference, _torch_logits(model, tokens))
    return Comparison(with_runtime.agreement(), with_rounding.agreement() if blocks else None)


def neutral_tokens(runtime: PersonaSession, n_positions: int) -> list[list[int]]:
    """Neutral passages, tokenized, `n_positions` tokens in all."""
    texts: list[list[int]] = []
    missing = n_positions
    for text in neutral_texts():
        if missing < 2:
            break
        texts.append(runtime.tokenize(text)[:missing])
        missing -= len(texts[-1])
    return texts


@dataclass(frozen=True)
class _Engines:
    """The two engines and the tokens they are compared on."""

    model: TorchModel
    runtime: PersonaRuntime
    texts: Sequence[Sequence[int]]

    @property
    def tensors(self) -> Mapping[str, WeightTensor]:
        """The runtime's weights in memory: what a user never needs to see, and a proof does."""
        return self.runtime._tensors

    def compare(self) -> Comparison:
        blocks = activation_blocks(self.model, self.tensors)
        return compare(self.model, self.runtime, self.texts, blocks)


class _Tally:
    """Per-position KL and agreement of two engines, as they come."""

    def __init__(self) -> None:
        self._divergences: list[float] = []
        self._n_equal = 0

    def add(self, reference: torch.Tensor, other: torch.Tensor) -> None:
        """Logits (n_positions, n_vocab) of the same positions."""
        for p, q in zip(reference.split(_POSITIONS_AT_ONCE), other.split(_POSITIONS_AT_ONCE), strict=True):
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            self._divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
            self._n_equal += int((p.argmax(-1) == q.argmax(-1)).sum())

    def agreement(self) -> Agreement:
        found = np.array(self._divergences)
        error = float(found.std() / np.sqrt(len(found)))
        return Agreement(len(found), float(found.mean()), error, float(np.median(found)), self._n_equal / len(found))


def _measure_persona(engines: _Engines, pack: MaskPack, name: str, base: Comparison) -> Iterator[MaskParity]:
    """The persona against the exact reference, and against the rounded one where that is another."""
    planes = [plane for pole in pack.load().resolve(name) for plane in pole.planes]
    n_units = engines.runtime.switch(name).n_units_written
    with masked(engines.model, planes):
        error = largest_error(engines.model, engines.tensors, planes)
        yield MaskParity(name, n_units, "exact", error, engines.compare(), base)
    if error:
        with as_in_memory(engines.model, engines.tensors, planes):
            error = largest_error(engines.model, engines.tensors, planes)
            yield MaskParity(name, n_units, "rounded", error, engines.compare(), base)
    engines.runtime.base()


def _torch_logits(model: TorchModel, tokens: Sequence[int]) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model.model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()
    return logits


def _from_numpy(logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> torch.Tensor:
    import torch

    return torch.from_numpy(logits)
