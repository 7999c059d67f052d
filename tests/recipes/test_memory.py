"""Freed memory stays with the process, until it is scarce."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import resource, torch
from fastattn.recipes.memory import give_back, keep_freed_memory

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 2**20

assert keep_freed_memory()
before = resident()
tensors = [torch.ones(2**20) for _ in range(64)]  # of 4 MiB
last = tensors[-1]  # above all that is freed, so a heap can't just shrink
del tensors
kept = resident() - before
assert give_back() and float(last.sum()) == 2**20
left = resident() - before
assert kept > 200 and left < 50, (kept, left)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator is glibc's")
def test_freed_memory_is_kept_until_given_back() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
