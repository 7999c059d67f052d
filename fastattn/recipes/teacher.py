"""What the softmax model says about texts, for the model that learns from it.

A model that reads further than its teacher needs a teacher that has read as far: one that is asked
about windows of a text, and whose opinion is the mean of what it said.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastattn.recipes.data import quiet
from fastattn.recipes.evaluate import predict

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def predict_in_windows(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    bf16: bool = False,
    description: str = "Evaluating",
) -> Tensor:
    """``evaluate.predict`` of a model that reads ``max_length`` tokens, for single texts of any
    length: the mean of its logits over the windows of each."""
    windows = cut_into_windows(dataset, tokenizer, max_length)
    logits = predict(model, windows, tokenizer, bf16=bf16, description=description)
    rows = torch.tensor(windows["row"][:])
    sums = logits.new_zeros(len(dataset), logits.shape[-1]).index_add_(0, rows, logits)
    return sums / torch.bincount(rows).unsqueeze(-1)


def cut_into_windows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Windows of at most ``max_length`` tokens that together are the texts.

    Args:
        dataset: from ``data.tokenize``, of single texts.

    Returns:
        The same columns with a row for each window. Windows of one text differ by at most a token
        in length, each has the special tokens around it, and ``row`` is the number of the text.
    """
    specials = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    before, after = specials.index(0), specials[::-1].index(0)

    def cut(column: list[int]) -> list[list[int]]:
        end = len(column) - after
        count = max(1, math.ceil((end - before) / (max_length - before - after)))
        bounds = [before + (end - before) * i // count for i in range(count + 1)]
        return [column[:before] + column[a:b] + column[end:] for a, b in pairwise(bounds)]

    def cut_all(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        windows: dict[str, list[Any]] = {name: [] for name in batch}
        for i, ids in enumerate(batch["input_ids"]):
            lengths = [len(window) for window in cut(ids)]
            for name, values in batch.items():
                per_token = isinstance(values[i], list)
                windows[name] += cut(values[i]) if per_token else [values[i]] * len(lengths)
            windows["length"][-len(lengths) :] = lengths
        return windows

    with quiet():
        return dataset.map(cut_all, batched=True, keep_in_memory=True)


def kept_logits(
    folders: Sequence[Path], key: Sequence[Any], compute: Callable[[], Tensor]
) -> Tensor:
    """What ``compute`` gives, computed once for a ``key`` (of plain data) and kept in the first of
    ``folders``; taken from any of them."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    name = f"teacher_logits_{digest}.safetensors"
    for folder in folders:
        if (folder / name).is_file():
            return load_file(folder / name)["logits"]
    logits = compute()
    partial = folders[0] / f"{name}.partial"
    save_file({"logits": logits}, partial)
    os.replace(partial, partial.with_suffix(""))
    return logits
