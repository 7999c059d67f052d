"""Every instruction set that this machine can run, each in a process of its own.

The library chooses once, when it is loaded, from FASTATTN_CPU_ISA.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_backend

ROOT = Path(__file__).parents[2]
NAMES = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
FILES = ["test_accuracy.py", "test_masks.py", "test_states.py"]
# A compact choice: odd and even sizes, both kinds, every map, both 16-bit types, steps.
CHOICE = (
    "cpu and (test_feature_maps or test_16_bit or test_float64 or test_grouped or test_forms or "
    "test_lengths or leaks or steps or packed or (test_head_sizes and (3 or 60 or 256)))"
)


@pytest.fixture(scope="module")
def runnable() -> list[str]:
    require_backend("cpu")
    from fastattn import _native

    return list(_native.isas())


def python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "FASTATTN_CPU_ISA": isa,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", NAMES)
def test_the_op_suite_passes(isa: str, runnable: list[str]) -> None:
    if isa not in runnable:
        pytest.skip(f"not on this machine, which runs {', '.join(runnable)}")
    files = [f"tests/ops/{name}" for name in FILES]
    done = python(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
                  *files, "-k", CHOICE)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", NAMES)
def test_explain_names_the_instruction_set(isa: str, runnable: list[str]) -> None:
    if isa not in runnable:
        pytest.skip(f"not on this machine, which runs {', '.join(runnable)}")
    program = "import torch, fastattn; q = torch.ones(1, 1, 2, 4); print(fastattn.explain(q, q, q))"
    done = python(isa, "-c", program)
    assert f"({isa})" in done.stdout, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_refused(runnable: list[str]) -> None:
    done = python(
        "mmx",
        "-c",
        "import torch, fastattn; fastattn.linear_attention(*[torch.ones(1, 1, 2, 4)] * 3)",
    )
    assert done.returncode != 0
    assert "FASTATTN_CPU_ISA" in done.stderr
    assert "'mmx'" in done.stderr
    assert runnable[0] in done.stderr
