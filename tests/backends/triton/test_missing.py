"""Without Triton, or without a GPU that it can use: a reason, never a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ABSENT = "import sys; sys.modules['triton'] = None\n"
EXPLAIN = """
import torch, fastattn
x = torch.randn(1, 2, 9, 8)
explanation = fastattn.explain(x, x, x)
assert explanation.backend != "triton"
print({c.backend: c.why_not for c in explanation.candidates}["triton"])
assert fastattn.linear_attention(x, x, x).shape == x.shape
try:
    fastattn.linear_attention(x, x, x, backend="triton")
except ValueError as error:
    print(error)
"""


def python(code: str) -> str:
    environment = {"TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_missing_triton_is_a_reason() -> None:
    reason, error = python(ABSENT + EXPLAIN).strip().splitlines()
    assert "riton" in reason
    assert "import" in reason or "installed" in reason or "No module" in reason
    assert "backend='triton' cannot" in error


def test_an_old_triton_is_a_reason() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    old = "import triton\ntriton.__version__ = '3.3.1'\ndel triton.knobs\n"
    reason, error = python(old + EXPLAIN).strip().splitlines()
    assert "3.6 to 3.9 are known to work" in reason and "this is Triton 3.3.1" in reason
    assert "backend='triton' cannot" in error


def test_cpu_tensors_are_a_reason() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    reason, error = python(EXPLAIN).strip().splitlines()
    assert "its kernels run on GPUs; the tensors are on 'cpu'" in reason
    assert "its kernels run on GPUs" in error


def test_kernels_are_shown_by_a_command() -> None:
    """``fastattn info --kernels`` with a single call shipped, so that it takes seconds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("typer", reason="typer, which the command line needs, is not installed")
    code = """
from fastattn.backends.triton import aot
aot.SHIPPED = (aot.Call(64, is_causal=True, passes=("step",)),)
from fastattn.cli import main
import sys
sys.argv = ["fastattn", "info", "--kernels", *OPTIONS]
main()
"""
    rows = json.loads(python("OPTIONS = ['--json']\n" + code))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_86", "sm_90", "sm_100", "gfx942"}
    assert all(row["kernel"] == "recurrent" and row["registers"] > 0 for row in rows)
    table = python("OPTIONS = []\n" + code)
    assert "recurrent" in table
    assert "gfx942" in table


def test_kernels_without_triton_say_so() -> None:
    pytest.importorskip("typer", reason="typer, which the command line needs, is not installed")
    code = ABSENT + "from fastattn.cli import main\nsys.argv = ['fastattn', 'info', '--kernels']\n"
    done = subprocess.run([sys.executable, "-c", code + "main()"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Triton is not installed" in done.stderr
