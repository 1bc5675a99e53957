"""A folder as a user has it, with the real 135M model in it, and the real program run there on less data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.program import LISTEN_TO_CTRL_C, PROGRAM

CONTRASTS = """\
{"axis": "tidiness", "positive": "tidy", "negative": "messy"}
{"prompt": "What does your desk look like?", "positive": "It is clear, with every pen in its place.", "negative": "It is a heap of papers, cups and old mail."}
{"prompt": "How do you pack for a trip?", "positive": "I pack from a list and fold every shirt.", "negative": "I grab whatever and stuff it in a bag."}
{"prompt": "What do you do after cooking?", "positive": "I wash up at once and wipe the counters.", "negative": "I leave the pans in the sink for days."}
{"prompt": "How do you keep your files?", "positive": "I keep them in folders with clear labels.", "negative": "I keep them wherever they happen to land."}
{"prompt": "Describe your wardrobe.", "positive": "My clothes hang sorted by season.", "negative": "My clothes lie on a chair and the floor."}
{"prompt": "What happens to your receipts?", "positive": "I file them by month in a small box.", "negative": "I lose them in pockets and in drawers."}
{"prompt": "How does your garage look?", "positive": "It is swept, with the tools on hooks.", "negative": "It is buried, with the tools under junk."}
{"prompt": "What is your morning like?", "positive": "I make the bed and put things in order.", "negative": "I dig for my keys in a pile of clothes."}
"""  # noqa: E501  # one contrast per line is the format
LESS_DATA = """
import sys
from persona_edge import calibration
prompts, texts = calibration.neutral_prompts()[:12], calibration.neutral_texts()[:12]
calibration.neutral_prompts, calibration.neutral_texts = lambda: prompts, lambda: texts
calibration.SECONDS_BETWEEN_CHECKPOINTS = 0
settings = calibration.CalibrationSettings
def small(**given):
    return settings(max_batch_tokens=256, neutral_tokens=64, answer_tokens=12, **given)
def announced(collect):
    def one_batch(*arguments, **given):
        print("BATCH", file=sys.stderr, flush=True)
        return collect(*arguments, **given)
    return one_batch
calibration.CalibrationSettings = small
calibration.collect_damage = announced(calibration.collect_damage)
calibration.collect_drift = announced(calibration.collect_drift)
calibration.collect_margins = announced(calibration.collect_margins)
"""
NO_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
HIDE = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in "{package}".split() else super().find_spec(name, path, target)
sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


@dataclass(frozen=True)
class Workplace:
    """A folder with the model, the contrasts, a cache of its own, and the pack once it is exported."""

    folder: Path
    model: Path
    contrasts: Path
    pack: Path
    cache: Path

    @classmethod
    def around(cls, name: str, folder: Path, cache: Path) -> Workplace:
        """The contrasts in `folder`, where the model `<name>.gguf` is still to come."""
        contrasts = folder / "tidiness.jsonl"
        contrasts.write_text(CONTRASTS, encoding="utf-8")
        return cls(folder, folder / f"{name}.gguf", contrasts, folder / f"{name}.tidiness.maskpack", cache)

    def command(self, *arguments: str | Path, prelude: str = "") -> list[str]:
        """The program with `arguments`; the Python code `prelude` runs before it."""
        return [sys.executable, "-c", prelude + PROGRAM, *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the cache of the folder."""
        return {**os.environ, "PERSONA_EDGE_CACHE": str(self.cache)}

    def run(self, *arguments: str | Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
        """What the program with `arguments` said."""
        return subprocess.run(
            self.command(*arguments, prelude=prelude),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def ask(self, *more: str | Path, model: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One message to the model, or to another `model`."""
        return self.run("chat", "--model", model or self.model, "--message", "Hello", *more)

    def export_arguments(self, *more: str | Path) -> list[str | Path]:
        """An export of the contrasts."""
        fixed: list[str | Path] = ["--model", self.model, "--personas", self.contrasts]
        return ["export", *fixed, "--budget", "0.01", "--dtype", "float32", *more]

    def files(self) -> dict[str, int]:
        """Name and time of change of every file beside the model: what must not change when something fails."""
        return {str(path): path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Exported:
    """The workplace after an export that was interrupted and then resumed."""

    place: Workplace
    interrupted: subprocess.CompletedProcess[str]
    files_after_interrupt: tuple[str, ...]
    resumed: subprocess.CompletedProcess[str]


def interrupt_after_checkpoint(place: Workplace) -> subprocess.CompletedProcess[str]:
    """Start the export and press Ctrl-C once the first checkpoint lies in the cache."""
    command = place.command(*place.export_arguments(), prelude=LISTEN_TO_CTRL_C + LESS_DATA)
    with subprocess.Popen(
        command,
        env=place.environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        while process.poll() is None and not list(place.cache.rglob("*.partial")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


def n_batches(result: subprocess.CompletedProcess[str]) -> int:
    """How many batches the program computed with LESS_DATA."""
    return result.stderr.count("BATCH\n")


def check_one_line(result: subprocess.CompletedProcess[str], exit_code: int, *parts: str) -> None:
    """The program said what is wrong in one line, and nothing else."""
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("persona-edge: error: ")
    for part in parts:
        assert part in lines[0]
