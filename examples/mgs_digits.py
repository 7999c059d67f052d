"""MGS against cross entropy where the two disagree: an 8 that is missed costs ten false alarms.

``python -m examples.mgs_digits`` fits a logistic regression on scikit-learn's digits (8 or not) by
cross entropy, and from there goes on with the same number of steps of the same length: along the
gradient (MLE), or where MGS says. A tuned threshold, for which the cost must be known as a formula,
stands beside them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.recipes.progress import progress
from fastattn.theseus.mgs import mgs_step

MISSED, FALSE_ALARM = 10.0, 1.0
STEPS, STEP_LENGTH = 300, 0.05


@dataclass(frozen=True)
class Split:
    """x (N, 64) float32, standardised; is_eight (N,) bool."""

    x: Tensor
    is_eight: Tensor


def load(seed: int) -> tuple[Split, Split]:
    """A seeded half for training and half for testing."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        sys.exit("the digits come with scikit-learn: pip install 'fastattn[examples]'")
    digits = load_digits()
    x = torch.from_numpy(digits.data).float() / 16
    is_eight = torch.from_numpy(digits.target) == 8
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order.chunk(2)
    return Split(x[train], is_eight[train]), Split(x[test], is_eight[test])


def cross_entropy(model: nn.Module, split: Split) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(split.x)[:, 0], split.is_eight.float())


@torch.no_grad()
def cost(model: nn.Module, split: Split, threshold: float = 0.0) -> float:
    """Per example."""
    said = model(split.x)[:, 0] > threshold
    missed, alarms = split.is_eight & ~said, said & ~split.is_eight
    return float((MISSED * missed.sum() + FALSE_ALARM * alarms.sum()) / len(said))


def fitted(train: Split) -> nn.Module:
    """Logistic regression, by cross entropy with a little weight decay, to convergence."""
    torch.manual_seed(0)
    model = nn.Linear(train.x.shape[1], 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, train) + 1e-3 * model.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def go_on(model: nn.Module, train: Split, method: dict[str, object] | None, seed: int) -> nn.Module:
    """``STEPS`` steps of ``STEP_LENGTH`` along minus the gradient, or as MGS says."""
    for step in range(STEPS):
        if method is None:
            model.zero_grad()
            cross_entropy(model, train).backward()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # few effective samples
                mgs_step(
                    model, cross_entropy, lambda m, b: -cost(m, b), train,
                    seed=1000 * seed + step, **method,
                )  # fmt: skip
        with torch.no_grad():
            parameters = list(model.parameters())
            norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
            for p in parameters:
                p.sub_(p.grad, alpha=STEP_LENGTH / float(norm))
    return model


def best_threshold(model: nn.Module, train: Split) -> float:
    with torch.no_grad():
        candidates = model(train.x)[:, 0].sort().values - 1e-4
    return min(candidates.tolist(), key=lambda t: cost(model, train, t))


METHODS: dict[str, dict[str, object] | None] = {
    "MLE, more steps": None,
    "MGS with its defaults": {},
    "MGS, 16 candidates": {"candidates": 16},
    "MGS, 16 candidates, exact density": {"candidates": 16, "density": "exact"},
    "MGS, noise 1 x gradient (the authors')": {"noise": 1.0, "noise_unit": "gradient"},
    "MGS, noise 0.05, absolute": {"noise": 0.05, "noise_unit": "absolute"},
}  # fmt: skip


def experiment(seeds: int) -> dict[str, list[tuple[float, float]]]:
    """(train cost, test cost) of each method and seed."""
    results: dict[str, list[tuple[float, float]]] = {}
    with progress("Digits", seeds * len(METHODS)) as advance:
        for seed in range(seeds):
            train, test = load(seed)
            start = fitted(train)
            threshold = best_threshold(start, train)
            ends = {"cross-entropy optimum": (cost(start, train), cost(start, test))}
            for name, method in METHODS.items():
                model = go_on(fitted(train), train, method, seed)
                ends[name] = cost(model, train), cost(model, test)
                advance(1)
            ends["optimum, threshold tuned"] = (
                cost(start, train, threshold),
                cost(start, test, threshold),
            )
            for name, end in ends.items():
                results.setdefault(name, []).append(end)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}")
    results = experiment(options.seeds)
    table = Table(title=f"Cost per example, mean of {options.seeds} seeds")
    for column in ("", "train", "test", "test, standard deviation"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ends in results.items():
        train, test = torch.tensor(ends, dtype=torch.float64).T
        spread = f"{float(test.std()):.3f}" if len(test) > 1 else ""
        table.add_row(name, f"{float(train.mean()):.3f}", f"{float(test.mean()):.3f}", spread)
    Console().print(table)


if __name__ == "__main__":
    main()
