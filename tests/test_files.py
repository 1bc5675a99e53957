"""Atomic writing: the whole file or none, nothing left behind, and failures that really happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import persona_edge
from persona_edge.errors import OutputError
from persona_edge.files import atomic_output, write_atomically

ROOT = Path(persona_edge.__file__).parents[1]


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_atomically(target, b"old")
    write_atomically(target, [b"ne", b"w"])
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_changes_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with atomic_output(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_any_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def write_and_fail() -> None:
        with atomic_output(target) as file:
            file.write(b"half")
            raise failure

    with pytest.raises(failure):
        write_and_fail()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    target = tmp_path / "file" / "a.bin"
    with pytest.raises(
        OutputError, match=r"cannot write .*a\.bin: Not a directory; nothing was written\. Create the fo"
    ):
        write_atomically(target, b"data")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"No such file or directory; nothing was written\. Create the folder .*absent"
    ):
        write_atomically(tmp_path / "absent" / "a.bin", b"data")


def test_a_target_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        write_atomically(tmp_path / "a.bin", b"data")
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"Permission denied.*Choose a folder that you may write to"):
        write_atomically(tmp_path / "a.bin", b"data")
    tmp_path.chmod(0o700)


def test_a_file_size_limit_stands_in_for_a_full_disk(tmp_path: Path) -> None:
    """Also as root: the kernel refuses to write beyond RLIMIT_FSIZE."""
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    program = (
        "import pathlib, resource, signal, sys\n"
        "from persona_edge.errors import OutputError\n"
        "from persona_edge.files import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_atomically(pathlib.Path(sys.argv[1]), bytes(100_000))\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(target)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith(f"cannot write {target}: File too large; nothing was written.")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failure_to_sync_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
        write_atomically(tmp_path / "a.bin", b"data")
    assert os.listdir(tmp_path) == []


def test_an_unrelated_error_in_the_block_keeps_its_name(tmp_path: Path) -> None:
    def read_another_file() -> None:
        with atomic_output(tmp_path / "a.bin") as file:
            file.write((tmp_path / "missing").read_bytes())

    with pytest.raises(FileNotFoundError, match="missing"):
        read_another_file()
    assert os.listdir(tmp_path) == []
