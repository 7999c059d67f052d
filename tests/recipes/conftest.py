"""A tiny model and a tiny task, made once for all tests of the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.tiny import make_data, make_model


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head."""
    return make_model(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a head for the labels good and bad, in this order."""
    return make_model(tmp_path_factory.mktemp("classifier"), labels=["good", "bad"])


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))
