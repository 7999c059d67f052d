"""The tests of the ops, on the emulated CUDA kernels: poisoned memory, fresh random numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch

from fastattn import backends

backends._BACKENDS["emulated"] = ("tests.emulation.backend", "EmulatedBackend")


@pytest.fixture(autouse=True)
def _poisoned(poison: None, seed: int) -> None:
    pass


@pytest.fixture(params=["emulated"])
def backend(request: pytest.FixtureRequest) -> str:
    """In place of the fixture of that name: the same tests, the emulated backend."""
    if not (shutil.which("g++") or os.environ.get("CXX")):
        pytest.skip("no C++ compiler, so no emulation")
    assert not isinstance(backends.load(request.param), str)
    return str(request.param)


@pytest.fixture(autouse=True)
def _in_process(backend: str) -> Iterator[None]:
    backends._choose.cache_clear()
    yield
    torch.set_num_threads(torch.get_num_threads())
