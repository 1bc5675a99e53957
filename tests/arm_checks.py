"""What a persona did to a tiny model: the scores of two answers, and every bit of its weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.interfaces import user_message
from persona_edge.effect.runtime_engine import RuntimeEngine
from persona_edge.effect.torch_engine import TorchEngine
from persona_edge.encoding import EncodedText
from persona_edge.modeling import TorchModel


def _texts(engine: TorchEngine | RuntimeEngine) -> list[EncodedText]:
    answers = [engine.text_tokens(" I would rather wait"), engine.text_tokens(" Let us dance until the morning")]
    asked = engine.chat_tokens(user_message("What do you do?"))
    return [EncodedText((*asked, *answer), len(answer)) for answer in answers]


def scores(engine: TorchEngine | RuntimeEngine) -> NDArray[np.float64]:
    """Log-probabilities of every token of two answers, in nats."""
    return np.concatenate(engine.log_probabilities(_texts(engine)))


def snapshot(model: TorchModel) -> tuple[dict[str, bytes], list[tuple[str, type]], int]:
    """Every bit of the weights, the modules that there are, and how many hooks they have."""
    weights = {name: value.numpy().tobytes() for name, value in model.model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.model.named_modules()]
    return weights, modules, sum(len(module._forward_hooks) for module in model.model.modules())
