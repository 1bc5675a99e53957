"""Text to tokens and back, by the tokenizer.json beside an ONNX model, with the face of the GGUF's vocabulary."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_edge.errors import InputError, MissingDependencyError, ModelFileError

__all__ = ["OnnxVocabulary", "chat_template_of"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class OnnxVocabulary:
    """The tokenizer in `folder`; `n_tokens` is how many logits the model gives. Not thread-safe while it tokenizes."""

    def __init__(self, folder: Path, *, n_tokens: int, end_tokens: frozenset[int]) -> None:
        """MissingDependencyError without the tokenizers package, ModelFileError when the files cannot be read."""
        self._tokenizer = _load(folder / "tokenizer.json")
        settings = _settings(folder)
        self.n_tokens = n_tokens
        self.bos_text, self.eos_text = _special(settings, "bos_token"), _special(settings, "eos_token")
        self._end_tokens = end_tokens
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {int(token): entry.content for token, entry in added.items() if entry.special}
        self._added = {int(token): entry.content for token, entry in added.items()}
        self._bytes = _byte_alphabet() if _is_byte_level(self._tokenizer) else None
        self._bos = self._tokenizer.token_to_id(self.bos_text) if self.bos_text else None
        self._adds_bos = bool(settings.get("add_bos_token", False))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`. `add_special` adds what the model wants at the start or end (BOS); `parse_special` reads
        names of control tokens in the text as those tokens."""
        self._tokenizer.encode_special_tokens = not parse_special
        safe = text.encode("utf-8", "replace").decode("utf-8")
        tokens = [int(token) for token in self._tokenizer.encode(safe, add_special_tokens=add_special).ids]
        if add_special and self._adds_bos and self._bos is not None and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens by their names. Raises InputError for ids that are no tokens."""
        self.check(tokens)
        return b"".join(self.piece(token, special=True) for token in tokens).decode("utf-8", "replace")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes `token` adds to a text, maybe part of a character; none for a control token unless `special`."""
        if token in self._control and not special:
            return b""
        if token in self._added:
            return str(self._added[token]).encode()
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""  # logits may be more than tokens
        if self._bytes is not None:
            return bytes(self._bytes[char] for char in name if char in self._bytes)
        as_byte = _BYTE_TOKEN.fullmatch(name)
        return bytes([int(as_byte[1], 16)]) if as_byte else str(name).replace("▁", " ").encode()

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation (end of turn, end of text)."""
        return token in self._end_tokens

    def check(self, tokens: Sequence[int]) -> None:
        """InputError when one of `tokens` is not in the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.n_tokens:
                raise InputError(f"token {token} does not exist; the model's tokens are 0 to {self.n_tokens - 1}")


def chat_template_of(folder: Path) -> str | None:
    """The Jinja text of the model's chat template; None when it has none. ModelFileError."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    template = _settings(folder).get("chat_template")
    return template if isinstance(template, str) else None


def _load(path: Path) -> Any:
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ModuleNotFoundError:
        raise MissingDependencyError("ONNX models need tokenizers; run: pip install 'persona-edge[onnx]'") from None
    if not path.is_file():
        raise ModelFileError(f"{path} is missing; export the model again")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # its errors are plain Exceptions
        raise ModelFileError(f"{path}: not a readable tokenizer ({error}); export the model again") from error


def _settings(folder: Path) -> Mapping[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error}); export the model again") from error
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error}); export the model again") from error


def _special(settings: Mapping[str, Any], key: str) -> str:
    """A special token's text; some files spell it out as an object."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
    return "ByteLevel" in kinds


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's vocabularies: itself when printable, else the next unused."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
