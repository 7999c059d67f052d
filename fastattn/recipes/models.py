"""Checkpoints in and out: which model a folder holds, whether it is fine-tuned, and for what.

Everything that can be wrong with a model is found from its ``config.json`` before weights are read.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fastattn.models.attention import SOFTMAX
from fastattn.models.families import attention_modules
from fastattn.models.marks import is_linear
from fastattn.recipes.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fastattn.recipes.data import Task

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
UNREADABLE = (ValueError, OSError, RuntimeError, SafetensorError)  # weights that are damaged


def load_config(path: Path) -> PretrainedConfig:
    """The configuration in ``path``.

    Raises:
        ModelError: no such folder, or no readable ``config.json`` in it.
    """
    if not path.is_dir():
        raise ModelError(f"model folder {path} does not exist (models are read from disk only)")
    if not (path / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ModelError(f"{path} has no config.json, so it is no Hugging Face model; has {there}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
        return config
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"can't read {path}/config.json: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, in alphabetical order."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])


def tokenizer_files(folder: Path) -> list[Path]:
    """All that a tokenizer is read from, in alphabetical order."""
    patterns = (*TOKENIZER_FILES, "tokenizer_config.json", "added_tokens.json", "merges.txt",
                "special_tokens_map.json")  # fmt: skip
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in ``path``.

    Raises:
        ModelError: none is there (transformers would make up one of five words), or none that can
            be read, or one that can't pad.
    """
    if not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        raise ModelError(
            f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): save the tokenizer "
            "into the folder, too"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True
        )
    except Exception as error:  # each tokenizer class raises its own kind
        raise ModelError(f"can't load the tokenizer in {path}: {error}") from error
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer in {path} has no padding token: give it one (tokenizer.pad_token = "
            "..., one that the model knows) and save it again"
        )
    return tokenizer


def load_model(path: Path, train: bool = False) -> PreTrainedModel:
    """The sequence classifier in ``path``, with softmax or linear attention as it was saved.

    Args:
        train: in float32, whatever it was saved in, and softmax attention is to run as is best in
            training, rather than as transformers would run it.
    """
    import fastattn

    config = load_config(path)
    model: PreTrainedModel
    unread: set[str] = set()  # fastattn.load checks this itself
    try:
        if is_linear(config):
            model = fastattn.load(path, **PLAIN_OUTPUTS)
        else:
            options = {"attn_implementation": SOFTMAX, "dtype": torch.float32} if train else {}
            model, unread = _read(path, **options)
    except UNREADABLE as error:
        raise ModelError(f"can't load the model in {path}: {error}") from error
    _check_read(path, unread)
    return model


def _read(path: Path, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """The classifier in ``path``, and which of its weights the files there don't have, or have in
    another size: transformers draws these at random."""
    model, report = AutoModelForSequenceClassification.from_pretrained(
        path,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report
        **PLAIN_OUTPUTS,
        **options,
    )
    return model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}


def _check_read(path: Path, unread: set[str]) -> None:
    if unread:
        shown = ", ".join(sorted(unread)[:5]) + (", ..." if len(unread) > 5 else "")
        raise ModelError(
            f"the weights in {path} don't fit its config.json: {len(unread)} are missing or of "
            f"another size ({shown})"
        )


def check_supported(
    config: PretrainedConfig, feature_map: str, layers: tuple[int, ...] | None
) -> None:
    """Try the conversion on a model without memory, so that what can't be done is said at once.

    Raises:
        ModelError: no classifier of this kind, no linear attention for it, or no such layer.
    """
    import fastattn

    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
            attention_modules(model)  # no decoder
            fastattn.linearize(model, feature_map=feature_map, layers=layers)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"this model can't be made linear: {error}") from error


def is_fine_tuned(config: PretrainedConfig) -> bool:
    """Whether a checkpoint already has a trained classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def output_labels(config: Any) -> tuple[str, ...]:
    """Names of a fine-tuned model's outputs, in order; LABEL_0, ... stand for 0, ...

    Raises:
        ModelError: outputs that are no classes, or without names.
    """
    if config.problem_type not in (None, "single_label_classification"):
        raise ModelError(
            f"the model's problem_type is {config.problem_type}; what is trained and measured here "
            "is single_label_classification, one class of several for each text"
        )
    if missing := [i for i in range(config.num_labels) if i not in config.id2label]:
        raise ModelError(f"the model's id2label names no output {missing[0]}: {config.id2label}")
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        names = [str(i) for i in range(len(names))]
    return tuple(names)


def show_labels(labels: tuple[str, ...]) -> str:
    """The first of them, for a message."""
    return ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")


def new_classifier(path: Path, task: Task) -> PreTrainedModel:
    """The encoder in ``path``, to be trained, with a new head for the labels of ``task``.

    Raises:
        ModelError: the weights can't be read, or are not all there.
    """
    try:
        model, unread = _read(
            path,
            num_labels=len(task.labels),
            id2label=task.id2label,
            label2id={name: i for i, name in task.id2label.items()},
            problem_type="single_label_classification",
            attn_implementation=SOFTMAX,
            dtype=torch.float32,  # AdamW divides by its eps of 1e-8, which float16 rounds to 0
            **no_attention_dropout(load_config(path)),
        )
    except UNREADABLE as error:
        raise ModelError(f"can't load the model in {path}: {error}") from error
    _check_read(path, unread - _new_weights(model, unread))
    return model


def _new_weights(model: PreTrainedModel, unread: set[str]) -> set[str]:
    """Weights that an encoder need not bring: the head's, and a pooler's if it has none at all (it
    was trained as a masked language model)."""
    encoder = f"{model.base_model_prefix}."
    names = set(model.state_dict())
    pooler = {name for name in names if name.startswith(f"{encoder}pooler.")}
    head = {name for name in names if not name.startswith(encoder)}
    return head | pooler if pooler <= unread else head


def no_attention_dropout(config: PretrainedConfig) -> dict[str, float]:
    """Settings that turn off dropout of attention weights. Linear attention has no such weights,
    and softmax attention with dropout leaves its fast kernel and draws N^2 random numbers."""
    names = ("attention_probs_dropout_prob", "attention_dropout", "attention_probs_dropout")
    return {name: 0.0 for name in names if getattr(config, name, None)}
