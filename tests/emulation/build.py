"""Compiles csrc/cuda with g++ and the headers beside this file, and loads the result.

The same sources, nothing generated from them. Objects are kept in build/emulation under a name made
of everything that went in, so an unchanged tree compiles nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "emulation"
DTYPES = {"float": "float", "bf16": "__nv_bfloat16", "half": "__half"}
# Widths that kernels are compiled for besides 0, any: fewer than on GPUs, each one somewhere.
WIDTHS = {"float": (32, 128), "bf16": (64,), "half": (64,)}
FORMS = ("step", "noncausal", "causal")


def device_objects() -> dict[str, list[str]]:
    """What is compiled of the .cu files: names of objects, and their definitions and source."""
    objects = {}
    for form in FORMS:
        for name, dtype in DTYPES.items():
            for width in (0, *(() if form == "step" else WIDTHS[name])):
                objects[object_name(form, name, width)] = [
                    f"-DFASTATTN_DTYPE={dtype}",
                    f"-DFASTATTN_WIDTH={width}",
                    f"csrc/cuda/{form}.cu",
                ]
    return objects


def object_name(form: str, dtype: str, width: int) -> str:
    return f"{form}_{dtype}_{width}.o"


_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DFASTATTN_EMULATION", "-w"]
# -fsanitize=thread puts a call before every load and store; memory.cpp has the functions called.
_DEVICE = [
    *("-x", "c++", "-O2", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-fno-tree-vectorize"),
]


Edit = tuple[str, str, str]  # a file in csrc/cuda, text that occurs there once, its replacement


@cache
def library(edited_object: str = "", edits: tuple[Edit, ...] = ()) -> Any:
    """The emulated module; with faults planted into one of its objects if asked."""
    path = build(edited_object, edits)
    # A name of its own: pybind11 hands out one module per name.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory(module: Any) -> ctypes.CDLL:
    """The emulator's own functions: which memory a call may touch."""
    functions = ctypes.CDLL(module.__file__)
    functions.emulation_add_memory.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool)
    return functions


def build(edited_object: str = "", edits: tuple[Edit, ...] = ()) -> Path:
    """Path of the library, compiled if need be; all but the edited object are the sound ones."""
    sources = {
        path.relative_to(ROOT): path.read_text()
        for folder in ("csrc", "csrc/cuda", "tests/emulation", "tests/emulation/include")
        for path in sorted((ROOT / folder).iterdir())
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") or path == Path(__file__)
    }
    for file, text, replacement in edits:
        key = Path("csrc/cuda") / file
        assert sources[key].count(text) == 1, f"{text!r} must occur once in {file}"
        sources[key] = sources[key].replace(text, replacement)
    digest = hashlib.sha256(f"{sysconfig.get_config_var('SOABI')} {edited_object}".encode())
    for path, text in sources.items():
        digest.update(f"{path}\0{text}\0".encode())
    folder = BUILD / digest.hexdigest()[:16]
    result = folder / "_cuda_emulated.so"
    sound = build().parent if edits else folder
    with locked("emulation"):
        if not result.exists():
            _compile(folder, sources, result, edited_object, sound)
    return result


def _compile(
    folder: Path, sources: Mapping[Path, str], result: Path, edited_object: str, sound: Path
) -> None:
    for path, text in sources.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    compiler = os.environ.get("CXX", "g++")
    includes = [
        *("-I", str(folder / "tests/emulation/include")),
        *("-I", sysconfig.get_path("include"), "-I", pybind11.get_include()),
    ]
    widths = [
        f"-DFASTATTN_WIDTHS_{size}_BIT={','.join(map(str, WIDTHS[name]))}"
        for size, name in ((16, "bf16"), (32, "float"))
    ]
    commands = {
        "bindings.o": ["-O1", *widths, str(folder / "csrc/cuda/bindings.cpp")],
        "emulator.o": ["-O2", str(folder / "tests/emulation/emulator.cpp")],
        "memory.o": ["-O2", str(folder / "tests/emulation/memory.cpp")],
    }
    for name, (*definitions, source) in device_objects().items():
        commands[name] = [*_DEVICE, *definitions, str(folder / source)]

    def run(name: str) -> None:
        output = str(folder / name)
        _run([compiler, *_COMMON, *includes, *commands[name], "-c", "-o", output])

    own = [edited_object] if edited_object else list(commands)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, own))
    objects = [str((folder if name in own else sound) / name) for name in commands]
    partial = result.with_suffix(".partial")
    _run([compiler, "-shared", "-o", str(partial), *objects])
    partial.rename(result)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:8000]}")


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process compiles, the others wait and find it done."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
