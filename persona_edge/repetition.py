"""Where a masked model's replies begin to repeat themselves: contrasts of going on and of going round.

Drift on given text does not show whether a mask makes a model repeat itself, since there the model never reads its own
words. So the masked model is asked ordinary things, greedily. Where a reply comes to RECURRING tokens that it has said
before, it is cut, and there are two ways on from the same words: what the masked model says there (the loop), and what
the unmasked model says, sampled. Of these pairs a mask is to move none toward the loop (separation.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from persona_edge.calibration import Calibrator
from persona_edge.encoding import EncodedText, prompt_tokens
from persona_edge.evaluation import margins
from persona_edge.generate import continue_together
from persona_edge.masked_model import masked
from persona_edge.masks import Plane, planes_digest
from persona_edge.packed_pairs import ContrastPair
from persona_edge.separation import NO_OTHERS, Other, Others

__all__ = ["RepetitionProbe", "repeats_at"]

RECURRING = 6
"""As many tokens in a row, said before, are a repetition."""
LOOP_TOKENS = 16
REPLY_TOKENS = 80
PROMPTS_AT_ONCE = 32
MIN_CONTEXT, MIN_ANSWER = 8, 8
FEWEST = 8
"""Of fewer loops nothing is learned."""
ON_TEMPERATURE, ON_PENALTY = 0.8, 1.15


def repeats_at(tokens: Sequence[int], length: int = RECURRING) -> int | None:
    """Where the first run of `length` tokens begins that has begun earlier; None where there is none."""
    seen: set[tuple[int, ...]] = set()
    for i in range(len(tokens) - length + 1):
        run = tuple(tokens[i : i + length])
        if run in seen:
            return i
        seen.add(run)
    return None


class RepetitionProbe:
    """Asks one model `prompts` with masks on, and keeps what came of it in the calibrator's cache."""

    def __init__(self, calibrator: Calibrator, prompts: Sequence[str]) -> None:
        self.calibrator, self.model = calibrator, calibrator.model
        encoded = {tuple(prompt_tokens(self.model.tokenizer, prompt, None)) for prompt in prompts}
        self.prompts = sorted(encoded, key=lambda tokens: (len(tokens), tokens))

    def others(
        self, pairs: Sequence[ContrastPair], planes: Sequence[Plane], *, away: float = 0.0, label: str = ""
    ) -> Others:
        """What closing each further gate does toward going on in `pairs`, on the model with `planes` on.

        They are to be moved `away` from the loops, nats per token. Nothing when there are fewer than FEWEST. The model
        comes unmasked. `label` is what progress is told.
        """
        if len(pairs) < FEWEST:
            return NO_OTHERS
        mask = planes_digest(planes)
        with masked(self.model, planes):
            first, second = (
                self.calibrator.gate_benefits(pairs[i::2], mask=mask, label=f"repetition {label}") for i in range(2)
            )
        moved = min(self._moved(pairs, planes), 0.0)  # what earlier steps won is no room for this one
        return (Other(first, second, moved - away, one_way=True),)

    def _moved(self, pairs: Sequence[ContrastPair], planes: Sequence[Plane]) -> float:
        """How far `planes` move the margins of `pairs`, nats per token on average."""

        def compute() -> object:
            with masked(self.model, planes):
                now = margins(self.model, pairs).mean_margin
            return now - margins(self.model, pairs).mean_margin

        what = {"mask": planes_digest(planes), "pairs": _digest([[one.tokens for one in pair] for pair in pairs])}
        return float(self.calibrator.cached_json("loops-moved", what, compute))  # type: ignore[arg-type]

    def pairs(self, planes: Sequence[Plane], label: str = "") -> list[ContrastPair]:
        """(going on, going round) from where each reply of the model with `planes` on repeats itself."""

        def compute() -> object:
            with masked(self.model, planes):
                replies = self._continued(self.prompts, REPLY_TOKENS, f"replies {label}")
            loops = []
            for prompt, reply in zip(self.prompts, replies, strict=True):
                at = repeats_at(reply)
                if at is not None and at >= MIN_CONTEXT and len(reply) - at >= MIN_ANSWER:
                    loops.append(((*prompt, *reply[:at]), reply[at : at + LOOP_TOKENS]))
            going_on = self._continued(
                [context for context, _ in loops],
                LOOP_TOKENS,
                f"other ways on {label}",
                temperature=ON_TEMPERATURE,
                repetition_penalty=ON_PENALTY,
            )
            return [[context, on, loop] for (context, loop), on in zip(loops, going_on, strict=True)]

        what = {"mask": planes_digest(planes), "prompts": _digest(self.prompts)}
        found: Any = self.calibrator.cached_json("loops", what, compute)
        usable = [(context, on, loop) for context, on, loop in found if len(on) >= MIN_ANSWER]
        return [
            (EncodedText((*context, *on), len(on), i), EncodedText((*context, *loop), len(loop), i))
            for i, (context, on, loop) in enumerate(usable)
        ]

    def _continued(
        self, encoded: Sequence[Sequence[int]], n_tokens: int, label: str, **options: float
    ) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(encoded), PROMPTS_AT_ONCE):
            self.calibrator.progress(label, start, len(encoded))
            some = encoded[start : start + PROMPTS_AT_ONCE]
            found += continue_together(self.model, some, max_tokens=n_tokens, seed=start, **options)
        if encoded:
            self.calibrator.progress(label, len(encoded), len(encoded))
        return found


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
