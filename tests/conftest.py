"""Fixtures that every test may use: a backend by name, a seed that a failure prints, poison."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # helpers import as tests.<folder>.<module>

from fastattn import backends
from tests import interpreter

# Which backends the tests of the ops run on. Triton's kernels run through its interpreter, which
# has to be on before triton is imported, so they take a process of their own (see Makefile):
# TRITON_INTERPRET=1 FASTATTN_TEST_BACKENDS=triton pytest tests/ops tests/backends/triton
BACKENDS = os.environ.get("FASTATTN_TEST_BACKENDS", "reference,cpu").split(",")

# On a machine with a GPU, the same tests on its tensors, by the backends that have kernels for it:
# FASTATTN_TEST_DEVICE=cuda FASTATTN_TEST_BACKENDS=triton,cuda pytest tests/ops
DEVICE = os.environ.get("FASTATTN_TEST_DEVICE", "cpu")
INTERPRETED = BACKENDS == ["triton"] and DEVICE == "cpu"
KERNELS_ONLY = not {"reference", "cpu"} & set(BACKENDS)
# What the interpreter leaves out: numpy needs minutes for these, or copies 8 GB of address space.
TOO_LARGE = (
    "test_64k_tokens_do_not_drift",
    "test_one_graph_serves_every_length",
    "test_16_bit_head_sizes[triton-bfloat16-256",
    "test_16_bit_head_sizes[triton-float16-256",
    "split4",
)


if INTERPRETED:
    interpreter.replace_once()
    interpreter.check_overflow_at_once()
    interpreter.remember_types()
    interpreter.cut_to_tf32()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With a GPU's kernels alone, only what runs on a backend, and nothing in float64, which they
    don't have; interpreted, nothing large either."""
    if not KERNELS_ONLY:
        return
    # A file serves as the memory of the test of large offsets; tests/gpu has its like.
    unwanted = ["float64", "gradcheck", "tests/ops/test_layouts.py::test_offsets_beyond_32_bits"]
    if INTERPRETED:
        unwanted += TOO_LARGE

    def wanted(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        given = params.values()
        if any(part in item.nodeid for part in unwanted) or any(x is torch.float64 for x in given):
            return False
        dims = (params.get("dim", 0), *params.get("dims", ()))
        if DEVICE != "cpu" and params.get("backend") == "cpu":  # named by a test itself
            return False
        if params.get("backend") == "cuda" and max(dims) > 128:  # more than it offers
            return False
        of_kernels = any(folder in item.nodeid for folder in ("backends/triton", "tests/gpu"))
        return of_kernels or "backend" in getattr(item, "fixturenames", ())

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(autouse=DEVICE != "cpu")
def _on_device() -> Iterator[None]:
    """Every tensor that a test makes is made there."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def require_backend(name: str) -> None:
    """Fails where the backend should be there and isn't; skips where it can't be."""
    loaded = backends.load(name)
    if not isinstance(loaded, str):
        return
    if name == "cpu" and not (
        shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    ):
        pytest.skip("no C++ compiler, so there is no native library")
    pytest.fail(f"backend {name!r} is missing: {loaded}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Runs the test once for each backend."""
    require_backend(request.param)
    return str(request.param)


@pytest.fixture
def seed() -> int:
    """Fresh on every run; a failure shows it, and FASTATTN_TEST_SEED repeats it."""
    given = os.environ.get("FASTATTN_TEST_SEED")
    value = int(given) if given else random.SystemRandom().randrange(2**31)
    sys.stdout.write(f"FASTATTN_TEST_SEED={value}\n")  # pytest shows it if the test fails
    torch.manual_seed(value)
    return value


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that torch hands out uninitialised is full of NaN, so what a kernel forgets shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    # Some of torch's own sums on a GPU have no deterministic form, and would raise.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
