"""Everything here needs a GPU, and runs on each of our backends for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastattn import backends

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    loaded = backends.load(request.param)
    if isinstance(loaded, str):
        pytest.skip(loaded)
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
