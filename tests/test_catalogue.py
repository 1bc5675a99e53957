"""The catalogue's files, and what a model argument stands for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from persona_edge.catalogue import DEFAULT_MODEL, find_entry, load_catalogue, resolve_model
from persona_edge.catalogue_entries import HubSource, PathSource, WheelSource, parse_entry
from persona_edge.errors import ModelError, ModelFileError, ModelNotFoundError

VALID = """
name = "tiny"
title = "Tiny"
architecture = "llama"
parameters = 1_000
kind = "chat"
licence = "MIT"

[[source]]
kind = "hub"
repo = "org/tiny-GGUF"
file = "sub/tiny-Q8_0.gguf"
quantization = "Q8_0"
verified = false

[[source]]
kind = "wheel"
packages = ["tiny-a==1.0", "tiny-b==1.0"]
members = ["a/part0", "b/part1"]
file = "tiny.gguf"
quantization = "Q8_0"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
size = 8
verified = true

[[source]]
kind = "path"
path = "weights/tiny.gguf"
quantization = "Q8_0"
verified = false

[[original]]
kind = "hub"
repo = "org/tiny"
verified = false
"""


@pytest.fixture
def own_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalogue"
    folder.mkdir()
    monkeypatch.setenv("PERSONA_EDGE_CATALOGUE", str(folder))
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path / "cache"))
    return folder


def test_shipped_catalogue_is_valid_and_holds_the_promised_models() -> None:
    catalogue = load_catalogue()
    promised = {"smollm2-135m", "gemma3-270m", "qwen2.5-0.5b", "qwen2.5-14b", "llama3-8b", "llama2-13b"}
    assert promised | {DEFAULT_MODEL} <= set(catalogue)
    assert list(catalogue) == sorted(catalogue)
    for entry in catalogue.values():
        assert entry.sources, entry.name
        assert entry.originals, entry.name
        # Only what was fetched may claim to be verified, and nobody fetched from a hub yet.
        assert all(source.verified == isinstance(source, WheelSource) for source in entry.sources), entry.name


def test_embedded_default_is_pinned() -> None:
    source = find_entry(DEFAULT_MODEL).sources[0]
    assert isinstance(source, WheelSource)
    assert source.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert source.size == 98_362_432


def test_entry_is_read_field_by_field() -> None:
    entry = parse_entry(VALID.encode(), "tiny.toml", Path("/base"))
    hub, wheel, path = entry.sources
    assert isinstance(hub, HubSource)
    assert (hub.repo, hub.path, hub.file, hub.size, hub.verified) == (
        "org/tiny-GGUF",
        "sub/tiny-Q8_0.gguf",
        "tiny-Q8_0.gguf",
        None,
        False,
    )
    assert isinstance(wheel, WheelSource)
    assert wheel.packages == ("tiny-a==1.0", "tiny-b==1.0")
    assert wheel.members == ("a/part0", "b/part1")
    assert (wheel.sha256, wheel.size, wheel.verified) == ("0" * 64, 8, True)
    assert isinstance(path, PathSource)
    assert path.path == Path("/base/weights/tiny.gguf")
    assert entry.originals[0].repo == "org/tiny"
    assert (entry.licence.name, entry.licence.url, entry.note) == ("MIT", None, "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny"', 'name = "tiny', "tiny.toml: not valid TOML"),
        ('name = "tiny"', 'name = "other"', "must be called other.toml"),
        ('name = "tiny"', 'name = "../tiny"', "name: '../tiny' does not have the form"),
        ('title = "Tiny"', "", "title: missing"),
        ('title = "Tiny"', 'title = " "', "title: is empty"),
        ('title = "Tiny"', 'titel = "Tiny"\ntitle = "Tiny"', "titel: is not a field"),
        ("parameters = 1_000", 'parameters = "1B"', "parameters: '1B' must be a whole number"),
        ("parameters = 1_000", "parameters = true", "parameters: True must be a whole number"),
        ("parameters = 1_000", "parameters = 0", "parameters: 0 must be above 0"),
        ('kind = "chat"', 'kind = "base model"', "'base model' must be 'chat' or 'base'"),
        ('kind = "hub"\nrepo = "org/tiny-GGUF"', 'kind = "ftp"', "source 1: kind: 'ftp' must be"),
        ('repo = "org/tiny-GGUF"', 'repo = "tiny-GGUF"', "source 1: repo: 'tiny-GGUF' does not have the form"),
        ('file = "sub/tiny-Q8_0.gguf"', 'file = "../tiny.gguf"', "source 1: file: '../tiny.gguf' is not a plain"),
        ('file = "sub/tiny-Q8_0.gguf"', 'file = "/etc/passwd"', "is not a plain relative path"),
        ('file = "tiny.gguf"', 'file = "../../tiny.gguf"', "source 2: file: '../../tiny.gguf' does not have the form"),
        ('"b/part1"', '"b/../../part1"', "source 2: file: 'b/../../part1' is not a plain"),
        ('["a/part0", "b/part1"]', '["a/part0"]', "2 packages but 1 members"),
        ('["a/part0", "b/part1"]', "[]", "members: must be a list of texts with at least one"),
        ('["a/part0", "b/part1"]', '["a/part0", 2]', "members: must be a list of texts"),
        (
            '"tiny-b==1.0"',
            '"--index-url=http://example.org"',
            "packages: '--index-url=http://example.org' does not have",
        ),
        ('"tiny-b==1.0"', '"tiny-b"', "packages: 'tiny-b' does not have the form"),
        ("size = 8", "", "source 2: verified: a verified source needs sha256 and size"),
        ("size = 8\nverified = true", "verified = false", "a wheel source needs sha256 and size"),
        ('sha256 = "00', 'sha256 = "0', "sha256: '000"),
        ("verified = false\n\n[[source]]", "\n[[source]]", "source 1: verified: missing"),
        (
            '[[original]]\nkind = "hub"',
            '[[original]]\nkind = "wheel"',
            "original 1: kind: 'wheel' must be 'hub' or 'path'",
        ),
        ('licence = "MIT"', 'licence = "MIT"\noriginal = ["x"]', "not valid TOML"),
    ],
)
def test_malformed_entry_names_file_and_field(old: str, new: str, message: str) -> None:
    text = VALID.replace(old, new, 1)
    assert text != VALID
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        parse_entry(text.encode(), "tiny.toml")
    assert str(caught.value).startswith("tiny.toml: ")


def test_entry_without_any_weights_is_refused() -> None:
    head = VALID.split("[[source]]", maxsplit=1)[0]
    with pytest.raises(ModelError, match="needs at least one"):
        parse_entry(head.encode(), "tiny.toml")
    with pytest.raises(ModelError, match="source: 'x' must be a list of tables"):
        parse_entry((head + 'source = "x"').encode(), "tiny.toml")
    with pytest.raises(ModelError, match="not valid TOML"):
        parse_entry(b"\xff\xfe", "tiny.toml")


def test_own_catalogue_adds_and_replaces(own_catalogue: Path) -> None:
    (own_catalogue / "tiny.toml").write_text(VALID)
    (own_catalogue / f"{DEFAULT_MODEL}.toml").write_text(VALID.replace('"tiny"', f'"{DEFAULT_MODEL}"', 1))
    catalogue = load_catalogue()
    assert catalogue["tiny"].title == "Tiny"
    assert catalogue[DEFAULT_MODEL].title == "Tiny"
    assert "llama3-8b" in catalogue


def test_own_catalogue_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSONA_EDGE_CATALOGUE", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="no such folder"):
        load_catalogue()


def test_path_source_is_used_where_it_lies(own_catalogue: Path) -> None:
    (own_catalogue / "tiny.toml").write_text(VALID)
    weights = own_catalogue / "weights" / "tiny.gguf"
    weights.parent.mkdir()
    weights.write_bytes(b"GGUF and more")
    resolved = resolve_model("Tiny")
    assert resolved.name == "tiny"
    assert resolved.require_gguf() == weights
    assert resolved.entry is not None
    assert resolved.entry.name == "tiny"


def test_original_weights_are_named_not_fetched(own_catalogue: Path) -> None:
    (own_catalogue / "tiny.toml").write_text(VALID)
    resolved = resolve_model("tiny", want="original")
    assert (resolved.hub_id, resolved.gguf_path, resolved.folder) == ("org/tiny", None, None)
    with pytest.raises(ModelError, match="org/tiny holds original weights"):
        resolved.require_gguf()


def test_local_original_is_preferred_to_the_hub(own_catalogue: Path) -> None:
    folder = own_catalogue / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (own_catalogue / "tiny.toml").write_text(VALID + '\n[[original]]\nkind = "path"\npath = "hf"\nverified = false\n')
    assert resolve_model("tiny", want="original").folder == folder


def test_model_without_originals_says_so(own_catalogue: Path) -> None:
    (own_catalogue / "tiny.toml").write_text(VALID.split("[[original]]", maxsplit=1)[0])
    with pytest.raises(ModelNotFoundError, match="knows no original weights"):
        resolve_model("tiny", want="original")


def test_without_fetching_an_absent_model_names_the_pull_command(own_catalogue: Path) -> None:
    (own_catalogue / "tiny.toml").write_text(VALID)
    with pytest.raises(ModelNotFoundError, match="persona-edge models pull tiny"):
        resolve_model("tiny", fetch=False)


@pytest.mark.parametrize("file_name", ["weights.gguf", "sha256-abc", "weights.bin"])
def test_any_file_that_is_a_gguf_will_do(tmp_path: Path, file_name: str) -> None:
    path = tmp_path / file_name
    path.write_bytes(b"GGUF\x03\0\0\0")
    resolved = resolve_model(path)
    assert resolved.gguf_path == path
    assert (resolved.folder, resolved.hub_id, resolved.entry) == (None, None, None)
    assert resolve_model(str(path)) == resolved


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04", b"<html>404</html>"])
def test_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        resolve_model(path)


def test_hugging_face_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    resolved = resolve_model(tmp_path)
    assert (resolved.folder, resolved.name, resolved.gguf_path) == (tmp_path, tmp_path.name, None)
    with pytest.raises(ModelError, match=r"pass a \.gguf file"):
        resolved.require_gguf()


def test_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=re.escape(str(tmp_path / "a.gguf"))):
        resolve_model(tmp_path)


def test_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"without config\.json"):
        resolve_model(tmp_path)


def test_catalogue_name_wins_over_a_folder_unless_written_as_path(
    own_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_catalogue / "tiny.toml").write_text(VALID)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny", want="original").hub_id == "org/tiny"
    assert resolve_model("./tiny", want="original").folder == Path("tiny")


def test_hub_id_is_passed_on() -> None:
    resolved = resolve_model("meta-llama/Llama-3.2-1B-Instruct")
    assert (resolved.hub_id, resolved.name) == ("meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("smollm2-135", "did you mean smollm2-135m"),
        ("SmolLM-135M", "did you mean smollm2-135m"),
        ("zzz", "no model 'zzz'; persona-edge models list shows all"),
        ("", "the model's name is empty"),
        ("no/such/folder", "no such file or folder: no/such/folder"),
        ("models/weights.gguf", "no such file or folder: models/weights.gguf"),
        ("weights.gguf", "no such file or folder: weights.gguf"),
        ("./nothing", "no such file or folder: ./nothing"),
        ("~/nothing/here", "no such file or folder: ~/nothing/here"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(argument: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=re.escape(message)) as caught:
        resolve_model(argument)
    assert "persona-edge models list" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.model
def test_embedded_default_resolves_to_a_whole_file(smollm2_path: Path) -> None:
    assert smollm2_path.stat().st_size == 98_362_432
    assert resolve_model(DEFAULT_MODEL, fetch=False).gguf_path == smollm2_path
