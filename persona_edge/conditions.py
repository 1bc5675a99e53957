"""Where, with what and when something was measured: what every stored result says about itself."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from persona_edge import __version__
from persona_edge.doctor import installed_version
from persona_edge.machine import cpu_model, system_name, total_memory, usable_cores
from persona_edge.runtime.kernels import implementation

__all__ = ["Conditions", "conditions"]

PACKAGES: Final = (
    *("numpy", "llama-cpp-python", "llama-cpp-py-sync", "onnxruntime", "onnxruntime-genai"),
    *("torch", "transformers", "peft", "bm25s"),
)


@dataclass(frozen=True)
class Conditions:
    """A machine, what is installed there, and a command. Memory in bytes, None where it cannot be told."""

    command: str
    date: str
    cpu: str
    cores: int
    memory_bytes: int | None
    system: str
    versions: Mapping[str, str]

    @property
    def machine(self) -> str:
        """Processor, memory, system and versions in a line."""
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / 2**30:.1f} GiB of memory"
        versions = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        return f"{self.cpu}, {self.cores} cores{memory}; {self.system}; {versions}"


def conditions(command: Sequence[str] = ()) -> Conditions:
    """This machine and these packages now. Folders are left out of the `command` words: they are nobody's business."""
    kernels = "in C" if implementation() == "c" else "in NumPy"  # many times slower, and nothing else would tell
    versions = {name: version for name in PACKAGES if (version := installed_version(name)) is not None}
    return Conditions(
        command=shlex.join(map(_without_folder, command)),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_bytes=total_memory(),
        system=system_name(),
        versions={"persona-edge": __version__, "kernels": kernels, "python": platform.python_version(), **versions},
    )


def _without_folder(argument: str) -> str:
    """`--pack=/home/me/a.maskpack` as `--pack=a.maskpack`."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_without_folder(value)}"
    return Path(argument).name if os.sep in argument else argument
