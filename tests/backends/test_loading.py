"""A backend that is not there says why, and a library of another time is refused, not called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastattn import backends
from fastattn.backends import native

ROOT = Path(__file__).parents[2]


def library(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = f"{name}.so"
    vars(module).update(attributes)
    return module


def test_a_stale_cuda_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastattn._cuda", library("_cuda", INTERFACE=0))
    reason = backends.load.__wrapped__("cuda")
    assert reason == (
        "_cuda.so was built from other sources (its interface is 0, this is "
        f"{native.INTERFACE}); rebuild it with make, or pip install ."
    )


def test_a_stale_cpu_library_is_refused() -> None:
    """One from before there was a number, in a process that has loaded no other."""
    script = (
        "import sys, types, warnings\n"
        "stale = types.ModuleType('fastattn._native')\n"
        "stale.__file__ = '_native.so'\n"
        "sys.modules['fastattn._native'] = stale\n"
        "import torch, fastattn\n"
        "warnings.simplefilter('error')\n"
        "x = torch.ones(1, 1, 3, 4)\n"
        "fastattn.linear_attention(x, x, x)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "slow reference" in done.stderr
    assert "_native.so was built from other sources" in done.stderr
    assert "rebuild it with make, or pip install ." in done.stderr


def test_cuda_that_was_not_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    note = "nvcc was found at install, but no NVIDIA GPU"
    monkeypatch.setitem(sys.modules, "fastattn._cuda", None)
    known = library("_native", INTERFACE=native.INTERFACE, CUDA_NOTE=note)
    monkeypatch.setitem(sys.modules, "fastattn._native", known)
    reason = backends.load.__wrapped__("cuda")
    assert reason == (
        f"the CUDA kernels are not built: {note}; FASTATTN_CUDA=1 pip install . builds them"
    )
