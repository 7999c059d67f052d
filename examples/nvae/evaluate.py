"""How good a model is, in nats of test images it has not seen: the bound, and closer to the truth.

In expectation the second is never above the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.nvae.data import Images
from examples.nvae.model import Encoded
from examples.nvae.training import pixels
from fastattn.recipes.progress import progress

SAMPLES = 200


@dataclass(frozen=True)
class Nats:
    """Means over test images. ``bound``: the negative evidence lower bound, with the KL in closed
    form. ``likelihood``: the negative log of the mean of ``SAMPLES`` importance weights (Burda et
    al. 2015), which is at most the bound and at least the true value, in expectation. ``kl``: of
    each group of latents. ``error``: standard error of the bound over images."""

    bound: float
    likelihood: float
    kl: tuple[float, ...]
    error: float


@torch.no_grad()
def evaluate(
    encode: Callable[[Tensor], Encoded],
    images: Images,
    binary: bool,
    samples: int = SAMPLES,
    chunk: int = 3000,
    seed: int = 1,
    description: str = "Evaluating",
) -> Nats:
    """``encode`` in evaluation mode on all test images.

    Binary pixels are drawn anew for each image from ``seed``: the same ones for every model.
    """
    torch.manual_seed(seed)
    test = pixels(images.test, images, binary)
    bounds, likelihoods, kls = [], [], []
    rows = max(1, chunk // samples)
    with progress(description, len(test)) as advance:
        for x in test.split(rows):
            repeated = x.repeat_interleave(samples, 0)
            said = encode(repeated)
            fit = said.likelihood.log_prob(repeated)
            weights = (fit - said.log_ratio.sum(0)).view(len(x), samples)
            bounds.append((said.kl.sum(0) - fit).view(len(x), samples).mean(1))
            likelihoods.append(math.log(samples) - weights.logsumexp(1))
            kls.append(said.kl.mean(1) * len(x))
            advance(len(x))
    bound = torch.cat(bounds).double()
    return Nats(
        bound=float(bound.mean()),
        likelihood=float(torch.cat(likelihoods).double().mean()),
        kl=tuple((torch.stack(kls).sum(0) / len(test)).tolist()),
        error=float(bound.std() / math.sqrt(len(test))) if len(test) > 1 else math.nan,
    )
