"""`persona-edge doctor`: each finding for what it may find, and the whole on this machine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from persona_edge import doctor, machine
from persona_edge.cli import main
from persona_edge.doctor import Check, Requirement, can_chat
from persona_edge.probes import LLAMA_PROBE, ProbeResult, run_probe
from persona_edge.runtime.llama_find import installed_libraries

LLAMA = Requirement("llama-cpp-python", "0.3.36", "0.4")


@pytest.mark.parametrize(
    ("version", "admitted"),
    [
        ("0.3.36", True),
        ("0.3.36.post1", True),
        ("0.3.100", True),
        ("0.3.35", False),
        ("0.3", False),
        ("0.4", False),
        ("0.4.0", False),
        ("0.4.1", False),
        ("1.0", False),
    ],
)
def test_tested_range(version: str, admitted: bool) -> None:
    assert LLAMA.admits(version) is admitted


def test_tested_range_ignores_build_labels_and_final_zeros() -> None:
    assert Requirement("torch", "2.13.0").admits("2.13.0+cpu")
    assert Requirement("transformers", "5.0", "6").admits("5")
    assert not Requirement("transformers", "5.0", "6").admits("6.0.0rc1")


def test_ranges_are_those_of_the_package() -> None:
    """pyproject.toml and the doctor state the same requirements."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    ours = [doctor._NUMPY, doctor._LLAMA, doctor._PREBUILT, doctor._JINJA, *doctor._OFFLINE, *doctor._ONNX]
    for requirement in ours:
        assert f'"{requirement}"' in text, requirement


@pytest.mark.parametrize(
    ("versions", "status", "detail", "remedy"),
    [
        (
            {},
            "fail",
            "not installed",
            "pip install 'persona-edge[prebuilt]', or 'llama-cpp-python>=0.3.36,<0.4' (builds",
        ),
        (
            {"llama-cpp-python": "0.2.0"},
            "warn",
            "llama-cpp-python 0.2.0 is outside the tested range llama-cpp-python>=0.3.36,<0.4",
            "pip install 'llama-cpp-python>=0.3.36,<0.4'",
        ),
        ({"llama-cpp-python": "0.3.40", "llama-cpp-py-sync": "0.1"}, "ok", "llama-cpp-python 0.3.40", ""),
        ({"llama-cpp-py-sync": "0.11739"}, "ok", "llama-cpp-py-sync 0.11739", ""),
    ],
)
def test_llama_version(versions: dict[str, str], status: str, detail: str, remedy: str) -> None:
    check = doctor.check_llama_version(versions.get)
    assert (check.status, check.detail) == (status, detail)
    assert check.remedy.startswith(remedy)
    assert can_chat((check,)) is (status != "fail")


def test_llama_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_EDGE_LIBLLAMA", "/opt/app/lib")
    check = doctor.check_llama_version(lambda name: None)
    assert (check.status, check.detail) == ("ok", "/opt/app/lib, as PERSONA_EDGE_LIBLLAMA says")


def test_old_python_fails() -> None:
    assert doctor.check_python((3, 10, 9)).status == "fail"
    assert doctor.check_python((3, 11, 0)).status == "ok"


def test_libllama_that_cannot_be_used_fails() -> None:
    problem = "libllama does not export llama_decode; install a version that persona-edge knows: pip install 'x==1'"
    check = doctor.check_libllama(ProbeResult({"problem": problem}))
    assert (check.status, check.detail) == ("fail", "libllama does not export llama_decode")
    assert check.remedy == "install a version that persona-edge knows: pip install 'x==1'"


def test_libllama_without_get_tensor_falls_back() -> None:
    check = doctor.check_libllama(ProbeResult({"path": "/lib/libllama.so", "direct": False, "gpu": True}))
    assert check.status == "ok"
    assert check.detail == (
        "/lib/libllama.so, tensors are found by watching one evaluation (no get_tensor symbol); "
        "--gpu-layers can use a GPU"
    )


def test_where_weights_would_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_edge.runtime.placement.available_memory", lambda: None)
    check = doctor.check_placement()
    assert check.detail.startswith("a small model in the heap: 100 MB are copied quickly")
    assert "; a large one mapped from the file, copied page by page when edited: 5.0 GB load" in check.detail
    monkeypatch.setattr("persona_edge.runtime.placement.why_not_here", lambda: "no room")
    assert doctor.check_placement().detail == "in the heap: mapped weights cannot be edited here (no room)"


