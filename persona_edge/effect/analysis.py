"""What masks look like, as the paper looks at them: where poles differ, what personas share, where the budget went.

    difference rate   share of a model's weights on which the masks of an axis's two poles differ, by part and by block
    overlap           Jaccard index of two personas' gated units; a unit that one suppresses and the other amplifies is
                      not shared. Beside it what two random masks of the same sizes would have
    budget            by kind of tensor and by block: the share of gated units and, where damage is known, of damage
    similarity        cosine of the hidden states of two personas after each block, on the same prompts

All but the last need no model. Numbers are shares between 0 and 1 unless a name says otherwise.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.reply_tasks import REPLY_PROMPTS
from persona_edge.maskpack import MaskPack
from persona_edge.masks import Granularity, PersonaSet, Plane, Pole, TensorShape

if TYPE_CHECKING:
    from persona_edge.modeling import TorchModel

__all__ = [
    "AxisDifference",
    "BudgetShare",
    "LayerSimilarity",
    "Overlap",
    "PackAnalysis",
    "analyse_pack",
    "budget_shares",
    "difference_rates",
    "layer_similarities",
    "overlaps",
]

N_PROMPTS: Final = 12
_BLOCK = re.compile(r"blk\.(\d+)\.(.+?)(?:\.weight)?$")
Damage = Mapping[str, NDArray[np.float32]]
Units = NDArray[np.int64]


@dataclass(frozen=True)
class AxisDifference:
    """Shares of weights whose gate differs between the poles of an axis; `by_block` is (n_blocks,) over all tensors."""

    axis: str
    poles: tuple[str, str]
    average: float
    attention: float
    feed_forward: float
    by_block: tuple[float, ...]


@dataclass(frozen=True)
class Overlap:
    """Two personas' shared part of what either gates, and what chance alone would give."""

    personas: tuple[str, str]
    jaccard: float
    by_chance: float


@dataclass(frozen=True)
class BudgetShare:
    """What one pole spends on one part of the model (`ffn_down`, or `block 3`).

    `density` is the gated share of the part's units, `of_units` the part's share of all gated units, `of_damage` its
    share of their damage, None where damage is not known.
    """

    pole: str
    part: str
    density: float
    of_units: float
    of_damage: float | None


@dataclass(frozen=True)
class LayerSimilarity:
    """Mean cosine of the hidden states of two personas at the last token of each prompt, after each block.

    `cosines` (n_blocks,): no entry for the embedding, which no mask touches. Persona `base` is the unmodified model.
    """

    personas: tuple[str, str]
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class PackAnalysis:
    """Everything; `similarities` is empty without a model."""

    differences: tuple[AxisDifference, ...]
    overlaps: tuple[Overlap, ...]
    budgets: tuple[BudgetShare, ...]
    similarities: tuple[LayerSimilarity, ...]


def analyse_pack(
    pack: MaskPack | PersonaSet,
    model: TorchModel | None = None,
    *,
    damage: Damage | None = None,
    prompts: Sequence[str] = REPLY_PROMPTS[:N_PROMPTS],
) -> PackAnalysis:
    """Analyse all personas of `pack`; with `model`, which the pack must belong to, hidden states as well.

    `damage` is what pole_masks.tensor_damage returns, (n_rows, n_units) nats per token by tensor. Raises PackPlaneError
    for a damaged pack.
    """
    personas = pack.load() if isinstance(pack, MaskPack) else pack
    return PackAnalysis(
        difference_rates(personas),
        overlaps(personas),
        budget_shares(personas, damage),
        () if model is None else layer_similarities(personas, model, prompts),
    )


def difference_rates(personas: PersonaSet) -> tuple[AxisDifference, ...]:
    """One entry per axis of which the pack has two poles, in the pack's order."""
    by_axis: dict[str, list[Pole]] = {}
    for pole in personas.poles:
        by_axis.setdefault(pole.axis, []).append(pole)
    pairs = [(axis, poles[0], poles[1]) for axis, poles in by_axis.items() if len(poles) == 2]
    return tuple(_axis_difference(personas, axis, first, second) for axis, first, second in pairs)


