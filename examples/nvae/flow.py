"""A volume-preserving inverse autoregressive flow: a posterior that need not be a normal one.

Each cell maps z to z - shift(z), where the shift of an element depends on the elements before it
only (rows from the top, columns from the left, channels in order). The Jacobian is triangular with
ones on its diagonal, so the density of the result is that of what went in. A second cell in the
opposite order lets every element depend on every other. Source: Kingma et al., "Improved
Variational Inference with Inverse Autoregressive Flow", 2016, https://arxiv.org/abs/1606.04934.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees earlier pixels, and of its own pixel the channels that are allowed:
    ``allowed`` is bool (out, in)."""

    def __init__(self, allowed: Tensor, kernel: int) -> None:
        channels_out, channels_in = allowed.shape
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)
        middle = kernel // 2
        mask = torch.zeros(channels_out, channels_in, kernel, kernel)
        mask[:, :, :middle] = 1
        mask[:, :, middle, :middle] = 1
        mask[:, :, middle, middle] = allowed.float()
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class AutoregressiveCell(nn.Module):
    """z to z - shift(z); ``backwards`` turns the order of pixels and channels round."""

    def __init__(self, channels: int, backwards: bool, hidden: int = 6, kernel: int = 3) -> None:
        super().__init__()
        self.backwards = backwards
        place = torch.arange(channels)
        # A hidden channel has the place of the channel it works for (Germain et al., MADE, 2015).
        inner = place.repeat(hidden)
        self.shift = nn.Sequential(
            MaskedConv2d(place[None, :] < inner[:, None], kernel),
            nn.ELU(),
            MaskedConv2d(inner[None, :] <= inner[:, None], kernel),
            nn.ELU(),
            MaskedConv2d(inner[None, :] <= place[:, None], 1),
        )
        nn.init.normal_(self.shift[-1].weight, std=1e-3)
        nn.init.zeros_(self.shift[-1].bias)

    def forward(self, z: Tensor) -> Tensor:
        if self.backwards:
            return (z.flip(1, 2, 3) - self.shift(z.flip(1, 2, 3))).flip(1, 2, 3)
        return z - self.shift(z)

    def inverse(self, z: Tensor) -> Tensor:
        """What was mapped to ``z``. Each pass gets one more element right, so this is slow and
        for checking only: training needs the forward direction alone."""
        y = z.flip(1, 2, 3) if self.backwards else z
        x = y
        for _ in range(z[0].numel()):
            x = y + self.shift(x)
        return x.flip(1, 2, 3) if self.backwards else x


class Flow(nn.Sequential):
    """Two mirrored cells. The log-determinant of the Jacobian is 0."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            AutoregressiveCell(channels, backwards=False),
            AutoregressiveCell(channels, backwards=True),
        )

    def inverse(self, z: Tensor) -> Tensor:
        for cell in reversed(self):
            z = cell.inverse(z)
        return z
