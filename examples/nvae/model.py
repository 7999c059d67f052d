"""The network: a tower that reads the image from fine to coarse, and one that writes it back.

Latents come in groups z_1 .. z_L from coarse to fine, with the prior p(z_l | z_<l) and the
posterior q(z_l | z_<l, x). Both towers share the writing half: q sees the writer's state next to
the reader's features, and says only how it differs from p (NVAE, sections 3.1 and 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.nvae.cells import DecoderCell, Down, EncoderCell, Up
from examples.nvae.exact import Bernoulli, LogisticMixture, Normal, residual_kl
from examples.nvae.flow import Flow


@dataclass(frozen=True)
class Shape:
    """What a network is made of. ``groups`` counts latent groups per scale, coarsest first; each
    scale has twice the height and width of the one before."""

    size: int
    image_channels: int = 1
    levels: int = 2  # 2: Bernoulli pixels; else the grey levels of a logistic mixture
    channels: int = 16  # at full resolution; doubled at each halving up to max_channels
    max_channels: int = 32
    latent_channels: int = 8
    halvings: int = 1  # between the image and the finest scale of latents
    groups: tuple[int, ...] = (2, 2)
    cells: int = 1  # per group, and before and after the towers
    expand: int = 2  # how many times wider a cell of the writer is inside
    mixer: str = "attention"
    flow: bool = False

    def __post_init__(self) -> None:
        shrink = 2 ** (self.halvings + len(self.groups) - 1)
        if self.size % shrink:
            raise ValueError(
                f"size must be a multiple of {shrink} for {self.halvings} halvings and "
                f"{len(self.groups)} scales; got {self.size}"
            )

    def width(self, halvings: int) -> int:
        """Channels after so many halvings of the image."""
        return min(self.channels * 2**halvings, self.max_channels)

    @property
    def scales(self) -> list[tuple[int, int, int]]:
        """(channels, size, groups) of each scale of latents, coarsest first."""
        last = self.halvings + len(self.groups) - 1
        return [
            (self.width(last - i), self.size // 2 ** (last - i), groups)
            for i, groups in enumerate(self.groups)
        ]

    def likelihood(self, parameters: Tensor) -> Bernoulli | LogisticMixture:
        if self.levels == 2:
            return Bernoulli(parameters)
        return LogisticMixture(parameters, self.image_channels, self.levels)

    @property
    def parameters_per_pixel(self) -> int:
        kind = Bernoulli if self.levels == 2 else LogisticMixture
        return kind.parameters_per_pixel(self.image_channels)


@dataclass(frozen=True)
class Encoded:
    """What the network says of images x (B, C, H, W), with one draw of all latents.

    ``kl`` (L, B): KL(q || p) of each group, in nats, in closed form where there is one.
    ``log_ratio`` (L, B): log q(z_l) - log p(z_l) at the draw, whose mean is ``kl``.
    """

    likelihood: Bernoulli | LogisticMixture
    kl: Tensor
    log_ratio: Tensor


class Group(nn.Module):
    """One group of latents: the cells that lead to it, its prior and its posterior."""

    def __init__(self, shape: Shape, channels: int, size: int, is_first: bool) -> None:
        super().__init__()
        latent = shape.latent_channels
        self.cells = nn.Sequential(
            *(
                DecoderCell(channels, size, shape.mixer, shape.expand)
                for _ in range(0 if is_first else shape.cells)
            )
        )
        # The first prior is N(0, 1).
        self.prior = (
            None if is_first else nn.Sequential(nn.ELU(), nn.Conv2d(channels, 2 * latent, 1))
        )
        self.see = None if is_first else nn.Conv2d(channels, channels, 1)
        self.posterior = nn.Conv2d(channels, 2 * latent, 3, padding=1)
        self.flow = Flow(latent) if shape.flow else None
        self.combine = nn.Conv2d(channels + latent, channels, 1)

    def prior_of(self, state: Tensor) -> Normal:
        if self.prior is None:
            batch, _, height, width = state.shape
            zeros = state.new_zeros(batch, self.posterior.out_channels // 2, height, width)
            return Normal(zeros, zeros)
        return Normal.from_network(self.prior(state))

    def encode(self, state: Tensor, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The draw from q, KL and log ratio (B,), given the reader's ``feature``."""
        prior = self.prior_of(state)
        seen = feature if self.see is None else feature + self.see(state)
        delta = Normal.from_network(self.posterior(seen))
        posterior = prior.shifted(delta)
        z = posterior.sample()
        log_q = posterior.log_prob(z)
        if self.flow is None:
            return z, residual_kl(prior, delta), log_q - prior.log_prob(z)
        z = self.flow(z)
        log_ratio = log_q - prior.log_prob(z)
        return z, log_ratio, log_ratio

    def join(self, state: Tensor, z: Tensor) -> Tensor:
        return self.combine(torch.cat([state, z], 1))


