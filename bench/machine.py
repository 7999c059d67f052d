"""On what a run was made: numbers without it mean nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import fastattn

_PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "pytorch-fast-transformers",
    "flash-linear-attention",
)


def describe(threads: int) -> dict[str, object]:
    """Machine, versions and when, as plain data."""
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": _isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastattn": fastattn.__version__,
        "commit": _commit(),
        "versions": _versions(),
    }


def processor() -> str:
    """The processor's name, as precisely as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _isa() -> str | None:
    try:
        from fastattn import _native
    except ImportError:
        return None
    return str(_native.active_isa())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the sources, with a + where files differ from it; None outside git."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
