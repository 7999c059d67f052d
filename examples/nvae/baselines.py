"""Two models to compare with: pixels that know nothing of each other, and a plain VAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.nvae.data import Images
from examples.nvae.exact import Bernoulli, Normal, residual_kl
from examples.nvae.model import Encoded


def factorised_nats(images: Images) -> float:
    """Mean negative log likelihood of binary test pixels, each with its own chance, fitted to the
    training images (with one pixel of each kind added, so that none is certain)."""
    scale = images.levels - 1
    chance = (images.train.double().sum(0) / scale + 1) / (len(images.train) + 2)
    test = images.test.double() / scale
    nats = -(test * chance.log() + (1 - test) * (1 - chance).log())
    return float(nats.flatten(1).sum(1).mean())


class PlainVAE(nn.Module):
    """One group of latents between two perceptrons (Kingma and Welling 2013)."""

    def __init__(self, channels: int, size: int, hidden: int = 512, latents: int = 32) -> None:
        super().__init__()
        self.image = (channels, size, size)
        inputs = channels * size**2
        self.reader = _perceptron(inputs, hidden, 2 * latents)
        self.writer = _perceptron(latents, hidden, inputs)

    def encode(self, x: Tensor) -> Encoded:
        """``x`` (B, C, H, W) in {0, 1}."""
        posterior = Normal(*self.reader(x.flatten(1)).chunk(2, 1))
        zeros = torch.zeros_like(posterior.mean)
        prior = Normal(zeros, zeros)
        z = posterior.sample()
        kl = residual_kl(prior, posterior)
        log_ratio = posterior.log_prob(z) - prior.log_prob(z)
        return Encoded(self._write(z), kl[None], log_ratio[None])

    def _write(self, z: Tensor) -> Bernoulli:
        return Bernoulli(self.writer(z).reshape(-1, *self.image))


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )
