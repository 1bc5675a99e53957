"""Which libllama is taken, how its version is recognised, and what happens with one that is not known.

A process holds one libllama, so what loads another runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from persona_edge.errors import MissingDependencyError, ModelNotFoundError, WeightAccessError
from persona_edge.machine import compiler
from persona_edge.runtime import llama_api, llama_library
from persona_edge.runtime.llama_find import VARIABLE, LibraryFile, find_library, installed_libraries
from persona_edge.runtime.llama_library import check_processor, load_library
from persona_edge.runtime.llama_structs import CONTEXT_LAYOUTS, MODEL_LAYOUTS, Layout, matching_layouts
from persona_edge.runtime.older_glibc import is_about_glibc, loadable_copy, without_c23
from tests.tiny_chat import write_model_and_pack

PREBUILT = next((file for file in installed_libraries() if file.package == "llama-cpp-py-sync"), None)


# Recognising a version


def contents_of(layout: Layout) -> bytes:
    """The defaults as a library of this layout would hand them out, with bytes of something else behind them."""
    values = layout.structure()
    for name, value in layout.defaults.items():
        setattr(values, name, value)
    values._room = b"\x5a" * 64
    return bytes(values) + bytes(512)


@pytest.mark.parametrize("layouts", [MODEL_LAYOUTS, CONTEXT_LAYOUTS], ids=["model", "context"])
def test_each_layout_is_recognised_and_no_other_is_taken_for_it(layouts: tuple[Layout, ...]) -> None:
    for layout in layouts:
        assert matching_layouts(layouts, contents_of(layout)) == [layout]


def one_field_more(contents: bytes) -> bytes:
    return contents[:16] + struct.pack("<q", 7) + contents[16:]


def one_field_less(contents: bytes) -> bytes:
    return contents[:16] + contents[20:]


def nothing_known(contents: bytes) -> bytes:
    return bytes(len(contents))


@pytest.mark.parametrize("layouts", [MODEL_LAYOUTS, CONTEXT_LAYOUTS], ids=["model", "context"])
@pytest.mark.parametrize("change", [one_field_more, one_field_less, nothing_known])
def test_other_layouts_are_not_recognised(layouts: tuple[Layout, ...], change: Callable[[bytes], bytes]) -> None:
    for layout in layouts:
        assert matching_layouts(layouts, change(contents_of(layout))) == []


def test_the_library_in_use_has_a_known_layout_and_keeps_what_is_set() -> None:
    api = load_library().api
    params = api.llama_context_default_params()
    assert (params.n_ctx, params.n_batch, params.offload_kqv, params.type_k) == (512, 2048, True, 1)
    assert api.llama_model_default_params().use_extra_bufts is True


def test_an_unknown_layout_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    libllama = ctypes.CDLL(str(load_library().path))
    monkeypatch.setattr(llama_api, "CONTEXT_LAYOUTS", CONTEXT_LAYOUTS[:0])
    with pytest.raises(WeightAccessError, match="llama 9: what llama_context_default_params returns has a layout that"):
        llama_api.bind_api([libllama], "llama 9")


def test_penalties_look_back_and_not_over_the_vocabulary() -> None:
    """With the arguments in the wrong places the sampler would look back 0 tokens, and name itself as switched off."""
    api = load_library().api
    for n_vocab, last_n, name in ((1000, 64, b"penalties"), (1000, 0, b"?penalties")):
        sampler = api.new_penalties_sampler(n_vocab, last_n, 1.5)
        assert api.llama_sampler_name(sampler) == name
        api.llama_sampler_free(sampler)


# Choosing one


def test_what_is_named_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "libllama.so").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "a"))
    assert find_library() == LibraryFile(tmp_path / "a" / "libllama.so", "libllama")
    assert find_library(tmp_path / "b" / "libllama.so").path == tmp_path / "b" / "libllama.so"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ModelNotFoundError, match=r"no libllama at .*none; give the path of libllama\.so, "):
        find_library()
    with pytest.raises(ModelNotFoundError, match=r"no libllama at .*; give the path"):
        find_library(tmp_path)


def test_what_is_compiled_for_the_machine_comes_before_what_is_prebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("llama_cpp/lib", "llama_cpp_py_sync"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libllama.so").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("llama_cpp", "llama_cpp_py_sync"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    packages = [file.package for file in installed_libraries()]
    assert packages == ["llama-cpp-python", "llama-cpp-py-sync"]
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find_library().path == tmp_path / "llama_cpp_py_sync" / "libllama.so"
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'persona-edge\[prebuilt\]' \(no compiler needed\)"):
        find_library()


def test_a_process_holds_one(tmp_path: Path) -> None:
    used = load_library()
    assert load_library() is used
    (tmp_path / "libllama.so").touch()
    with pytest.raises(WeightAccessError, match=r"this process already uses .*; .*libllama\.so needs a process of its"):
        load_library(tmp_path)


def test_files_that_are_no_libllama(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    with pytest.raises(
        MissingDependencyError, match=r"^libllama does not load \(.*\); give the path of another build$"
    ):
        llama_library._load(LibraryFile(tmp_path / "libllama.so", "libllama"))
    other = ctypes.util.find_library("z") or ctypes.util.find_library("m")
    if other is not None and not os.path.isabs(other):
        with pytest.raises(WeightAccessError, match=r"libm 1 does not export .*; install a version that persona-edge"):
            llama_library._load(LibraryFile(Path(other), "libm", "1"))


def test_a_library_for_another_processor() -> None:
    file = LibraryFile(Path("libllama.so"), "some-wheel", "3")
    info = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | FMA = 1 | AVX512 = 0 | LLAMAFILE = 1 | "
    check_processor(file, info, frozenset({"avx", "avx2", "fma"}))
    check_processor(file, info, None)
    with pytest.raises(MissingDependencyError, match="some-wheel 3 was compiled for a processor with AVX2, FMA, which"):
        check_processor(file, info, frozenset({"avx"}))


# A newer glibc's names

IMITATION = {  # a libc.so.6 that has what only a newer one has, to link against and never to load
    "libc.c": "long __isoc23_strtol(const char *s, char **e, int b) { return 0; } int newer(void) { return 0; }",
    "libc.map": "GLIBC_2.38 { global: *; };",
    "good.c": "long __isoc23_strtol(const char *, char **, int);"
    "long number(const char *s) { return __isoc23_strtol(s, 0, 10); }",
    "bad.c": "int newer(void); int use(void) { return newer(); }",
}


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two libraries linked against that libc: libgood.so wants C23's strtol of it, libbad.so something else."""
    cc = compiler()
    if cc is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("linked")
    for name, text in IMITATION.items():
        (folder / name).write_text(text)
    library = ["-shared", "-fPIC", "-nostdlib"]
    commands = [[*library, "-Wl,-soname,libc.so.6", "-Wl,--version-script=libc.map", "-o", "libc.so.6", "libc.c"]]
    commands += [[*library, "-Wl,--hash-style=gnu", "-o", f"lib{n}.so", f"{n}.c", "libc.so.6"] for n in ("good", "bad")]
    for command in commands:
        subprocess.run([cc, *command], cwd=folder, check=True, capture_output=True)
    (folder / "libc.so.6").unlink()
    return folder