def _axis_difference(personas: PersonaSet, axis: str, first: Pole, second: Pole) -> AxisDifference:
    tensors = personas.identity.tensors
    granularity = _granularity((first, second))
    differing = {t.name: _n_differing(t.name, first, second, granularity) for t in tensors}
    sizes = {t.name: t.n_rows * t.n_columns for t in tensors}

    def rate(names: Iterable[str]) -> float:
        chosen = list(names)
        return sum(differing[n] for n in chosen) / max(sum(sizes[n] for n in chosen), 1)

    blocks = sorted({b for t in tensors if (b := _block(t.name)) is not None})
    return AxisDifference(
        axis,
        (first.name, second.name),
        rate(sizes),
        rate(n for n in sizes if "attn" in n),
        rate(n for n in sizes if "ffn" in n),
        tuple(rate(n for n in sizes if _block(n) == block) for block in blocks),
    )


def _n_differing(tensor: str, first: Pole, second: Pole, granularity: Granularity) -> int:
    """How many weights of `tensor` the two poles multiply by different gates."""
    sides = [_gated(tensor, pole, granularity) for pole in (first, second)]
    units = np.union1d(sides[0][0], sides[1][0])
    gates = np.ones((2, len(units)))
    for row, (own, values) in zip(gates, sides, strict=True):
        row[np.searchsorted(units, own)] = values
    return int((gates[0] != gates[1]).sum()) * granularity


def _gated(tensor: str, pole: Pole, granularity: Granularity) -> tuple[Units, NDArray[np.float64]]:
    """The pole's units of `tensor`, ascending, and what each is multiplied by; planes that overlap multiply."""
    planes = [plane for plane in pole.planes if tensor in plane.positions]
    parts = [_at(plane.positions[tensor], plane, granularity) for plane in planes]
    units, index = np.unique(np.concatenate([np.empty(0, np.int64), *parts]), return_inverse=True)
    gates = np.ones(len(units))
    each = np.repeat([plane.gate for plane in planes], [len(part) for part in parts])
    np.multiply.at(gates, index, each)
    return units, gates


def _granularity(poles: Iterable[Pole]) -> Granularity:
    """The units in which all planes can be counted."""
    return 1 if any(plane.granularity == 1 for pole in poles for plane in pole.planes) else 32


def overlaps(personas: PersonaSet) -> tuple[Overlap, ...]:
    """One entry per pair of personas, in the pack's order; poles that differ in nothing but name overlap fully."""
    granularity = _granularity(personas.poles)
    tensors = personas.identity.tensors
    starts = np.concatenate([[0], np.cumsum([t.n_units(granularity) for t in tensors])])
    offsets = {t.name: int(start) for t, start in zip(tensors, starts, strict=False)}
    poles = {pole.name: _pole_units(pole, offsets, granularity) for pole in personas.poles}
    found = {
        name: np.unique(np.concatenate([np.empty(0, np.int64), *(poles[pole] for pole in parts)]))
        for name, parts in personas.personas.items()
    }
    n_units = int(starts[-1])
    return tuple(_overlap(a, b, found[a], found[b], n_units) for a, b in itertools.combinations(found, 2))


def _overlap(first: str, second: str, a: Units, b: Units, n_units: int) -> Overlap:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    by_chance = len(a) * len(b) / max(n_units, 1)
    return Overlap(
        (first, second),
        shared / max(len(a) + len(b) - shared, 1),
        by_chance / max(len(a) + len(b) - by_chance, 1),
    )


def _pole_units(pole: Pole, offsets: Mapping[str, int], granularity: int) -> Units:
    """The pole's units, numbered over the whole model; twice the number, and one more where the gate amplifies."""
    parts = [np.empty(0, np.int64)]
    for plane in pole.planes:
        for name, positions in plane.positions.items():
            parts.append(2 * (offsets[name] + _at(positions, plane, granularity)) + int(plane.gate > 1))
    return np.unique(np.concatenate(parts))


def _at(positions: NDArray[np.uint32], plane: Plane, granularity: int) -> Units:
    """`positions` in units of `granularity` weights, which divides the plane's own."""
    n = plane.granularity // granularity
    return (positions.astype(np.int64)[:, None] * n + np.arange(n)).reshape(-1)


