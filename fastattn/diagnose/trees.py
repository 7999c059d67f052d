"""From an impact matrix to a tree: Eisner's projective dependencies, and two top-down bracketings.

Equal scores are common (a model that ignores context gives a zero matrix) and an arg-max that takes
the first of them is a chain, which scores 35 on English: ties are therefore broken at random.

Sources: Eisner 1996 (dependencies), Wu et al. 2020 (MART), Su 2020
(https://kexue.fm/archives/7476).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Matrix = npt.NDArray[np.float64]
Bracketing = list[Any]  # of word indices and bracketings
METHODS = ("eisner", "mart", "su")
TIE_NOISE = 1e-9


@overload
def tree(
    matrix: Tensor, method: Literal["eisner"] = ..., *, root: int | None = ..., seed: int = ...
) -> list[int]: ...


@overload
def tree(
    matrix: Tensor, method: Literal["mart", "su"], *, root: None = ..., seed: int = ...
) -> Bracketing: ...


def tree(
    matrix: Tensor, method: str = "eisner", *, root: int | None = None, seed: int = 0
) -> list[int] | Bracketing:
    """The tree over n words that an impact matrix (n, n) suggests.

    Args:
        matrix: F[i, j], the impact of word j on word i; words only, no special tokens.
        method: "eisner": the projective tree with the largest sum of softmax(F[i])[head of i];
            "mart": cut at the word k that minimises the distance 1 - softmax over columns inside
            the two halves less that between them, and go on in both; "su": the same with mean
            impacts, in both halves as large and between them as small as possible.
        root: for "eisner" the word that has no head, where it is known; by default the best.
        seed: breaks ties.

    Returns:
        For "eisner" the head of each word as in CoNLL-U: 1 is the first word, 0 no head. For
        "mart" and "su" nested lists [left, [k, right]] of word indices from 0.

    Raises:
        ValueError: an unknown method, a matrix that is not square, is empty or has NaN or infinity,
            or a root that is out of range or given to a bracketing.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1] or not len(matrix):
        raise ValueError(f"matrix must be square and not empty; got {list(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("matrix has NaN or infinite entries: compute it without band=")
    scores = matrix.detach().double().cpu()
    if method == "eisner":
        if root is not None and not 0 <= root < len(scores):
            raise ValueError(f"root must be within 0..{len(scores) - 1}; got {root}")
        return _eisner(_break_ties(scores.softmax(1), seed).T, root)
    if root is not None:
        raise ValueError(f'root is for method="eisner"; got {root} with {method!r}')
    words = list(range(len(scores)))
    if method == "su":
        scale = max(1.0, float(scores.abs().max()))
        return _bracket(_break_ties(scores / scale, seed), words, _su_cut)
    distance = 1 - scores.softmax(0)
    distance.fill_diagonal_(0)
    return _bracket(_break_ties(distance, seed), words, _mart_cut)


def _break_ties(scores: Tensor, seed: int) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(scores.shape, generator=generator, dtype=scores.dtype)
    broken: Matrix = (scores + TIE_NOISE * noise).numpy()
    return broken


def _eisner(score: Matrix, root: int | None) -> list[int]:
    """Heads of the best projective tree; ``score[h, d]`` is that of an arc from h to d."""
    n = len(score)
    # Spans [s, t]: open ones end in an arc between s and t, closed ones are complete on that side.
    # "left" spans hang from t, "right" spans from s.
    closed = {side: np.zeros((n, n)) for side in ("left", "right")}
    opened = {side: np.zeros((n, n)) for side in ("left", "right")}
    split = np.zeros((n, n), int)
    cut = {side: np.zeros((n, n), int) for side in ("left", "right")}
    for width in range(1, n):
        for s in range(n - width):
            t = s + width
            halves = closed["right"][s, s:t] + closed["left"][s + 1 : t + 1, t]
            split[s, t] = s + halves.argmax()
            opened["left"][s, t] = halves.max() + score[t, s]
            opened["right"][s, t] = halves.max() + score[s, t]
            left = closed["left"][s, s:t] + opened["left"][s:t, t]
            right = opened["right"][s, s + 1 : t + 1] + closed["right"][s + 1 : t + 1, t]
            cut["left"][s, t], closed["left"][s, t] = s + left.argmax(), left.max()
            cut["right"][s, t], closed["right"][s, t] = s + 1 + right.argmax(), right.max()
    if root is None:
        root = int((closed["left"][0] + closed["right"][:, -1]).argmax())
    heads = [0] * n
    stack = [("left", False, 0, root), ("right", False, root, n - 1)]
    while stack:
        side, is_open, s, t = stack.pop()
        if s == t:
            continue
        if is_open:
            head, dependent = (t, s) if side == "left" else (s, t)
            heads[dependent] = head + 1
            q = int(split[s, t])
            stack += [("right", False, s, q), ("left", False, q + 1, t)]
        else:
            q = int(cut[side][s, t])
            if side == "left":
                stack += [("left", False, s, q), ("left", True, q, t)]
            else:
                stack += [("right", True, s, q), ("right", False, q, t)]
    return heads


def _bracket(scores: Matrix, words: list[int], cut: Callable[[Matrix], int]) -> Bracketing:
    if len(words) <= 2:
        return words
    k = cut(scores)
    left = _bracket(scores[:k, :k], words[:k], cut)
    right = _bracket(scores[k + 1 :, k + 1 :], words[k + 1 :], cut)
    return [left, [words[k], right] if right else [words[k]]]


def _mart_cut(distance: Matrix) -> int:
    """k in 1..n-1; word k opens the right half and takes no part in its sums."""
    n = len(distance)

    def cost(k: int) -> float:
        inside = distance[:k, :k].sum() / (2 * k)
        inside += distance[k + 1 :, k + 1 :].sum() / (2 * (n - k))
        between = distance[:k, k + 1 :].sum() + distance[k + 1 :, :k].sum()
        return float(inside - between / (k * (n - k)))

    return min(range(1, n), key=cost)


def _su_cut(impact: Matrix) -> int:
    def gain(k: int) -> float:
        inside = impact[:k, :k].mean() + impact[k:, k:].mean()
        return float(inside - impact[:k, k:].mean() - impact[k:, :k].mean())

    return max(range(1, len(impact) - 1), key=gain)
