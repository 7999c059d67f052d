"""Builds the native libraries with CMake; everything else about the package is in pyproject.toml.

The CUDA kernels are built for the GPUs of this machine, where it has one, and nvcc. They take
minutes, so building them for all architectures, anywhere, has to be asked for: FASTATTN_CUDA=1.
FASTATTN_CUDA=0 leaves them out. The CPU library needs a C++17 compiler, CMake, ninja and pybind11,
and never torch. What is missing is said in a sentence before CMake says it in fifty lines.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, package: str, folder: str) -> str:
    """Path of a build tool: from its Python package if installed (even if not on PATH), or PATH."""
    try:
        candidate = Path(getattr(importlib.import_module(package), folder)) / name
        if candidate.exists():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if found is None:
        sys.exit(f"fastattn: building needs {name}, which is not installed: pip install {package}")
    return found


def check_toolchain() -> None:
    """Exits with one clear sentence if the compiler or Python's headers are missing."""
    wanted = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in wanted):
        sys.exit(
            f"fastattn: building needs a C++17 compiler, and there is no {wanted[0]} here. "
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX."
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        sys.exit(
            f"fastattn: building needs Python's headers, and {header} does not exist. "
            "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install "
            "python3-devel)."
        )


@dataclass(frozen=True)
class CUDABuild:
    """Whether and for what the CUDA kernels are built; `fastattn info` shows `why_not`."""

    nvcc: str = ""
    architectures: str = ""  # as CMake lists them; "": all that CMakeLists.txt names
    why_not: str = ""


OLDEST_CAPABILITY = 80


def plan_cuda(environment: Mapping[str, str] = os.environ) -> CUDABuild:
    """What FASTATTN_CUDA, the compiler and the GPUs of this machine ask for."""
    wanted = environment.get("FASTATTN_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"fastattn: FASTATTN_CUDA must be auto, 0 or 1; got {wanted!r}")
    if wanted == "0":
        return CUDABuild(why_not="FASTATTN_CUDA=0 was set at install")
    home = environment.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else environment.get("PATH"))
    if wanted == "1":
        if nvcc is None:
            sys.exit(
                "fastattn: FASTATTN_CUDA=1 needs nvcc on PATH or in CUDA_HOME/bin; there is none"
            )
        return CUDABuild(nvcc)
    if nvcc is None:
        return CUDABuild(why_not="there was no nvcc at install")
    found = gpu_capabilities()
    if not found:
        return CUDABuild(why_not="nvcc was found at install, but no NVIDIA GPU")
    usable = sorted({x for x in found if x >= OLDEST_CAPABILITY})
    if not usable:
        return CUDABuild(
            why_not=f"the GPU at install was an sm_{max(found)}, and they need sm_80 or newer"
        )
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    unknown = [x for x in usable if f"sm_{x}" not in known.stdout.split()]
    if unknown:
        return CUDABuild(why_not=f"nvcc at install did not know the GPU, an sm_{unknown[0]}")
    return CUDABuild(nvcc, ";".join(map(str, usable)))


def gpu_capabilities() -> list[int]:
    """Compute capabilities of the GPUs that the driver offers, 90 for 9.0; [] without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, part = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    capabilities = []
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        parts = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            parts.append(part.value)
        capabilities.append(10 * parts[0] + parts[1])
    return capabilities


class CMakeBuild(build_ext):
    """Configures and builds CMake's targets into the place where setuptools wants them."""

    def build_extension(self, ext: Extension) -> None:
        """One call per extension; an editable install puts the library beside the sources."""
        check_toolchain()
        pybind11 = importlib.import_module("pybind11")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One folder per interpreter, so that a rebuild compiles only what has changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        if not os.access(ROOT, os.W_OK):
            build = Path(self.build_temp).resolve()
        # Build isolation puts tools and pybind11 into a new folder each time, so nothing that an
        # earlier configuration remembered about them may be kept; objects are.
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            find_tool("cmake", "cmake", "CMAKE_BIN_DIR"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *cuda_options(plan_cuda()),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        parallel = [f"-j{self.parallel}"] if self.parallel else []
        target = ["--target", ext.name.rpartition(".")[2]]
        subprocess.run([configure[0], "--build", str(build), *target, *parallel], check=True)


def cuda_options(plan: CUDABuild) -> list[str]:
    """For CMake."""
    if not plan.nvcc:
        return [f"-DFASTATTN_CUDA_NOTE={plan.why_not}"]
    chosen = plan.architectures
    return [
        *(f"-DCMAKE_CUDA_COMPILER={plan.nvcc}", "-DFASTATTN_CUDA=ON"),
        *([f"-DFASTATTN_CUDA_ARCHITECTURES={chosen}"] if chosen else []),
    ]


if __name__ == "__main__":
    libraries = ["fastattn._native", *(["fastattn._cuda"] if plan_cuda().nvcc else [])]
    setup(
        ext_modules=[Extension(name, sources=[]) for name in libraries],
        cmdclass={"build_ext": CMakeBuild},
    )
