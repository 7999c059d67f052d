"""The parts of a deep VAE that have an exact answer, so that tests can hold them to it.

Normal distributions relative to a prior, two likelihoods of images, and the spectral regulariser.
Nothing here knows the network; all of it can be used elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def soft_clamp(x: Tensor, bound: float = 5.0) -> Tensor:
    """``x`` near 0, never beyond +-bound, with a gradient everywhere."""
    return bound * torch.tanh(x / bound)


@dataclass(frozen=True)
class Normal:
    """Independent normals N(mean, exp(log_std)^2); both tensors of one shape (B, C, H, W)."""

    mean: Tensor
    log_std: Tensor

    @classmethod
    def from_network(cls, raw: Tensor) -> Normal:
        """Of a layer's output (B, 2C, H, W), each part softly clamped to +-5."""
        mean, log_std = soft_clamp(raw).chunk(2, 1)
        return cls(mean, log_std)

    def shifted(self, delta: Normal) -> Normal:
        """The residual normal N(mean + d_mean, (std d_std)^2) of NVAE, equation 4: a posterior
        that says only in what it differs from its prior."""
        return Normal(self.mean + delta.mean, self.log_std + delta.log_std)

    def sample(self, temperature: float = 1.0) -> Tensor:
        std = temperature * self.log_std.exp()
        return self.mean + std * torch.randn_like(self.mean)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,), summed over everything but the batch."""
        standard = (z - self.mean) * (-self.log_std).exp()
        each = -0.5 * standard.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return each.flatten(1).sum(1)


def residual_kl(prior: Normal, delta: Normal) -> Tensor:
    """KL(prior.shifted(delta) || prior), (B,), in nats.

    NVAE, equation 5: 1/2 sum(d_mean^2 / std^2 + d_std^2 - log d_std^2 - 1). The difference of the
    two distributions enters directly, so it is exactly 0 where the network says 0.
    """
    shift = delta.mean * (-prior.log_std).exp()
    log_variance = 2 * delta.log_std
    each = 0.5 * (shift.square() + torch.expm1(log_variance) - log_variance)
    return each.flatten(1).sum(1)


class Bernoulli:
    """Binary pixels. ``parameters`` (B, C, H, W) are logits."""

    def __init__(self, parameters: Tensor) -> None:
        self.logits = parameters

    @staticmethod
    def parameters_per_pixel(channels: int) -> int:
        return channels

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) of ``x`` in {0, 1} (B, C, H, W)."""
        each = F.binary_cross_entropy_with_logits(self.logits, x, reduction="none")
        return -each.flatten(1).sum(1)

    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return self.logits.sigmoid()

    def sample(self, temperature: float = 1.0) -> Tensor:
        """(B, C, H, W) in {0, 1}."""
        return torch.bernoulli((self.logits / temperature).sigmoid())


