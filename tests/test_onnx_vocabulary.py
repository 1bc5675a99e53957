"""Text and tokens, held against transformers' own reading of the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from persona_edge.errors import InputError, ModelFileError
from persona_edge.runtime.onnx_vocabulary import OnnxVocabulary, chat_template_of
from tests.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, tokenizer

TEXTS = ("A quiet evening", " the river\n\nand the mill", "naïve façade – ✓ 日本", "a\x00b", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary")
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def vocabulary(folder: Path) -> OnnxVocabulary:
    return OnnxVocabulary(folder, n_tokens=len(tokenizer()), end_tokens=frozenset({2}))


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers_and_lead_back_to_the_text(vocabulary: OnnxVocabulary, text: str) -> None:
    tokens = vocabulary.tokenize(text)
    assert tokens == tokenizer()(text)["input_ids"]
    assert vocabulary.detokenize(tokens) == text
    assert b"".join(vocabulary.piece(token) for token in tokens) == text.encode()


def test_control_tokens_are_read_only_when_asked(vocabulary: OnnxVocabulary) -> None:
    text = f"{SPECIAL_TOKENS[1]}user"
    assert vocabulary.tokenize(text)[0] == 1
    as_text = vocabulary.tokenize(text, parse_special=False)
    assert 1 not in as_text
    assert vocabulary.detokenize(as_text) == text
    assert vocabulary.tokenize(text)[0] == 1


def test_a_control_token_adds_nothing_to_a_text(vocabulary: OnnxVocabulary) -> None:
    assert vocabulary.piece(2) == b""
    assert vocabulary.piece(2, special=True) == SPECIAL_TOKENS[2].encode()
    assert vocabulary.is_end(2)
    assert not vocabulary.is_end(1)


def test_bos_is_added_once_where_the_model_wants_it(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    wants = OnnxVocabulary(copy, n_tokens=360, end_tokens=frozenset())
    assert wants.tokenize("the mill")[0] == 1
    assert wants.tokenize(f"{SPECIAL_TOKENS[1]}the mill").count(1) == 1
    assert 1 not in wants.tokenize("the mill", add_special=False)


def test_special_texts_and_template_come_from_the_files(
    vocabulary: OnnxVocabulary, folder: Path, tmp_path: Path
) -> None:
    assert (vocabulary.bos_text, vocabulary.eos_text) == (SPECIAL_TOKENS[1], SPECIAL_TOKENS[2])
    assert chat_template_of(folder) == CHAT_TEMPLATE
    assert chat_template_of(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ x }}", "eos_token": {"content": "e"}})
    )
    assert chat_template_of(tmp_path) == "{{ x }}"


def test_unknown_tokens_and_damaged_files_are_refused(vocabulary: OnnxVocabulary, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        vocabulary.detokenize([10**6])
    with pytest.raises(ModelFileError, match="is missing"):
        OnnxVocabulary(tmp_path, n_tokens=1, end_tokens=frozenset())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match="not a readable tokenizer"):
        OnnxVocabulary(tmp_path, n_tokens=1, end_tokens=frozenset())
