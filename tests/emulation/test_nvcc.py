"""nvcc compiles the real thing: the module imports without a driver, and no kernel uses more
registers than the table here says.

Registers decide how many blocks share a multiprocessor; a spill is memory traffic inside the inner
loop. Both creep in unseen where there is no GPU to time the kernels on.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from fastattn.backends import cuda, native
from tests.emulation.build import ROOT, locked

# Most registers of a thread, by kernel, over what is compiled here; nothing spills. Shared memory
# has room for three blocks of 128 threads, or one of 256, so 168 are no limit. Of what only
# FASTATTN_CUDA=1 compiles, width 32 in bfloat16 on sm_80 takes most: 225, without spilling.
REGISTERS = {
    "step_kernel": 80,
    "recurrent_kernel": 128,
    "sum_kernel": 128,
    "fold_keys_kernel": 40,
    "fold_queries_kernel": 40,
    "fold_segments_kernel": 40,
    "noncausal_kernel": 168,
    "emit_kernel": 128,
    "noncausal_gradient_kernel": 168,
    "causal_kernel": 168,
    "causal_walk_kernel": 200,
    "query_gradient_kernel": 128,
    "key_gradient_kernel": 168,
}
ARCHITECTURES = ("80", "90")
# bfloat16 for both; the others, which only convert otherwise, for one each.
# FASTATTN_TEST_KERNELS=1 compiles all for both.
OF_TYPE = {"float": "80", "__half": "90"} if "FASTATTN_TEST_KERNELS" not in os.environ else {}
# Each width is compiled for some dtype; FASTATTN_CUDA=1 compiles all for all.
WIDTHS = {"16": "64", "32": "128"}
FUNCTION = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def find_tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def build(nvcc: str) -> Path:
    """Folder with the module and the compiler's log, built if the sources have changed."""
    digest = hashlib.sha256(f"{nvcc} {sys.version} {OF_TYPE}".encode())
    for path in (ROOT / "CMakeLists.txt", Path(__file__), *sorted((ROOT / "csrc").rglob("*.*"))):
        digest.update(f"{path.name}\0{path.read_text()}\0".encode())
    folder = ROOT / "build" / "nvcc" / digest.hexdigest()[:16]
    with locked("nvcc"):
        if not (folder / "log").exists():
            shutil.rmtree(folder, ignore_errors=True)
            configure = [
                *(find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
                *("-DFASTATTN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"),
                "-DCMAKE_CUDA_FLAGS=-Xptxas -v",
                f"-DFASTATTN_CUDA_ARCHITECTURES={';'.join(f'{x}-real' for x in ARCHITECTURES)}",
                *(f"-DFASTATTN_CUDA_ARCHITECTURES_{x}={a}-real" for x, a in OF_TYPE.items()),
                *(f"-DFASTATTN_CUDA_WIDTHS_{bits}_BIT={x}" for bits, x in WIDTHS.items()),
            ]
            run(configure)
            log = run([configure[0], "--build", str(folder), "--target", "_cuda", "-j2"])
            (folder / "log").write_text(log)
    return folder


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built() -> Path:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    return build(nvcc)


@pytest.fixture
def backend() -> None:
    """Nothing is emulated here."""


def test_registers_and_spills(built: Path) -> None:
    seen, wrong = set(), []
    for symbol, arch, stack, stores, loads, used in FUNCTION.findall((built / "log").read_text()):
        kernel = next(name for name in REGISTERS if re.search(rf"\d{name}", symbol))
        seen.add((kernel, arch))
        if int(used) > REGISTERS[kernel] or int(stores) or int(loads):
            wrong.append(
                f"{symbol} sm_{arch}: {used} registers, stack {stack}, spills {stores} and {loads}"
            )
    assert seen == {(kernel, arch) for kernel in REGISTERS for arch in ARCHITECTURES}
    assert not wrong, "\n".join(wrong)


def test_the_module_imports_without_a_driver_and_its_errors_are_exceptions(built: Path) -> None:
    """In a process of its own; where there is a GPU, that has none to offer."""
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "cuda = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cuda)\n"
        "print(cuda.INTERFACE, cuda.MAX_DIM, cuda.SEGMENT_TOKENS)\n"
        "problem = cuda.Problem(batch=2, num_heads=3, num_kv_heads=3, query_length=5,\n"
        "    key_length=5, head_dim=64, value_dim=64, num_sequences=0, dtype='bfloat16',\n"
        "    feature_map='elu', form='chunked', is_causal=True, normalize=True,\n"
        "    return_state=False, needs_grad=False, scale=1.0, eps=1e-6)\n"
        "print(cuda.workspace_size(problem, True, 232448, 132))\n"
        "numbers = (0, 0, 232448, 132, *[0] * 22, *[0] * 8)\n"
        "cuda.forward(problem, numbers)\n"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, str(next(built.glob("_cuda*.so")))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    constants = f"{native.INTERFACE} {cuda._MAX_DIM} {cuda._SEGMENT_TOKENS}"
    assert done.stdout.splitlines() == [constants, "64"], done.stderr
    assert re.search(
        r"RuntimeError: CUDA kernel \S+ failed on causal elu bfloat16 problem: batch 2, heads 3/3, "
        r"tokens 5 x 5, sizes 64 and 64: \w+",
        done.stderr,
    )
