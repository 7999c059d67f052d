"""Every test of the backends runs on poisoned memory and fresh random numbers."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poison: None, seed: int) -> None:
    pass