def budget_shares(personas: PersonaSet, damage: Damage | None = None) -> tuple[BudgetShare, ...]:
    """For each pole first the kinds of tensor, then the blocks; tensors outside blocks count under their names."""
    return tuple(share for pole in personas.poles for share in _pole_budget(personas, pole, damage))


def _pole_budget(personas: PersonaSet, pole: Pole, damage: Damage | None) -> list[BudgetShare]:
    tensors = personas.identity.tensors
    gated, costs = _per_tensor(tensors, pole, damage)
    total, total_cost = sum(gated.values()), sum(costs.values())
    kinds: dict[str, list[TensorShape]] = {}
    blocks: dict[int, list[TensorShape]] = {}
    for tensor in tensors:
        match = _BLOCK.match(tensor.name)
        kinds.setdefault(match[2] if match else tensor.name, []).append(tensor)
        if match:
            blocks.setdefault(int(match[1]), []).append(tensor)

    def share(part: str, of: Sequence[TensorShape]) -> BudgetShare:
        n = sum(gated[t.name] for t in of)
        cost = None if damage is None else sum(costs[t.name] for t in of) / (total_cost or 1)
        n_weights = sum(t.n_rows * t.n_columns for t in of)
        return BudgetShare(pole.name, part, n / n_weights, n / (total or 1), cost)

    in_order = ((f"block {block}", blocks[block]) for block in sorted(blocks))  # a pack's tensors come by name
    return [share(part, of) for part, of in [*kinds.items(), *in_order]]


def _per_tensor(
    tensors: Sequence[TensorShape], pole: Pole, damage: Damage | None
) -> tuple[dict[str, int], dict[str, float]]:
    """Gated weights, and the damage (nats per token) of gating them: (1 - gate)^2 times that of closing."""
    gated = {t.name: 0 for t in tensors}
    costs = {t.name: 0.0 for t in tensors}
    for plane in pole.planes:
        for name, positions in plane.positions.items():
            gated[name] += len(positions) * plane.granularity
            if damage is not None and name in damage:
                costs[name] += float(damage[name].reshape(-1)[positions].sum()) * (1 - plane.gate) ** 2
    return gated, costs


def layer_similarities(personas: PersonaSet, model: TorchModel, prompts: Sequence[str]) -> tuple[LayerSimilarity, ...]:
    """Every persona against the unmodified model, and personas that differ in one pole against each other.

    Memory: (personas + 1) x blocks x prompts x hidden size floats.
    """
    from persona_edge.masked_model import masked

    states = {"base": _last_states(model, prompts)}
    for name in personas.personas:
        with masked(model, [plane for pole in personas.resolve(name) for plane in pole.planes]):
            states[name] = _last_states(model, prompts)
    pairs = [("base", name) for name in personas.personas] + _related(personas)
    return tuple(LayerSimilarity(pair, _cosines(states[pair[0]], states[pair[1]])) for pair in pairs)


def _related(personas: PersonaSet) -> list[tuple[str, str]]:
    """Pairs of personas that differ in exactly one pole of their axes (E and I; INFJ and INFP)."""
    axis_of = {pole.name: pole.axis for pole in personas.poles}
    return [
        (a, b)
        for a, b in itertools.combinations(personas.personas, 2)
        if [axis_of[p] for p in personas.personas[a]] == [axis_of[p] for p in personas.personas[b]]
        and len(set(personas.personas[a]) - set(personas.personas[b])) == 1
    ]


def _last_states(model: TorchModel, prompts: Sequence[str]) -> NDArray[np.float32]:
    """Hidden states after each block at the last token of each prompt, (n_prompts, n_blocks, n_hidden)."""
    import torch

    from persona_edge.encoding import prompt_tokens

    found = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = torch.tensor([prompt_tokens(model.tokenizer, prompt, None)], device=model.device)
            states = model.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
            found.append(torch.stack([state[0, -1] for state in states[1:]]).float().cpu().numpy())
    return np.stack(found)


def _cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> tuple[float, ...]:
    dot = (first * second).sum(axis=2, dtype=np.float64)
    norms = np.linalg.norm(first, axis=2).astype(np.float64) * np.linalg.norm(second, axis=2)
    return tuple(float(value) for value in (dot / norms).mean(axis=0))


def _block(name: str) -> int | None:
    match = _BLOCK.match(name)
    return int(match[1]) if match else None
