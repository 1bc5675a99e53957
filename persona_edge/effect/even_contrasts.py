"""Whether a pack's masks come from the same contrasts as the arms that they are compared with: its report knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from persona_edge.effect.arm_registry import ARM_NAMES
from persona_edge.effect.eval_plan import Section
from persona_edge.effect.tables import BASE, REFERENCE
from persona_edge.maskpack import MaskPack
from persona_edge.pack_description import value_at

__all__ = ["uneven_contrasts"]

# A system prompt is made from a pole's description.
MADE_FROM_CONTRASTS: Final = frozenset(ARM_NAMES) - {BASE, REFERENCE, "system-prompt"}


def uneven_contrasts(sections: Sequence[Section], arms: Sequence[str], pack: MaskPack | None) -> Iterator[str]:
    """A note for each axis on which the pack's masks and the arms `arms` were made from different contrasts.

    A pack may come from any tool: where its report does not say from what, there is no note.
    """
    if pack is None or REFERENCE not in arms or not MADE_FROM_CONTRASTS.intersection(arms):
        return
    for section in sections:
        axis_set, made_from = section.axis_set, section.made_from
        for n_contrasts, sha256 in _calibrated_on(pack, (axis_set.positive_pole, axis_set.negative_pole)):
            if sha256 == made_from.content_hash():
                continue
            if 2 <= n_contrasts <= len(axis_set) and axis_set.limit(n_contrasts).content_hash() == sha256:
                yield (
                    f"axis {axis_set.axis}: the pack's masks were found in {n_contrasts} of the set's contrasts, other "
                    f"arms are made from {len(made_from)}; --contrasts {n_contrasts} makes them even"
                )
            else:
                yield f"axis {axis_set.axis}: the pack's masks were found in other contrasts than the other arms"


def _calibrated_on(pack: MaskPack, poles: Sequence[str]) -> list[tuple[int, str]]:
    """The number of contrasts and their hash, as the report of the pack has them for these poles, each once."""
    found: dict[tuple[int, str], None] = {}
    for pole in poles:
        n_contrasts, sha256 = (
            value_at(pack.report, "poles", pole, "calibration_set", key) for key in ("n_contrasts", "sha256")
        )
        if isinstance(n_contrasts, int) and not isinstance(n_contrasts, bool) and isinstance(sha256, str):
            found[n_contrasts, sha256] = None
    return list(found)
