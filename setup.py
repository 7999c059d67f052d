"""Builds the native libraries with CMake; everything else about the package is in pyproject.toml.

The CUDA kernels are built where nvcc is on PATH, or in CUDA_HOME; FASTATTN_CUDA=0 leaves them out,
FASTATTN_CUDA=1 insists on them. The CPU library needs a C++17 compiler, CMake, ninja and pybind11,
and never torch. What is missing is said in a sentence before CMake says it in fifty lines.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
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


def find_nvcc() -> str | None:
    """Path of the CUDA compiler if the CUDA kernels are to be built."""
    wanted = os.environ.get("FASTATTN_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"fastattn: FASTATTN_CUDA must be 0, 1 or unset; got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None and wanted == "1":
        sys.exit("fastattn: FASTATTN_CUDA=1 needs nvcc on PATH or in CUDA_HOME/bin; there is none")
    return nvcc


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
            *([f"-DCMAKE_CUDA_COMPILER={NVCC}", "-DFASTATTN_CUDA=ON"] if NVCC else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        parallel = [f"-j{self.parallel}"] if self.parallel else []
        target = ["--target", ext.name.rpartition(".")[2]]
        subprocess.run([configure[0], "--build", str(build), *target, *parallel], check=True)


NVCC = find_nvcc()
libraries = ["fastattn._native", *(["fastattn._cuda"] if NVCC else [])]

setup(
    ext_modules=[Extension(name, sources=[]) for name in libraries],
    cmdclass={"build_ext": CMakeBuild},
)
