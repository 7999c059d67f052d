"""What a classifier says about a data set, and how often it is right.

``predict`` gives logits row by row, in the order of the data set whatever the batches were: an
evaluation, a teacher's cached outputs and a comparison of two models are all made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.recipes.progress import progress
from fastattn.recipes.training import Collator, model_inputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_BATCH = 16384


@dataclass(frozen=True)
class Evaluation:
    """Scores on a data set. ``matthews`` is the Matthews correlation (for more than two classes
    its generalisation by Gorodkin 2004); ``loss`` the mean cross entropy in nats."""

    rows: int
    accuracy: float
    matthews: float
    loss: float


def predict(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bf16: bool = False,
    description: str = "Evaluating",
) -> Tensor:
    """Logits (rows, classes) in float32 on the CPU, in the order of ``dataset``.

    Rows of similar length share a batch of about ``TOKENS_PER_BATCH`` tokens.
    """
    device = next(model.parameters()).device
    collate = Collator(tokenizer)
    was_training = model.training
    model.eval()
    logits: list[Tensor] = [torch.empty(0)] * len(dataset)
    with torch.inference_mode(), progress(description, len(dataset)) as advance:
        for rows in batches_by_length(dataset["length"][:], TOKENS_PER_BATCH):
            batch = collate([dataset[row] for row in rows])
            inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model(**inputs).logits
            for row, values in zip(rows, output.float().cpu(), strict=True):
                logits[row] = values
            advance(len(rows))
    model.train(was_training)
    return torch.stack(logits)


def evaluate(logits: Tensor, labels: Tensor) -> Evaluation:
    """Scores of ``logits`` (rows, classes) against int64 ``labels`` (rows,)."""
    predicted = logits.argmax(-1)
    return Evaluation(
        rows=len(labels),
        accuracy=float((predicted == labels).double().mean()),
        matthews=matthews(predicted, labels, logits.shape[-1]),
        loss=float(F.cross_entropy(logits, labels)),
    )


def matthews(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Matthews correlation of two int64 vectors of classes; 0 where one of them is constant."""
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.view(classes, classes).double()
    true, said, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = confusion.trace() * total - true @ said
    spread = (total**2 - said @ said) * (total**2 - true @ true)
    return float(covariance / spread.sqrt()) if spread > 0 else 0.0


def batches_by_length(lengths: list[int], tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most ``tokens`` tokens with their padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
