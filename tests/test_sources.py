"""Fetching models: real pip runs against wheels made on the spot."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from persona_edge.cache import Receipt, cache_folder, exclusive, model_folder
from persona_edge.errors import MissingDependencyError, ModelFileError, ModelNotFoundError, OutputError
from persona_edge.sources import locate, place_of, pull
from tests.program import PATIENCE, PROGRAM, started
from tests.tiny_wheels import HUB, PARTS, WHOLE, empty_cache, entry, entry_text, make_wheel, weights_left


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def links(cache: Path, tmp_path: Path) -> Path:
    """An index with the two wheels of `entry_text()`."""
    make_wheel(tmp_path / "links", "pe-tiny-a", {"a/part0": PARTS[0]})
    make_wheel(tmp_path / "links", "pe-tiny-b", {"b/part1": PARTS[1]})
    return tmp_path / "links"


def test_two_wheels_become_one_file(cache: Path, links: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    path = pull(entry(entry_text()), lambda *step: steps.append(step))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == WHOLE
    assert weights_left(cache) == ["tiny.gguf", "tiny.gguf.json"]
    assert not (cache / ".downloads").exists()
    receipt = Receipt.read(path)
    assert receipt is not None
    assert (receipt.sha256, receipt.size) == (hashlib.sha256(WHOLE).hexdigest(), len(WHOLE))
    assert {step for step, _, _ in steps} >= {"pe-tiny-a==1.0", "pe-tiny-b==1.0", "unpacking tiny.gguf"}
    assert steps[-1] == ("unpacking tiny.gguf", len(WHOLE), len(WHOLE))


def test_what_is_cached_needs_no_index(cache: Path, links: Path) -> None:
    first = pull(entry(entry_text()))
    shutil.rmtree(links)
    links.mkdir()
    assert place_of(entry(entry_text())) == "cached"
    assert pull(entry(entry_text())) == first
    assert pull(entry(entry_text()), verify=True) == first


def test_wrong_checksum_leaves_nothing(cache: Path, links: Path) -> None:
    with pytest.raises(ModelFileError, match=f"has SHA-256 {hashlib.sha256(WHOLE).hexdigest()}, expected {'0' * 64}"):
        pull(entry(entry_text(sha256="0" * 64)))
    assert weights_left(cache) == []
    # The wheels that led there are gone too: a corrected index must be asked again.
    assert not (cache / ".downloads").exists()


@pytest.mark.parametrize(("size", "message"), [(len(WHOLE) - 1, "is larger than"), (len(WHOLE) + 1, "has 16244 bytes")])
def test_wrong_size_leaves_nothing(cache: Path, links: Path, size: int, message: str) -> None:
    assert len(WHOLE) == 16244
    with pytest.raises(ModelFileError, match=message):
        pull(entry(entry_text(size=size)))
    assert weights_left(cache) == []


def test_wheel_without_the_member(cache: Path, links: Path) -> None:
    make_wheel(links, "pe-tiny-b", {"b/other": PARTS[1]})
    with pytest.raises(ModelFileError, match="holds no b/part1"):
        pull(entry(entry_text()))
    assert weights_left(cache) == []


def test_member_with_flipped_bytes_is_noticed(cache: Path, links: Path) -> None:
    path = links / "pe_tiny_b-1.0-py3-none-any.whl"
    damaged = bytearray(path.read_bytes())
    start = damaged.index(b"b/part1") + len(b"b/part1")
    damaged[start + 4 : start + 12] = b"\xff" * 8
    path.write_bytes(damaged)
    with pytest.raises(ModelFileError, match="damaged"):
        pull(entry(entry_text()))
    assert weights_left(cache) == []


def test_index_without_the_package_is_one_line(cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"tiny could not be fetched; tried wheel pe-tiny-a==1\.0") as caught:
        pull(entry(entry_text()))
    assert "No matching distribution found for pe-tiny-a==1.0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_second_try_keeps_the_wheels_of_the_first(cache: Path, links: Path) -> None:
    (links / "pe_tiny_b-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelNotFoundError):
        pull(entry(entry_text()))
    (links / "pe_tiny_a-1.0-py3-none-any.whl").unlink()
    make_wheel(links, "pe-tiny-b", {"b/part1": PARTS[1]})
    assert pull(entry(entry_text())).read_bytes() == WHOLE


def test_truncated_cache_is_fetched_again(cache: Path, links: Path) -> None:
    path = pull(entry(entry_text()))
    path.write_bytes(WHOLE[:-1])
    assert locate(entry(entry_text())) is None
    assert place_of(entry(entry_text())) == "damaged"
    assert pull(entry(entry_text())).read_bytes() == WHOLE


def test_verify_finds_and_replaces_a_flipped_byte(cache: Path, links: Path) -> None:
    path = pull(entry(entry_text()))
    flipped = WHOLE[:-1] + bytes([WHOLE[-1] ^ 1])
    path.write_bytes(flipped)
    assert pull(entry(entry_text())).read_bytes() == flipped
    assert pull(entry(entry_text()), verify=True).read_bytes() == WHOLE


def test_verify_removes_what_it_cannot_replace(cache: Path, links: Path) -> None:
    path = pull(entry(entry_text()))
    path.write_bytes(b"x" * len(WHOLE))
    shutil.rmtree(links)
    with pytest.raises(ModelNotFoundError):
        pull(entry(entry_text()), verify=True)
    assert locate(entry(entry_text())) is None


def test_interrupt_while_unpacking_leaves_nothing_half_written(cache: Path, links: Path) -> None:
    def interrupt(step: str, done: int, total: int | None) -> None:
        if step.startswith("unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(entry(entry_text()), interrupt)
    assert weights_left(cache) == []
    assert pull(entry(entry_text())).read_bytes() == WHOLE


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupt_while_pip_waits_for_the_network(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tiny.toml").write_text(entry_text())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        environment = os.environ | {
            "PERSONA_EDGE_CATALOGUE": str(tmp_path / "own"),
            "PIP_FIND_LINKS": f"http://127.0.0.1:{server.getsockname()[1]}/",
        }
        with started("models", "pull", "tiny", environment=environment) as process, server.accept()[0] as connection:
            connection.settimeout(PATIENCE)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=PATIENCE)
            while connection.recv(4096):
                pass  # ends when pip, too, has gone
    assert (process.returncode, *said) == (130, "", "persona-edge: error: interrupted\n")
    assert weights_left(cache) == []
    assert list((cache / ".downloads").iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(cache: Path, links: Path) -> None:
    cache.mkdir(parents=True)
    (cache / ".persona-edge-0123456789abcdef.tmp").write_bytes(b"half")
    pull(entry(entry_text()))
    assert weights_left(cache) == ["tiny.gguf", "tiny.gguf.json"]


def test_second_process_waits_and_takes_what_the_first_fetched(cache: Path) -> None:
    waiting = threading.Event()
    result: list[Path] = []

    def watch(step: str, done: int, total: int | None) -> None:
        if step.startswith("waiting"):
            waiting.set()

    with exclusive(cache, lambda: None):
        thread = threading.Thread(target=lambda: result.append(pull(entry(entry_text()), watch)))
        thread.start()
        assert waiting.wait(PATIENCE)
        (cache / "tiny.gguf").write_bytes(WHOLE)
    thread.join(PATIENCE)
    assert result == [cache / "tiny.gguf"]


def test_file_inside_an_installed_package_is_used_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path, "pe-tiny-a", {"a/part0": WHOLE})
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    text = entry_text().replace(', "pe-tiny-b==1.0"', "").replace(', "b/part1"', "")
    path = pull(entry(text), verify=True)
    assert path == tmp_path / "site" / "a" / "part0"
    assert place_of(entry(text)) == "packaged"
    assert not cache.exists()
    path.write_bytes(b"x" * len(WHOLE))
    with pytest.raises(ModelFileError, match="reinstall or replace"):
        pull(entry(text), verify=True)
    path.write_bytes(b"short")
    assert place_of(entry(text)) == "needs download"


def test_next_source_is_tried(cache: Path, tmp_path: Path) -> None:
    weights = tmp_path / "mine.gguf"
    local = f'[[source]]\nkind = "path"\npath = "{weights.as_posix()}"\nquantization = "Q8_0"\nverified = false\n'
    with pytest.raises(ModelNotFoundError, match=r"tried wheel .*; path .*mine.gguf: no such file"):
        pull(entry(entry_text(more=local)))
    weights.write_bytes(WHOLE)
    assert pull(entry(entry_text(more=local))) == weights
    assert place_of(entry(entry_text(more=local))) == "local"


def test_without_pip_or_hub_client_the_packages_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.util.find_spec
    absent = ("pip", "huggingface_hub")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else present(n))
    with pytest.raises(MissingDependencyError, match=r"ensurepip --upgrade; hub org/tiny/tiny.gguf: huggingface_hub"):
        pull(entry(entry_text(more=HUB)))


def test_cache_below_a_file_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match=r"cannot write to the cache .*Not a directory"):
        pull(entry(entry_text()))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_cache_cannot_be_written(cache: Path, links: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o555)
    with pytest.raises(OutputError, match=r"cannot write to the cache .*Permission denied"):
        pull(entry(entry_text()))


def test_too_small_a_disk_is_refused_before_anything_is_fetched(
    cache: Path, links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1_000_000))
    with pytest.raises(OutputError, match=r"has 0\.00 GB free, fetching tiny\.gguf needs 0\.07 GB"):
        pull(entry(entry_text()))
    assert weights_left(cache) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files with setrlimit")
def test_disk_that_refuses_half_way_leaves_nothing(cache: Path, links: Path, tmp_path: Path) -> None:
    whole = PARTS[0] + bytes(1 << 22)
    make_wheel(links, "pe-tiny-b", {"b/part1": bytes(1 << 22)})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tiny.toml").write_text(entry_text(whole))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
    result = subprocess.run(
        [sys.executable, "-c", limit + PROGRAM, "models", "pull", "tiny"],
        env=os.environ | {"PERSONA_EDGE_CATALOGUE": str(tmp_path / "own")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"persona-edge: error: cannot write {cache / 'tiny.gguf'}: File too large")
    assert result.stderr.count("\n") == 1
    assert weights_left(cache) == []


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PERSONA_EDGE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "persona-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / ".cache" / "persona-edge"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "persona-edge"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "persona-edge"
    monkeypatch.setenv("PERSONA_EDGE_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    assert model_folder("tiny") == tmp_path / "chosen" / "models" / "tiny"
