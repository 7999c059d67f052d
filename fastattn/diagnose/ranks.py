"""Do two lists of numbers rank things alike? The measures that every comparison reports."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank; exactly 1 for
    vectors of the same order, NaN where one is constant or has fewer than two values.

    Raises:
        ModuleNotFoundError: scipy is not installed; names the extra that brings it.
    """
    stats = _scipy_stats()
    ranks_a, ranks_b = (stats.rankdata(x.detach().double().cpu().numpy()) for x in (a, b))
    if len(ranks_a) < 2 or np.ptp(ranks_a) == 0 or np.ptp(ranks_b) == 0:
        return math.nan
    if np.array_equal(ranks_a, ranks_b):
        return 1.0
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two vectors; NaN where ``spearman`` is."""
    if len(a) < 2:
        return math.nan
    return float(_scipy_stats().kendalltau(a.detach().cpu(), b.detach().cpu()).statistic)


def top_overlap(a: Tensor, b: Tensor, k: int) -> float:
    """The share of the k largest of |a| that are among the k largest of |b|; NaN for vectors of at
    most k numbers, which share them whatever they are.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    if len(a) <= k:
        return math.nan
    largest = (set(x.abs().topk(k).indices.tolist()) for x in (a, b))
    return len(set.intersection(*largest)) / k


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rank correlations need scipy: pip install 'fastattn[diagnose]'", name="scipy"
        ) from error
    return stats
