"""nvcc compiles the real thing, and no kernel uses more registers than the table here says.

Registers decide how many blocks share a multiprocessor; a spill is memory traffic inside the inner
loop. Both creep in unseen where there is no GPU to time the kernels on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulation.build import DTYPES, FORMS, ROOT

# Most registers of a thread, by kernel, over float32, bfloat16, float16 and both architectures;
# nothing spills. 128 registers let four blocks of 128 threads share a multiprocessor.
REGISTERS = {
    "step_kernel": 80,
    "recurrent_kernel": 128,
    "sum_kernel": 128,
    "fold_keys_kernel": 40,
    "fold_queries_kernel": 40,
    "fold_segments_kernel": 40,
    "noncausal_kernel": 128,
    "emit_kernel": 128,
    "causal_kernel": 128,
    "query_gradient_kernel": 128,
    "key_gradient_kernel": 168,
}
ARCHITECTURES = ("80", "90")
FUNCTION = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@pytest.fixture
def backend() -> None:
    """Nothing is emulated here."""


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("form", FORMS)
def test_registers_and_spills(form: str, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None

    def compile_for(name: str) -> str:
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
        source = ROOT / "csrc" / "cuda" / f"{form}.cu"
        done = subprocess.run(
            [
                *(nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"),
                *(*codes, f"-DFASTATTN_DTYPE={DTYPES[name]}", "-c"),
                *(str(source), "-o", str(tmp_path / f"{form}_{name}.o")),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(compile_for, DTYPES))
    seen, wrong = set(), []
    for dtype, log in zip(DTYPES, logs, strict=True):
        for symbol, arch, stack, stores, loads, used in FUNCTION.findall(log):
            kernel = next(name for name in REGISTERS if re.search(rf"\d{name}", symbol))
            seen.add((kernel, arch))
            if int(used) > REGISTERS[kernel] or int(stores) or int(loads):
                wrong.append(
                    f"{kernel} {dtype} sm_{arch}: {used} registers, stack {stack}, "
                    f"spills {stores} and {loads}"
                )
    assert {arch for _, arch in seen} == set(ARCHITECTURES)
    assert not wrong, "\n".join(wrong)
