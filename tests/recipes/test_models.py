"""Model folders that are not whole are refused, not completed with what transformers makes up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastattn.recipes.errors import ModelError
from fastattn.recipes.models import load_tokenizer


def copy(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_a_folder_without_tokenizer_files(encoder: Path, tmp_path: Path) -> None:
    folder = copy(encoder, tmp_path / "copy")
    (folder / "vocab.txt").unlink(missing_ok=True)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(encoder).get_vocab()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="copy has no tokenizer.*tokenizer.json.*save the token"):
        load_tokenizer(folder)
