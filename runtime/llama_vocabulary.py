"""Text to tokens and back, by the tokenizer that the GGUF carries."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from persona_edge.errors import InputError
from persona_edge.runtime.llama_weights import LlamaModel

__all__ = ["LlamaVocabulary"]


class LlamaVocabulary:
    """The tokenizer of a loaded model. Usable from several threads at once; not after the model is closed."""

    def __init__(self, model: LlamaModel) -> None:
        self._api = model.library.api
        self._handle = self._api.llama_model_get_vocab(model.handle)
        self.n_tokens = int(self._api.llama_vocab_n_tokens(self._handle))
        self.bos_text = self._special_text(self._api.llama_vocab_bos(self._handle))
        self.eos_text = self._special_text(self._api.llama_vocab_eos(self._handle))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`. `add_special` adds what the model wants at the start or end (BOS); `parse_special` reads
        names of control tokens in the text as those tokens."""
        data = text.encode("utf-8", "replace")
        capacity = len(data) + 8
        while True:
            tokens = (self._api.llama_token * capacity)()
            n = self._api.llama_tokenize(self._handle, data, len(data), tokens, capacity, add_special, parse_special)
            if n >= 0:
                return list(tokens[:n])
            if -n <= capacity:  # INT32_MIN, or a number that would not help
                raise InputError(f"a text of {len(data)} bytes is too long to tokenize; shorten it")
            capacity = -n

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens by their names. Raises InputError for ids that are no tokens."""
        self.check(tokens)
        ids = (self._api.llama_token * len(tokens))(*tokens)
        capacity = 16 * len(tokens) + 16
        while True:
            text = ctypes.create_string_buffer(capacity)
            n = self._api.llama_detokenize(self._handle, ids, len(tokens), text, capacity, False, True)
            if n >= 0:
                return text.raw[:n].decode("utf-8", "replace")
            capacity = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes `token` adds to a text, maybe part of a character; none for a control token unless `special`."""
        text = ctypes.create_string_buffer(64)
        n = self._api.llama_token_to_piece(self._handle, token, text, len(text), 0, special)
        if n < 0:
            text = ctypes.create_string_buffer(-n)
            n = self._api.llama_token_to_piece(self._handle, token, text, len(text), 0, special)
        return text.raw[:n]

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation (end of turn, end of text)."""
        return bool(self._api.llama_vocab_is_eog(self._handle, token))

    def check(self, tokens: Sequence[int]) -> None:
        """InputError when one of `tokens` is not in the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.n_tokens:
                raise InputError(f"token {token} does not exist; the model's tokens are 0 to {self.n_tokens - 1}")

    def _special_text(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
