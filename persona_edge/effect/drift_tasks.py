"""What an arm costs on text that has nothing to do with personas: perplexity, and how far predictions move.

`PerplexityTask`: mean negative log-probability per window of WikiText-2, evenly spaced (exp of the mean is perplexity);
the ratio to the unmodified model is paired per window. `KlTask`: KL(base || arm) in nats per predicted token, averaged
within a text, over the web texts' last tokens or over the unmodified model's own greedy answers to neutral questions.
A question reaches the model through the arm's conversation, and the answer's tokens stay the same.

The unmodified model's distributions are kept as float16 in a temporary file, so memory holds those of one text at a
time; rounding adds about 1e-6 nats.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from persona_edge.effect.answer_levels import conversation, encode_answer
from persona_edge.effect.eval_data import digest, draw, read_rows
from persona_edge.effect.interfaces import CHAT_KL, SHARE, WEB_KL, Arm, Engine, Items, TaskResult
from persona_edge.encoding import EncodedText
from persona_edge.errors import CalibrationError

__all__ = [
    "ChatKlTask",
    "PerplexityTask",
    "WebKlTask",
    "chat_kl_task",
    "kl_divergence",
    "spaced_windows",
    "web_kl_task",
    "wikitext_task",
]

WINDOW_TOKENS: Final = 512
WEB_TOKENS: Final = 128  # of each web text, of which the last half is scored
WEB_SCORED: Final = 64
ANSWER_TOKENS: Final = 64
MOST_TEXTS: Final = 48  # bounds the temporary file: 48 x 64 x vocabulary x 2 bytes, 0.3 GB for 49,152 tokens
MAX_WEB_CHARACTERS: Final = 2000
PER_TOKEN: Final = "nats per token"
Settings = Mapping[str, str | int | float]
Floats = NDArray[np.float64]


@dataclass
class PerplexityTask:
    """Windows of `window_tokens` of `text`, at most `n_windows`, evenly spaced."""

    name: str
    text: str = field(repr=False)
    n_windows: int
    window_tokens: int = WINDOW_TOKENS
    kind: Literal["side effect"] = "side effect"
    _windows: list[EncodedText] = field(default_factory=list, init=False, repr=False)
    _base: Floats | None = field(default=None, init=False, repr=False)

    @property
    def settings(self) -> Settings:
        """Number and size of windows, and a digest of the text."""
        return {"n_items": self.n_windows, "window_tokens": self.window_tokens, "data": digest(self.text)}

    def prepare(self, engine: Engine) -> None:
        """Tokenize the text and record the unmodified model's levels."""
        self._windows = spaced_windows(engine, self.text, self.n_windows, self.window_tokens)
        self._base = self._levels(engine)

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """Negative log-probability per token and window, and its difference from the unmodified model's."""
        assert self._base is not None, "prepare comes first"
        levels = self._levels(engine)
        return TaskResult(
            self.name,
            (
                Items("log perplexity", levels, PER_TOKEN, "worse"),
                Items("log perplexity ratio to base", levels - self._base, PER_TOKEN, "worse"),
            ),
        )

    def _levels(self, engine: Engine) -> Floats:
        return np.array([-scores.mean() for scores in engine.log_probabilities(self._windows)])


