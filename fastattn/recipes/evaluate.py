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
    its generalisation by Gorodkin 2004); ``f1`` that of the second of two classes, None for more;
    ``loss`` the mean cross entropy in nats."""

    rows: int
    accuracy: float
    matthews: float
    f1: float | None
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
    counts = confusion(logits.argmax(-1), labels, logits.shape[-1])
    return Evaluation(
        rows=len(labels),
        accuracy=float(accuracy(counts)),
        matthews=float(matthews(counts)),
        f1=float(f1(counts)) if len(counts) == 2 else None,
        loss=float(F.cross_entropy(logits, labels)),
    )


def confusion(
    predicted: Tensor, labels: Tensor, classes: int, weights: Tensor | None = None
) -> Tensor:
    """How often class i was taken for class j, (..., classes, classes) in float64.

    Args:
        predicted, labels: int64 (rows,).
        weights: (..., rows), how often each row counts; None: once.
    """
    pairs = labels * classes + predicted
    if weights is None:
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    counted = weights.new_zeros(*weights.shape[:-1], classes**2)
    counted.index_add_(-1, pairs, weights)
    return counted.reshape(*weights.shape[:-1], classes, classes).double()


def accuracy(confusion: Tensor) -> Tensor:
    """The share on the diagonal of confusion matrices (..., classes, classes)."""
    return confusion.diagonal(dim1=-2, dim2=-1).sum(-1) / confusion.sum((-2, -1))


def f1(confusion: Tensor) -> Tensor:
    """F1 of the second class of confusion matrices (..., 2, 2): the harmonic mean of precision and
    recall; 0 where that class is neither there nor predicted."""
    hits = confusion[..., 1, 1]
    both = confusion[..., 1, :].sum(-1) + confusion[..., :, 1].sum(-1)
    return 2 * hits / both.clamp_min(1)


def matthews(confusion: Tensor) -> Tensor:
    """Matthews correlation of confusion matrices (..., classes, classes); 0 where the labels or
    the predictions are constant."""
    true, said, total = confusion.sum(-1), confusion.sum(-2), confusion.sum((-2, -1))
    right = confusion.diagonal(dim1=-2, dim2=-1).sum(-1)
    covariance = right * total - (true * said).sum(-1)
    spread = (total**2 - said.square().sum(-1)) * (total**2 - true.square().sum(-1))
    return torch.where(spread > 0, covariance / spread.clamp_min(1e-300).sqrt(), 0.0)


def batches_by_length(lengths: list[int], tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most ``tokens`` tokens with their padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
