"""Integrated gradients has exact answers: the axioms of the paper, as numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn.diagnose import integrated_gradients

DOUBLE = torch.float64


def vector(*values: float) -> Tensor:
    return torch.tensor([values], dtype=DOUBLE)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("points", [1, 2, 7, 100])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_linear_function_gives_weight_times_change(
    points: int, chunk: int | None, seed: int
) -> None:
    weights, x, start = torch.randn(3, 1, 5, dtype=DOUBLE)
    got = integrated_gradients(
        lambda x: (x * weights).sum(-1), x, start, points=points, chunk=chunk
    )
    close(got, weights * (x - start))


def test_minimum_credits_the_smaller_alone() -> None:
    """The paper's example: F = min(x1, x2), x = (1, 3), x' = 0 gives (1, 0)."""
    got = integrated_gradients(lambda x: x.amin(-1), vector(1, 3), vector(0, 0))
    close(got, vector(1, 0))


def test_saturated_feature_is_credited() -> None:
    """1 - ReLU(1 - x) at x = 2: the gradient there is 0, the attribution 1 (sensitivity)."""

    def function(x: Tensor) -> Tensor:
        return 1 - torch.relu(1 - x).sum(-1)

    x = vector(2).requires_grad_()
    assert torch.autograd.grad(function(x).sum(), x)[0].item() == 0
    got = integrated_gradients(function, x.detach(), vector(0), points=2000)
    torch.testing.assert_close(got, vector(1), atol=1e-3, rtol=0)


def test_quadratic_form_is_exact_with_one_point(seed: int) -> None:
    matrix, x, start = (torch.randn(*shape, dtype=DOUBLE) for shape in ((4, 4), (1, 4), (1, 4)))
    got = integrated_gradients(lambda x: ((x @ matrix) * x).sum(-1), x, start, points=1)
    close(got, (x - start) * ((x + start) / 2 @ (matrix + matrix.T)))


def function(x: Tensor) -> Tensor:
    return torch.tanh(x[:, 0] * x[:, 1]) + x[:, 0].sin() * x[:, 1].sin()


def test_dummy_symmetry_linearity_and_implementation_invariance(seed: int) -> None:
    start = torch.zeros(1, 3, dtype=DOUBLE)
    x = vector(0.7, 0.7, 5)
    got = integrated_gradients(function, x, start)
    assert got[0, 2] == 0, "a variable the function does not read gets nothing"
    torch.testing.assert_close(got[0, 0], got[0, 1])  # symmetric in the first two, equal values

    other = torch.randn(3, dtype=DOUBLE)
    both = integrated_gradients(lambda x: 2 * function(x) - 3 * (x @ other).exp(), x, start)
    alone = integrated_gradients(lambda x: (x @ other).exp(), x, start)
    close(both, 2 * got - 3 * alone)

    rewritten = integrated_gradients(
        lambda x: 1 - 2 / (torch.exp(2 * x[:, 0] * x[:, 1]) + 1)
        + ((x[:, 0] - x[:, 1]).cos() - (x[:, 0] + x[:, 1]).cos()) / 2,
        x, start,
    )  # fmt: skip
    close(rewritten, got)


def test_completeness_and_chunks(seed: int) -> None:
    x, start = torch.randn(2, 6, 3, dtype=DOUBLE)
    whole = integrated_gradients(function, x, start)
    close(whole.sum(-1), function(x) - function(start))
    for chunk in (6, 7, 50, 10**6):
        close(integrated_gradients(function, x, start, chunk=chunk), whole)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="points must be at least 1; got 0"):
        integrated_gradients(function, vector(1, 2), vector(0, 0), points=0)
    with pytest.raises(ValueError, match=r"shape of inputs, \(1, 2\); got \(1, 1\)"):
        integrated_gradients(function, vector(1, 2), vector(0))
