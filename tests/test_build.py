"""What setup.py decides to build: CUDA only where it will run, or where it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int* count) { *count = sizeof(capability) / sizeof(*capability); return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? capability[device] / 10 : capability[device] % 10;
  return 0;
}
"""


def plan(folder: Path, setting: str | None, nvcc: bool, gpus: tuple[int, ...]) -> str:
    """What is decided where there is an nvcc for sm_80 and sm_90, and a driver with GPUs."""
    if nvcc:
        compiler = folder / "nvcc"
        compiler.write_text("#!/bin/sh\necho sm_80\necho sm_90\n")
        compiler.chmod(0o755)
    if gpus:
        source = folder / "driver.c"
        source.write_text(f"int capability[] = {{{', '.join(map(str, gpus))}}};{DRIVER}")
        library = folder / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    environment = os.environ | {"PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    for variable in ("FASTATTN_CUDA", "CUDA_HOME"):
        environment.pop(variable, None)
    if setting is not None:
        environment["FASTATTN_CUDA"] = setting
    script = "import runpy; print(runpy.run_path('setup.py', run_name='setup')['plan_cuda']())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("setting", "nvcc", "gpus", "expected"),
    [
        (None, True, (90,), "architectures='90', why_not=''"),
        ("auto", True, (90, 80, 90), "architectures='80;90', why_not=''"),
        ("auto", True, (), "why_not='nvcc was found at install, but no NVIDIA GPU'"),
        ("auto", False, (90,), "why_not='there was no nvcc at install'"),
        ("auto", True, (75,), "an sm_75, and they need sm_80 or newer"),
        ("auto", True, (121,), "nvcc at install did not know the GPU, an sm_121"),
        ("0", True, (90,), "why_not='FASTATTN_CUDA=0 was set at install'"),
        ("1", True, (), "architectures='', why_not=''"),
        (
            "1",
            False,
            (90,),
            "FASTATTN_CUDA=1 needs nvcc on PATH or in CUDA_HOME/bin; there is none",
        ),
        ("yes", True, (90,), "FASTATTN_CUDA must be auto, 0 or 1; got 'yes'"),
    ],
)
def test_cuda_is_built_where_it_will_run(
    tmp_path: Path, setting: str | None, nvcc: bool, gpus: tuple[int, ...], expected: str
) -> None:
    if gpus and not shutil.which("cc"):
        pytest.skip("no C compiler to make a driver with")
    told = plan(tmp_path, setting, nvcc, gpus)
    assert expected in told
    assert ("nvcc='/" in told) == ("why_not=''" in told)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_wheel_from_a_source_distribution_runs_with_torch_alone(tmp_path: Path) -> None:
    """Where there is no compiler, and no package of any extra."""
    source, out, site = tmp_path / "source", tmp_path / "out", tmp_path / "site"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)
    environment = os.environ | {"FASTATTN_CUDA": "0"}
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out]
    subprocess.run([*build, next(out.glob("*.tar.gz"))], check=True, env=environment)
    install = [*pip, "install", "--no-deps", "--target", site, next(out.glob("*.whl"))]
    subprocess.run(install, check=True)
    script = (
        "import sys\n"
        "for name in ('transformers', 'safetensors', 'datasets', 'rich', 'typer', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import torch, fastattn\n"
        f"assert fastattn.__file__.startswith({str(site)!r}), fastattn.__file__\n"
        "q, k, v = torch.rand(3, 1, 2, 600, 32).unbind()\n"
        "for causal in (False, True):\n"
        "    got, true = (fastattn.linear_attention(q, k, v, is_causal=causal, backend=backend)\n"
        "                 for backend in ('cpu', 'reference'))\n"
        "    torch.testing.assert_close(got, true)\n"
    )
    user = {"PYTHONPATH": str(site), "PATH": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=user, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
