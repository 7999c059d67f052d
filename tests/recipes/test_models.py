"""Model folders that are not whole are refused, not completed with what transformers makes up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM

from fastattn.recipes.data import Task, find_files, load_task
from fastattn.recipes.errors import ModelError
from fastattn.recipes.models import (
    load_config,
    load_model,
    load_tokenizer,
    new_classifier,
    output_labels,
)

LAYER = "encoder.layer.1.output.dense.weight"


def copy(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


@pytest.fixture(scope="module")
def task(data: Path) -> Task:
    return load_task(*find_files(data))


def change_weights(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """Put what ``change`` makes of each weight in its place."""
    file = folder / "model.safetensors"
    changed = [change(name, value) for name, value in load_file(file).items()]
    save_file({n: v for one in changed for n, v in one.items()}, file, {"format": "pt"})
    return folder


def test_a_folder_without_tokenizer_files(encoder: Path, tmp_path: Path) -> None:
    folder = copy(encoder, tmp_path / "copy")
    (folder / "vocab.txt").unlink(missing_ok=True)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(encoder).get_vocab()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="copy has no tokenizer.*tokenizer.json.*save the token"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda name, value: {} if LAYER in name else {name: value},
        lambda name, value: {name: value[:5].clone() if LAYER in name else value},
        lambda name, value: {f"module.{name}": value},
    ],
    ids=["missing", "smaller", "prefixed"],
)
def test_weights_that_do_not_fit(
    encoder: Path, classifier: Path, task: Task, tmp_path: Path, change: Callable
) -> None:
    folder = change_weights(copy(classifier, tmp_path / "classifier"), change)
    with pytest.raises(ModelError, match="weights in .*classifier don't fit.*(layer|embeddings)"):
        load_model(folder)
    folder = change_weights(copy(encoder, tmp_path / "encoder"), change)
    with pytest.raises(ModelError, match="weights in .*encoder don't fit.*(layer|embeddings)"):
        new_classifier(folder, task)


def test_a_head_is_missing_only_where_it_is_made_anew(
    classifier: Path, task: Task, tmp_path: Path
) -> None:
    def behead(name: str, value: Tensor) -> dict[str, Tensor]:
        return {} if name.startswith("classifier.") else {name: value}

    folder = change_weights(copy(classifier, tmp_path / "copy"), behead)
    with pytest.raises(ModelError, match="2 are missing.*classifier.bias, classifier.weight"):
        load_model(folder)
    new_classifier(folder, task)


def test_a_pooler_is_made_anew_as_a_whole(encoder: Path, task: Task, tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_pretrained(encoder).save_pretrained(tmp_path / "language_model")
    new_classifier(tmp_path / "language_model", task)
    folder = change_weights(
        copy(encoder, tmp_path / "half"),
        lambda name, value: {} if name == "pooler.dense.bias" else {name: value},
    )
    with pytest.raises(ModelError, match="1 are missing.*pooler.dense.bias"):
        new_classifier(folder, task)


def edit_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_outputs_that_are_no_classes(
    classifier: Path, task: Task, tmp_path: Path, kind: str
) -> None:
    folder = edit_config(copy(classifier, tmp_path / "copy"), problem_type=kind)
    with pytest.raises(ModelError, match=rf"problem_type is {kind}"):
        output_labels(load_config(folder))
    assert new_classifier(folder, task).config.problem_type == "single_label_classification"


def test_an_output_without_a_name(classifier: Path, tmp_path: Path) -> None:
    names = {"1": "good", "2": "bad"}
    folder = edit_config(copy(classifier, tmp_path / "copy"), id2label=names)
    with pytest.raises(ModelError, match="id2label names no output 0"):
        output_labels(load_config(folder))


def test_outputs_come_as_we_read_them(classifier: Path, tmp_path: Path) -> None:
    asked = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    config = load_model(edit_config(copy(classifier, tmp_path / "copy"), **asked)).config
    assert config.return_dict
    assert not config.output_attentions and not config.output_hidden_states


def test_a_tokenizer_that_cannot_pad(encoder: Path, tmp_path: Path) -> None:
    folder = copy(encoder, tmp_path / "copy")
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="has no padding token: give it one"):
        load_tokenizer(folder)


def test_a_damaged_weights_file(classifier: Path, task: Task, tmp_path: Path) -> None:
    folder = copy(classifier, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"half")
    for load in (load_model, lambda path: new_classifier(path, task)):
        with pytest.raises(ModelError, match="can't load the model in .*copy"):
            load(folder)
