"""Runs tests on the emulated CUDA kernels: poisoned memory, fresh random numbers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import backends

HERE = Path(__file__).parent
MAX_DIM = 128


@pytest.fixture(autouse=True)
def _poisoned(poison: None, seed: int) -> None:
    pass


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's name, for the length of a test."""
    entry = ("tests.emulation.backend", "EmulatedBackend")
    monkeypatch.setitem(backends._BACKENDS, "emulated", entry)


@pytest.fixture
def backend(_emulated: None) -> str:
    """In place of the fixture of that name: the same tests, this backend."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler, so no emulation")
    loaded = backends.load("emulated")
    assert not isinstance(loaded, str), loaded
    return "emulated"


def _is_offered(value: Any) -> bool:
    """Whether the CUDA kernels offer what a test is parametrised with."""
    if isinstance(value, tuple):
        return all(_is_offered(x) for x in value)
    return value is not torch.float64


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = []
    for item in items:
        if HERE not in item.path.parents:
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        dims = [params.get("dim", 0), *params.get("dims", ())]
        too_large = item.name.startswith(
            ("test_head", "test_16_bit_head", "test_value", "test_step")
        )
        if not all(map(_is_offered, params.values())) or (too_large and max(dims) > MAX_DIM):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
