"""Where does one unit end and the next begin? Cuts where neighbours have little impact.

Source: Su 2020, https://kexue.fm/archives/7476, on perturbed masking (Wu et al. 2020).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]  # from the first position to the one after the last


def adjacent_impact(matrix: Tensor) -> Tensor:
    """(F[i, i+1] + F[i+1, i]) / 2 for i = 0 .. n-2, from an impact matrix (n, n)."""
    return (matrix.diagonal(1) + matrix.diagonal(-1)) / 2


def segment(
    matrix: Tensor, *, threshold: float | None = None, quantile: float | None = None
) -> list[Span]:
    """Spans between which neighbours' impact is below the threshold.

    Args:
        matrix: an impact matrix (n, n); ``impact_matrix(..., band=1)`` is enough.
        threshold: cut between i and i+1 where their mean impact is below it. It depends on the
            model: take a quantile of ``adjacent_impact`` over many texts.
        quantile: instead, that quantile of this text's own neighbours.

    Returns:
        Spans (start, end) that cover 0..n in order.

    Raises:
        ValueError: neither or both of ``threshold`` and ``quantile``, a quantile not in 0..1, or
            neighbours whose impact is not finite.
    """
    if (threshold is None) == (quantile is None):
        raise ValueError(f"give a threshold or a quantile; got {threshold} and {quantile}")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be within 0..1; got {quantile}")
    strength = adjacent_impact(matrix)
    if not strength.isfinite().all():
        raise ValueError("matrix has NaN or infinite entries beside its diagonal")
    if quantile is not None:
        threshold = float(torch.quantile(strength, quantile)) if len(strength) else 0.0
    assert threshold is not None
    cuts = [i + 1 for i, value in enumerate(strength.tolist()) if value < threshold]
    borders = [0, *cuts, len(matrix)]
    return list(itertools.pairwise(borders)) if len(matrix) else []


@dataclass(frozen=True)
class SegmentationScore:
    """Precision, recall and F1 of whole spans, between 0 and 1."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def score_segmentation(
    predicted: Sequence[Sequence[Span]], gold: Sequence[Sequence[Span]]
) -> SegmentationScore:
    """SIGHAN's measure: a span counts if both its ends are right.

    Raises:
        ValueError: not as many predicted texts as gold ones, or a text of another length.
    """
    if len(predicted) != len(gold):
        raise ValueError(f"{len(predicted)} predicted texts for {len(gold)} gold ones")
    right = said = true = 0
    for number, (a, b) in enumerate(zip(predicted, gold, strict=True)):
        if a and b and a[-1][1] != b[-1][1]:
            raise ValueError(f"text {number} ends at {a[-1][1]} but its gold at {b[-1][1]}")
        right += len(set(a) & set(b))
        said += len(a)
        true += len(b)
    return SegmentationScore(right / max(said, 1), right / max(true, 1))


def spans_of_words(words: Sequence[str]) -> list[Span]:
    """The spans of ``words`` in the text that they are joined to without spaces."""
    ends = torch.tensor([len(word) for word in words]).cumsum(0).tolist()
    return list(itertools.pairwise([0, *ends]))