class NVAE(nn.Module):
    """The two towers. ``encode`` for training and bounds, ``sample`` for images."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self._make_reader(shape)
        self._make_writer(shape)
        self.to(memory_format=torch.channels_last)  # pixels as tokens, and faster convolutions

    def _make_reader(self, shape: Shape) -> None:
        self.stem = nn.Conv2d(shape.image_channels, shape.width(0), 3, padding=1)
        before: list[nn.Module] = []
        for halving in range(shape.halvings):
            width = shape.width(halving)
            before += [EncoderCell(width) for _ in range(shape.cells)]
            before += [Down(width, shape.width(halving + 1))]
        self.before = nn.Sequential(*before)
        # Finest scale first: one stack of cells for each group, and a halving between scales.
        self.readers = nn.ModuleList()
        scales = shape.scales[::-1]
        for i, (channels, _, groups) in enumerate(scales):
            for g in range(groups):
                cells: list[nn.Module] = [EncoderCell(channels) for _ in range(shape.cells)]
                if i > 0 and g == 0:
                    cells.insert(0, Down(scales[i - 1][0], channels))
                self.readers.append(nn.Sequential(*cells))
        top = scales[-1][0]
        self.top = nn.Sequential(nn.ELU(), nn.Conv2d(top, top, 1), nn.ELU())

    def _make_writer(self, shape: Shape) -> None:
        channels, size, _ = shape.scales[0]
        self.start = nn.Parameter(torch.randn(1, channels, size, size))
        self.groups = nn.ModuleList()
        self.ups = nn.ModuleDict()  # by the number of the group before which they stand
        previous = channels
        for channels, size, groups in shape.scales:
            if self.groups:
                self.ups[str(len(self.groups))] = Up(previous, channels)
            for _ in range(groups):
                self.groups.append(Group(shape, channels, size, is_first=not self.groups))
            previous = channels
        after: list[nn.Module] = []
        for halving in reversed(range(shape.halvings)):
            after += [Up(previous, shape.width(halving))]
            previous = shape.width(halving)
            after += [
                DecoderCell(previous, shape.size // 2**halving, shape.mixer, shape.expand)
                for _ in range(shape.cells)
            ]
        self.after = nn.Sequential(
            *after, nn.ELU(), nn.Conv2d(previous, shape.parameters_per_pixel, 3, padding=1)
        )

    def encode(self, x: Tensor) -> Encoded:
        """``x`` (B, C, H, W): pixels in 0 .. levels - 1."""
        x = x.contiguous(memory_format=torch.channels_last)
        hidden = self.before(self.stem(2 * x / (self.shape.levels - 1) - 1))
        features = []
        for reader in self.readers:
            hidden = reader(hidden)
            features.append(hidden)
        features[-1] = self.top(hidden)
        state = self.start.expand(len(x), -1, -1, -1)
        kls, log_ratios = [], []
        for number, (group, feature) in enumerate(zip(self.groups, reversed(features))):
            state = self._reach(number, state)
            z, kl, log_ratio = group.encode(state, feature)
            state = group.join(state, z)
            kls.append(kl)
            log_ratios.append(log_ratio)
        likelihood = self.shape.likelihood(self.after(state))
        return Encoded(likelihood, torch.stack(kls), torch.stack(log_ratios))

    def decode(self, count: int, temperature: float = 1.0) -> Bernoulli | LogisticMixture:
        """The pixels' distribution for ``count`` draws from the prior, whose standard deviations
        are multiplied by ``temperature``."""
        state = self.start.expand(count, -1, -1, -1)
        for number, group in enumerate(self.groups):
            state = self._reach(number, state)
            # A flow is part of the posterior: the prior is of what comes out of it.
            state = group.join(state, group.prior_of(state).sample(temperature))
        return self.shape.likelihood(self.after(state))

    def _reach(self, number: int, state: Tensor) -> Tensor:
        """The writer's state just before group ``number`` is drawn."""
        if str(number) in self.ups:
            state = self.ups[str(number)](state)
        return self.groups[number].cells(state)

    def group_sizes(self) -> list[tuple[int, int]]:
        """(size, groups of that size) for each group, for balancing their KLs."""
        return [(size, groups) for _, size, groups in self.shape.scales for _ in range(groups)]


@torch.no_grad()
def reestimate_batch_norm(
    model: NVAE, temperature: float, count: int = 100, batches: int = 10
) -> None:
    """Batch statistics of the writer as they are at ``temperature``: those of training belong to
    wider draws, and wash the samples out. Changes buffers only; the reader's stay.
    """
    norms = [
        module
        for part in (model.groups, model.ups, model.after)
        for module in part.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    momenta, was_training = [module.momentum for module in norms], model.training
    model.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the plain mean over all batches
        module.train()
    for _ in range(batches):
        model.decode(count, temperature)
    for module, momentum in zip(norms, momenta):
        module.momentum = momentum
    model.train(was_training)
