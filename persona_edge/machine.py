"""What this machine offers, asked without any package: processor, memory, compiler. Unknown is None, never a guess."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import sysconfig
from pathlib import Path

__all__ = [
    "available_memory",
    "compiler",
    "cpu_flags",
    "cpu_model",
    "release_freed_memory",
    "set_thread_waiting",
    "system_name",
    "total_memory",
    "usable_cores",
]

_QUIET = 0.25  # running processes per core, averaged over a minute
_SHORT_SPIN = "30000"  # rounds, some tens of microseconds: longer than most of the gaps between parallel regions
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_thread_waiting() -> None:
    """How OpenMP's threads wait for each other: asleep, after a short spin where the machine has nothing else to do.

    Their own way, a long spin, costs a factor of ten on a machine that is busy elsewhere; to sleep at once costs a
    quarter where it is not (docs/method.md). Takes effect before OpenMP is loaded; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else usable_cores()
    if load < _QUIET * usable_cores():
        os.environ.setdefault("GOMP_SPINCOUNT", _SHORT_SPIN)


def cpu_flags() -> frozenset[str] | None:
    """The processor's feature flags as Linux names them; None where they cannot be read."""
    text = _read(Path("/proc/cpuinfo"))
    for line in (text or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def cpu_model() -> str:
    """The processor as it calls itself, for a record of where something was measured."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def system_name() -> str:
    """The operating system with its version, and the machine's kind."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = f"{platform.system()} {platform.release()}"
    return f"{name}, {platform.machine()}"


def total_memory() -> int | None:
    """Bytes of memory that the machine has; None where that cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def available_memory() -> int | None:
    """Bytes that can be used without swapping, within a container's limit; None where that cannot be told."""
    available = _meminfo_available(_read(Path("/proc/meminfo")) or "")
    limit, used = _read(_CGROUP_LIMIT), _read(_CGROUP_USED)
    if available is not None and limit is not None and used is not None and limit.strip().isdecimal():
        return max(0, min(available, int(limit) - int(used)))
    return available


def _meminfo_available(text: str) -> int | None:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def compiler() -> str | None:
    """The C compiler that building an extension would find; None when there is none on the path."""
    configured = str(sysconfig.get_config_var("CC") or "").split()
    usual = ["cl"] if platform.system() == "Windows" else ["cc", "gcc", "clang"]
    names: list[str] = [os.environ.get("CC", ""), *configured[:1], *usual]
    for name in names:
        if name and shutil.which(name):
            return name
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def release_freed_memory() -> None:
    """Give freed memory back to the system where the C library is glibc; elsewhere do nothing.

    Batches of many different lengths fragment glibc's heap: without this, calibration grows by 40 MB a batch.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