def spaced_windows(engine: Engine, text: str, n_windows: int, window_tokens: int) -> list[EncodedText]:
    """At most `n_windows` windows that do not overlap, from the first to the last token of `text`, each after BOS where
    the model wants one. Raises CalibrationError when the text is shorter than one window.
    """
    tokens, start = engine.text_tokens(text), engine.start_tokens()
    n_windows = min(n_windows, len(tokens) // window_tokens)
    if not n_windows:
        raise CalibrationError(f"a text of {len(tokens)} tokens has no window of {window_tokens}; give a longer text")
    first_tokens = np.linspace(0, len(tokens) - window_tokens, n_windows).astype(int)
    windows = [(*start, *tokens[first : first + window_tokens]) for first in first_tokens]
    return [EncodedText(window, len(window) - 1) for window in windows]


class _RecordedBase:
    """Distributions of the unmodified model, (n_scored, n_vocab) per text, float16 in a temporary file."""

    def __init__(self, engine: Engine, texts: Sequence[EncodedText]) -> None:
        self._file = tempfile.TemporaryFile(prefix="persona-edge-")  # noqa: SIM115 - open as long as self is
        self._close = weakref.finalize(self, self._file.close)
        self._shapes: list[tuple[int, int]] = []
        self._offsets: list[int] = []
        for log_p in engine.distributions(texts):
            self._offsets.append(self._file.tell())
            self._shapes.append((log_p.shape[0], log_p.shape[1]))
            self._file.write(log_p.astype(np.float16).tobytes())

    def __getitem__(self, i: int) -> NDArray[np.float32]:
        """Text `i`'s distributions, float32."""
        n, n_vocab = self._shapes[i]
        self._file.seek(self._offsets[i])
        data = np.frombuffer(self._file.read(2 * n * n_vocab), dtype=np.float16)
        return data.reshape(n, n_vocab).astype(np.float32)

    def close(self) -> None:
        """Delete the file, as the end of this object does."""
        self._close()


def kl_divergence(before: NDArray[np.float32], after: NDArray[np.float32]) -> Floats:
    """KL(before || after) per row in nats, from log-probabilities (n, n_vocab); `before` is normalised first."""
    shift = before.max(axis=1, keepdims=True)
    before = before - shift - np.log(np.exp(before - shift).sum(axis=1, keepdims=True))
    terms = np.exp(before) * (before - after)
    return np.asarray(terms.sum(axis=1, dtype=np.float64))


@dataclass
class WebKlTask:
    """KL on the last tokens of plain texts. An arm that acts through its conversation has none."""

    texts: tuple[str, ...]
    name: str = "web KL"
    kind: Literal["side effect"] = "side effect"
    _encoded: list[EncodedText] = field(default_factory=list, init=False, repr=False)
    _base: _RecordedBase | None = field(default=None, init=False, repr=False)

    @property
    def settings(self) -> Settings:
        """Number of texts and of scored tokens, and a digest of the texts."""
        return {"n_items": len(self.texts), "scored": WEB_SCORED, "data": digest(self.texts)}

    def prepare(self, engine: Engine) -> None:
        """Record the unmodified model's distributions, in place of earlier ones."""
        self._encoded = [_last_tokens(engine, text) for text in self.texts]
        self._base = _recorded(self._base, engine, self._encoded)

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """KL per text, and how often the likeliest token is another one."""
        assert self._base is not None, "prepare comes first"
        return TaskResult(self.name, _kl_measures(engine, self._encoded, self._base, WEB_KL))


@dataclass
class ChatKlTask:
    """KL on the unmodified model's own greedy answers to `prompts`."""

    prompts: tuple[str, ...]
    name: str = "chat KL"
    kind: Literal["side effect"] = "side effect"
    _turns: list[tuple[str, str]] = field(default_factory=list, init=False, repr=False)
    _base: _RecordedBase | None = field(default=None, init=False, repr=False)

    @property
    def settings(self) -> Settings:
        """Number of prompts, tokens of an answer, and a digest of the prompts."""
        return {"n_items": len(self.prompts), "answer_tokens": ANSWER_TOKENS, "data": digest(self.prompts)}

    def prepare(self, engine: Engine) -> None:
        """Ask the unmodified model and record its distributions over its answers; empty answers are left out."""
        answers = engine.generate([conversation(None, prompt) for prompt in self.prompts], max_tokens=ANSWER_TOKENS)
        self._turns = [(p, a) for p, a in zip(self.prompts, answers, strict=True) if engine.text_tokens(a)]
        if not self._turns:
            raise CalibrationError("the model answers none of the neutral questions, so chat drift cannot be measured")
        self._base = _recorded(self._base, engine, self._encoded(engine, None))

    def measure(self, engine: Engine, arm: Arm) -> TaskResult:
        """KL per answer, and how often the likeliest token is another one."""
        assert self._base is not None, "prepare comes first"
        return TaskResult(self.name, _kl_measures(engine, self._encoded(engine, arm), self._base, CHAT_KL))

    def _encoded(self, engine: Engine, arm: Arm | None) -> list[EncodedText]:
        return [
            encode_answer(engine, engine.chat_tokens(conversation(arm, prompt)), answer, max_tokens=ANSWER_TOKENS)
            for prompt, answer in self._turns
        ]


def _recorded(earlier: _RecordedBase | None, engine: Engine, texts: Sequence[EncodedText]) -> _RecordedBase:
    if earlier is not None:
        earlier.close()
    return _RecordedBase(engine, texts)


def _kl_measures(engine: Engine, texts: Sequence[EncodedText], base: _RecordedBase, name: str) -> tuple[Items, ...]:
    divergence, changed = np.zeros(len(texts)), np.zeros(len(texts))
    for i, after in enumerate(engine.distributions(texts)):
        before = base[i]
        divergence[i] = kl_divergence(before, after).mean()
        changed[i] = (before.argmax(axis=1) != after.argmax(axis=1)).mean()
    return Items(name, divergence, PER_TOKEN, "worse"), Items("likeliest token changed", changed, SHARE, "worse")


def _last_tokens(engine: Engine, text: str) -> EncodedText:
    tokens = (*engine.start_tokens(), *engine.text_tokens(text[:MAX_WEB_CHARACTERS]))[:WEB_TOKENS]
    return EncodedText(tokens, min(WEB_SCORED, len(tokens) - 1))


def wikitext_task(folder: Path, n: int) -> PerplexityTask:
    """WikiText-2 raw, test part, of `folder`/capability."""
    path = folder / "capability/wikitext2_raw_test.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read ({error})") from error
    return PerplexityTask("wikitext-2", text, n)


def web_kl_task(folder: Path, n: int, seed: int) -> WebKlTask:
    """Web texts of `folder`/capability long enough to be scored at full length."""
    rows = read_rows(folder / "capability/c4_demo_300.jsonl", ("text",))
    texts = [row["text"][:MAX_WEB_CHARACTERS] for row in rows if len(row["text"]) >= 6 * WEB_TOKENS]
    return WebKlTask(draw(texts, min(n, MOST_TEXTS), seed))


def chat_kl_task(folder: Path, n: int, seed: int) -> ChatKlTask:
    """The first turns of `folder`/prompts/mt_bench_questions.jsonl."""
    rows = read_rows(folder / "prompts/mt_bench_questions.jsonl", ("turns",))
    return ChatKlTask(draw([row["turns"][0] for row in rows], min(n, MOST_TEXTS), seed))