def test_a_library_of_a_newer_system_becomes_loadable(linked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "installed"
    folder.mkdir()
    shutil.copy(linked / "libgood.so", folder)
    before = (folder / "libgood.so").read_bytes()
    copy = loadable_copy(folder / "libgood.so", tmp_path / "cache")
    assert copy.parent.parent == tmp_path / "cache" / "libllama"
    assert ctypes.CDLL(str(copy)).number(b"1234") == 1234
    assert (folder / "libgood.so").read_bytes() == before
    assert len(before) == copy.stat().st_size
    assert loadable_copy(folder / "libgood.so", tmp_path / "cache") == copy
    assert [p.name for p in (tmp_path / "cache" / "libllama").iterdir()] == [copy.parent.name]
    os.utime(folder / "libgood.so", (1, 1))  # another version was installed
    assert loadable_copy(folder / "libgood.so", tmp_path / "cache") != copy


def test_a_library_that_needs_more_than_names_is_refused(linked: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"libbad\.so needs newer of GLIBC_2\.38 or newer; install llama-cpp"
    ):
        loadable_copy(linked / "libbad.so", tmp_path)
    assert list((tmp_path / "libllama").iterdir()) == []


def test_a_cache_that_cannot_be_written(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingDependencyError, match=r"cannot be written to .*; set PERSONA_EDGE_CACHE to a folder"):
        loadable_copy(linked / "libgood.so", tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.4])
def test_damaged_libraries_are_one_clear_error(linked: Path, share: float) -> None:
    whole = (linked / "libgood.so").read_bytes()
    with pytest.raises(MissingDependencyError, match=r"^x is not a 64-bit|^x cannot be read as an ELF|^x needs "):
        without_c23(whole[: int(share * len(whole))], "x")


def test_which_complaints_are_about_glibc() -> None:
    assert is_about_glibc("/lib/libc.so.6: version `GLIBC_2.38' not found (required by libllama.so)")
    assert not is_about_glibc("libgomp.so.1: cannot open shared object file")


# The prebuilt library, as a whole


@pytest.mark.skipif(PREBUILT is None, reason="llama-cpp-py-sync is not installed: pip install 'persona-edge[prebuilt]'")
def test_a_chat_with_the_prebuilt_library(tmp_path: Path) -> None:
    """In a process of its own, as if llama-cpp-python were not installed."""
    model = write_model_and_pack(tmp_path)
    code = f"""
import sys
sys.modules["llama_cpp"] = None
from persona_edge.runtime.llama_library import load_library
print(load_library().name)
from persona_edge.cli import main
main(["chat", "--model", {str(model)!r}, "--persona", "INFP", "--threads", "1", "--seed", "1",
      "--max-tokens", "5", "--message", "Hi", "--json"])
"""
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=variables | {"PERSONA_EDGE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    name, answer = done.stdout.splitlines()
    assert name.startswith("llama-cpp-py-sync 0.")
    record = json.loads(answer)
    assert (record["persona"], record["n_tokens"]) == ("INFP", 5)
    assert record["switch"]["n_units_written"] > 0