def test_library_that_crashes_is_a_finding() -> None:
    probe = run_probe("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    assert probe.failure is not None
    assert doctor.check_libllama(probe).status == "fail"
    if sys.platform != "win32":
        assert probe.failure == "its process died of SIGILL"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("print('hello')", "its answer cannot be read"),
        ("print([1])", "its answer cannot be read"),
        ("", "its answer cannot be read"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_probe_that_gets_no_answer_says_why(code: str, failure: str) -> None:
    assert run_probe(code) == ProbeResult(failure=failure)


def test_probe_that_hangs_is_ended() -> None:
    assert run_probe("import time; time.sleep(600)", seconds=1).failure == "no answer within 1 seconds"


def test_probe_reads_the_last_line() -> None:
    assert run_probe("print('banner'); print('{\"a\": 1}')") == ProbeResult({"a": 1})


@pytest.mark.parametrize(
    ("flags", "n_cores", "status", "words"),
    [
        (frozenset({"amx_tile", "amx_int8", "avx512f", "avx2"}), 8, "ok", "8 cores, AMX: its repacked weight buffers"),
        (frozenset({"avx512f", "avx2"}), 2, "ok", "2 cores, AVX-512"),
        (frozenset({"avx2"}), 1, "ok", "1 core, AVX2"),
        (None, 4, "ok", "4 cores"),
    ],
)
def test_processor(flags: frozenset[str] | None, n_cores: int, status: str, words: str) -> None:
    check = doctor.check_processor(flags, n_cores)
    assert check.status == status
    assert check.detail.startswith(words)


def test_processor_without_avx2_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert doctor.check_processor(frozenset({"sse2"}), 2).status == "warn"
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert doctor.check_processor(frozenset({"neon"}), 2).status == "ok"


def test_memory() -> None:
    assert doctor.check_memory(None).status == "ok"
    assert doctor.check_memory(900_000_000).status == "warn"
    assert doctor.check_memory(8_000_000_000) == Check("memory", "ok", "8.0 GB free")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells free memory in /proc")
def test_machine_is_read_from_proc() -> None:
    memory = machine.available_memory()
    assert memory is not None
    assert 0 <= memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)


def test_cache_folder_that_does_not_exist_yet_is_fine(tmp_path: Path) -> None:
    check = doctor.check_cache(tmp_path / "a" / "b", needed=True)
    assert check.status == "ok"
    assert check.detail.startswith(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("needed", "status"), [(True, "fail"), (False, "warn")])
def test_cache_below_a_file_cannot_be_written(tmp_path: Path, needed: bool, status: str) -> None:
    (tmp_path / "file").touch()
    check = doctor.check_cache(tmp_path / "file" / "cache", needed=needed)
    assert check.status == status
    assert "PERSONA_EDGE_CACHE" in check.remedy


def test_extra_lists_what_is_missing_and_what_is_untested() -> None:
    extra = (Requirement("a", "1"), Requirement("b", "2", "3"))
    none = doctor.check_extra("offline", "export", extra, lambda name: None)
    assert (none.status, none.detail) == ("warn", "not installed; needed for export")
    assert none.remedy == "pip install 'persona-edge[offline]'"
    half = doctor.check_extra("offline", "export", extra, {"a": "1.5"}.get)
    assert half.detail == "not installed: b; needed for export"
    old = doctor.check_extra("offline", "export", extra, {"a": "1.5", "b": "3.1"}.get)
    assert (old.status, old.detail) == ("warn", "outside the tested range: b 3.1 (tested: b>=2,<3)")
    assert doctor.check_extra("offline", "export", extra, {"a": "1", "b": "2.9"}.get).detail == "a 1, b 2.9"


def test_torch_device() -> None:
    assert doctor.check_torch(ProbeResult({"device": "cpu", "name": ""})).detail.startswith("CPU")
    assert doctor.check_torch(ProbeResult({"device": "cuda", "name": "GPU 9000"})).detail == "cuda: GPU 9000"
    assert doctor.check_torch(ProbeResult(failure="ImportError: x")).status == "warn"


def test_missing_pip_is_only_a_warning() -> None:
    check = doctor.check_pip(None)
    assert check.status == "warn"
    assert check.remedy.endswith("-m ensurepip --upgrade")


def test_malformed_catalogue_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.toml").write_text("name = 3")
    monkeypatch.setenv("PERSONA_EDGE_CATALOGUE", str(tmp_path))
    (check,) = doctor._check_models()
    assert check.status == "fail"
    assert check.detail.startswith("x.toml: name: 3 must be a text")


def test_llama_in_this_environment_can_be_edited() -> None:
    if next(installed_libraries(), None) is None:
        pytest.skip("no llama.cpp is installed")
    check = doctor.check_libllama(run_probe(LLAMA_PROBE))
    assert check.status == "ok", check.detail


def test_whole_report_on_this_machine() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    report = json.loads(result.stdout)
    checks = tuple(Check(**check) for check in report["checks"])
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert {
        "Python",
        "numpy",
        "C kernels",
        "llama.cpp",
        "libllama",
        "weights",
        "cache",
        "default model",
        "offline extra",
    } <= set(names)
    assert all(bool(check.remedy) is (check.status != "ok") for check in checks)
    assert report["can_chat"] is can_chat(checks)
    assert result.exit_code == (0 if can_chat(checks) else 1)


def test_text_report_puts_the_remedy_under_the_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Check("numpy", "ok", "2.0"), Check("llama-cpp-python", "fail", "not installed", "pip install it"))
    monkeypatch.setattr("persona_edge.cli.doctor.run_checks", lambda: found)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "ok    numpy             2.0",
        "fail  llama-cpp-python  not installed",
        "                        -> pip install it",
    ]
