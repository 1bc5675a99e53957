"""The editing core under AddressSanitizer and UndefinedBehaviorSanitizer, driven by tests/csrc/exercise_kernels.c."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from persona_edge.runtime.kernels import layout_words
from persona_edge.runtime.layouts import LAYOUTS

ROOT = Path(__file__).parent.parent
CORE = [ROOT / "runtime" / "csrc" / name for name in ("layout.c", "fields.c", "group_codes.c", "switch.c", "unite.c")]
HARNESS = ROOT / "tests" / "csrc" / "exercise_kernels.c"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Werror"]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc").split()[0])
    if found is None or sys.platform == "win32":
        pytest.skip("no C compiler with GCC's options here")
    return found


@pytest.fixture(scope="module")
def exercise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness, compiled with sanitizers; skips where the compiler has none."""
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    built = subprocess.run([compiler(), *SANITIZERS, probe, "-o", folder / "probe"], capture_output=True, check=False)
    if built.returncode or subprocess.run([folder / "probe"], capture_output=True, check=False).returncode:
        pytest.skip("this compiler cannot build or run with -fsanitize=address,undefined")
    program = folder / "exercise"
    command: list[str | Path] = [
        compiler(),
        *WARNINGS,
        *SANITIZERS,
        f"-I{CORE[0].parent}",
        *CORE,
        HARNESS,
        "-o",
        program,
    ]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return program


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The words of every layout, as the harness reads them."""
    words = [layout_words(layout) for layout in LAYOUTS.values()]
    path = tmp_path_factory.mktemp("layouts") / "layouts.bin"
    path.write_bytes(np.concatenate([[len(words)], *([len(w), *w] for w in words)]).astype(np.int32).tobytes())
    return path


@pytest.mark.parametrize("seed", range(4))
def test_no_sanitizer_complains_and_every_byte_comes_back(exercise: Path, layouts: Path, seed: int) -> None:
    run = subprocess.run([exercise, layouts, str(seed)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{len(LAYOUTS)} layouts\n"
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("planted", "found"), [("address", "ERROR: AddressSanitizer"), ("undefined", "runtime error: shift")]
)
def test_a_planted_error_is_found(exercise: Path, layouts: Path, planted: str, found: str) -> None:
    """Or the silence of the test above would say nothing."""
    run = subprocess.run([exercise, layouts, "0", planted], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert found in run.stderr


def test_the_core_compiles_without_a_warning_when_optimized(tmp_path: Path) -> None:
    for source in CORE:
        command: list[str | Path] = [compiler(), *WARNINGS, "-O3", "-c", source, "-o", tmp_path / "out.o"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