class LogisticMixture:
    """Pixels of ``levels`` values: a mixture of logistics cut into bins (PixelCNN++, 1701.05517).

    Values 0 .. levels - 1 stand at equal distances in [-1, 1]; the outer bins reach to infinity,
    so the probabilities of all values add up to 1. Channel c has its means shifted by multiples of
    the channels before it, which differ between components and pixels.

    ``parameters`` (B, components * (1 + 2 C + C (C - 1) / 2), H, W): log weights, means, log
    scales, and the coefficients of earlier channels before tanh.
    """

    MIN_LOG_SCALE = -7.0

    def __init__(self, parameters: Tensor, channels: int, levels: int) -> None:
        pairs = channels * (channels - 1) // 2
        per_component = 1 + 2 * channels + pairs
        batch, total, *size = parameters.shape
        if total % per_component:
            raise ValueError(
                f"parameters must have a multiple of {per_component} channels for images of "
                f"{channels}; got {total}"
            )
        parts = parameters.reshape(batch, per_component, total // per_component, *size)
        weights, means, log_scales, coefficients = parts.split([1, channels, channels, pairs], 1)
        self.levels = levels
        self.log_weights = weights[:, 0].log_softmax(1)  # (B, K, H, W)
        self.means = means  # (B, C, K, H, W)
        self.log_scales = log_scales.clamp(min=self.MIN_LOG_SCALE)
        self.coefficients = coefficients.tanh()  # (B, pairs, K, H, W)

    @staticmethod
    def parameters_per_pixel(channels: int, components: int = 10) -> int:
        return components * (1 + 2 * channels + channels * (channels - 1) // 2)

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) of ``x`` in {0, .., levels - 1} (B, C, H, W)."""
        value = self._place(x)[:, :, None]  # a component axis
        means = [self._mean(c, value) for c in range(value.shape[1])]
        centred = value - torch.stack(means, 1)
        inverse = (-self.log_scales).exp()
        half = 1 / (self.levels - 1)
        above, below = (centred + half) * inverse, (centred - half) * inverse
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which has no
        # cancellation however far out the bin lies. The outer bins keep one factor only.
        inner = -torch.expm1(-2 * half * inverse)
        log_bin = F.logsigmoid(above) + F.logsigmoid(-below) + inner.log()
        first, last = (x == 0)[:, :, None], (x == self.levels - 1)[:, :, None]
        log_bin = torch.where(first, F.logsigmoid(above), log_bin)
        log_bin = torch.where(last, F.logsigmoid(-below), log_bin)
        per_pixel = (self.log_weights + log_bin.sum(1)).logsumexp(1)
        return per_pixel.flatten(1).sum(1)

    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]: of the mixture, each channel given the means before it."""
        weights = self.log_weights.exp()
        value = self.means[:, :0]
        for c in range(self.means.shape[1]):
            mean = (weights * self._mean(c, value)).sum(1, keepdim=True).clamp(-1, 1)
            value = torch.cat([value, mean[:, None].expand_as(self.means[:, :1])], 1)
        return (value[:, :, 0] + 1) / 2

    def sample(self, temperature: float = 1.0) -> Tensor:
        """(B, C, H, W) in {0, .., levels - 1}; the noise of a component is scaled by
        ``temperature``, as is the Gumbel noise that picks it."""
        gumbel = -(-torch.rand_like(self.log_weights).log()).log()
        chosen = (self.log_weights + temperature * gumbel).argmax(1)[:, None, None]
        value = self.means[:, :0, :1]
        for c in range(self.means.shape[1]):
            index = chosen.expand_as(self.means[:, :1, :1])
            mean = self._mean(c, value)[:, None].gather(2, index)
            scale = self.log_scales[:, c : c + 1].exp().gather(2, index)
            noise = torch.rand_like(mean).clamp(1e-6, 1 - 1e-6).logit()
            drawn = (mean + temperature * scale * noise).clamp(-1, 1)
            value = torch.cat([value, drawn], 1)
        return ((value[:, :, 0] + 1) / 2 * (self.levels - 1)).round()

    def _place(self, x: Tensor) -> Tensor:
        return 2 * x / (self.levels - 1) - 1

    def _mean(self, channel: int, value: Tensor) -> Tensor:
        """The means of ``channel``, (B, K, H, W), given the earlier channels of ``value``."""
        start = channel * (channel - 1) // 2
        mean = self.means[:, channel]
        for earlier in range(channel):
            mean = mean + self.coefficients[:, start + earlier] * value[:, earlier]
        return mean


class SpectralRegulariser(nn.Module):
    """The sum of the largest singular values of all weights, which bounds how fast a deep chain of
    layers can change: without it the KL of a deep VAE runs away (NVAE, section 3.2).

    A weight (out, ...) counts as a matrix of ``out`` rows. Weights of one shape are stacked, so a
    step costs a few batched products; the vectors of the power iteration stay from step to step.
    ``gains`` adds the largest |gain| of each batch normalisation, through which a network would
    otherwise escape.
    """

    FIRST_ITERATIONS = 40

    def __init__(self, network: nn.Module, iterations: int = 4) -> None:
        super().__init__()
        self.iterations = iterations
        self._groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        self._gains: list[nn.Parameter] = []
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Conv2d | nn.Linear):
                shape = (weight.shape[0], weight[0].numel())
                self._groups.setdefault(shape, []).append(weight)
            elif isinstance(module, nn.BatchNorm2d) and weight is not None:
                self._gains.append(weight)
        self._vectors: dict[tuple[int, int], Tensor] = {}

    def singular_values(self) -> list[Tensor]:
        """The largest singular value of each weight, by shape; differentiable."""
        return [self._largest(shape, weights) for shape, weights in self._groups.items()]

    def gains(self) -> Tensor:
        """Sum over the batch normalisations of the largest |gain|."""
        return torch.stack([gain.abs().max() for gain in self._gains]).sum()

    def forward(self) -> Tensor:
        total = torch.cat(self.singular_values()).sum()
        return total + self.gains() if self._gains else total

    def _largest(self, shape: tuple[int, int], weights: list[nn.Parameter]) -> Tensor:
        matrices = torch.stack([weight.flatten(1) for weight in weights])
        with torch.no_grad():
            left = self._vectors.get(shape)
            iterations = self.iterations
            if left is None:
                left = torch.randn(len(weights), shape[0], 1).to(matrices)
                iterations = self.FIRST_ITERATIONS
            for _ in range(iterations):
                right = F.normalize(matrices.mT @ left, dim=1)
                moved = F.normalize(matrices @ right, dim=1)
                left = torch.where(moved.any(1, keepdim=True), moved, left)  # a weight of zeros
            self._vectors[shape] = left
        return (left.mT @ matrices @ right)[:, 0, 0]
