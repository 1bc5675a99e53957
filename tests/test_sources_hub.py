"""Fetching models from the hub: real huggingface_hub runs against a hub made on the spot."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from persona_edge.sources import place_of
from tests.program import PATIENCE, RUN_CLI
from tests.tiny_wheels import HUB, WHOLE, empty_cache, entry, entry_text, weights_left


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one file needs: its size, hash and commit in the headers, and its bytes."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        found = self.path == "/org/tiny/resolve/main/tiny.gguf"
        body = WHOLE if found else b""
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(WHOLE).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub_environment(cache: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    pytest.importorskip("huggingface_hub", reason="the hub's client comes with the offline extra")
    (tmp_path / "own").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield os.environ | {
        "PERSONA_EDGE_CATALOGUE": str(tmp_path / "own"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    thread.join()
    server.server_close()


def _pull_from_hub(environment: dict[str, str], source: str) -> subprocess.CompletedProcess[str]:
    head = entry_text().split("[[source]]")[0]
    (Path(environment["PERSONA_EDGE_CATALOGUE"]) / "tiny.toml").write_text(head + source)
    command = [*RUN_CLI, "models", "pull", "tiny"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_hub_file_without_known_checksum_gets_a_receipt(cache: Path, hub_environment: dict[str, str]) -> None:
    result = _pull_from_hub(hub_environment, HUB)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{cache / 'tiny.gguf'}\n"
    assert (cache / "tiny.gguf").read_bytes() == WHOLE
    assert weights_left(cache) == ["tiny.gguf", "tiny.gguf.json"]
    receipt = json.loads((cache / "tiny.gguf.json").read_text())
    expected = {"sha256": hashlib.sha256(WHOLE).hexdigest(), "size": len(WHOLE), "source": "hub org/tiny/tiny.gguf"}
    assert receipt == expected
    # From now on damage shows, although the catalogue knows neither size nor checksum.
    (cache / "tiny.gguf").write_bytes(WHOLE[:-5])
    assert place_of(entry(entry_text().split("[[source]]")[0] + HUB)) == "damaged"


def test_hub_file_with_another_checksum_is_refused(cache: Path, hub_environment: dict[str, str]) -> None:
    result = _pull_from_hub(hub_environment, HUB + f'sha256 = "{"0" * 64}"\n')
    assert result.returncode == 1
    assert f"expected {'0' * 64}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert weights_left(cache) == []


def test_file_the_hub_does_not_have(cache: Path, hub_environment: dict[str, str]) -> None:
    result = _pull_from_hub(hub_environment, HUB.replace("tiny.gguf", "other.gguf"))
    assert result.returncode == 1
    assert "hub org/tiny/other.gguf: no such repository or file on the hub" in result.stderr
    assert result.stderr.count("\n") == 1
