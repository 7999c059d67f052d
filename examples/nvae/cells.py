"""The residual cells, and the two ways in which a cell's pixels exchange what they know.

A cell adds a part of what it computes to what it gets, so that at the start a deep stack of them
is close to nothing at all. The paper adds a tenth; with few cells a half learns faster. Source:
Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020,
https://arxiv.org/abs/2007.03898, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastattn

RESIDUAL_SCALE = 0.5
MIXERS = ("attention", "conv")


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.05)


class SqueezeExcite(nn.Module):
    """Each channel times a gate that has seen the whole image. Hu et al. 2017, but Swish for ReLU:
    of four hidden units too many would be dead from the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


class LinearAttention2d(nn.Module):
    """Non-causal linear attention over all pixels, beside a 3 x 3 depthwise convolution.

    NVAE mixes pixels by a 5 x 5 depthwise convolution alone. Here the attention sees the whole
    image, in time linear in the number of pixels, and the convolution singles out neighbours, at
    which linear attention is weak (Han et al., "FLatten Transformer", 2023, pair them as well).

    Linear attention has no order of its own, so queries and keys get a learned vector for each row
    and each column.
    """

    def __init__(self, channels: int, size: int, head_size: int = 16) -> None:
        super().__init__()
        self.heads = max(channels // (4 * head_size), 1)
        inner = self.heads * head_size
        self.conv = depthwise(channels, 3)
        self.query_key_value = nn.Conv2d(channels, 3 * inner, 1)
        self.rows = nn.Parameter(0.5 * torch.randn(2 * inner, size, 1))
        self.columns = nn.Parameter(0.5 * torch.randn(2 * inner, 1, size))
        self.out = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        query_key_value = self.query_key_value(x)
        query, key, value = query_key_value.chunk(3, 1)
        query_place, key_place = (self.rows + self.columns).chunk(2)
        tokens = [
            part.permute(0, 2, 3, 1).reshape(batch, height * width, self.heads, -1).transpose(1, 2)
            for part in (query + query_place, key + key_place, value)
        ]
        seen = fastattn.linear_attention(*tokens, feature_map="elu")  # (B, heads, pixels, D)
        image = seen.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        return self.conv(x) + self.out(image)


def depthwise(channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)


def make_mixer(kind: str, channels: int, size: int) -> nn.Module:
    if kind == "attention":
        return LinearAttention2d(channels, size)
    if kind == "conv":
        return depthwise(channels, 5)
    raise ValueError(f"mixer must be one of {', '.join(MIXERS)}; got {kind!r}")


class EncoderCell(nn.Module):
    """x + 0.5 SE(two times BN-Swish-conv 3x3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            SqueezeExcite(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.body(x)


class DecoderCell(nn.Module):
    """x + 0.5 SE(BN, expand, BN-Swish, mix, BN-Swish, shrink, BN): the mixing of pixels, which is
    what costs, happens without mixing channels, so it can afford many of them."""

    def __init__(self, channels: int, size: int, mixer: str, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        self.body = nn.Sequential(
            norm(channels),
            nn.Conv2d(channels, wide, 1, bias=False),
            norm(wide),
            nn.SiLU(),
            make_mixer(mixer, wide, size),
            norm(wide),
            nn.SiLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
            norm(channels),
            SqueezeExcite(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.body(x)


class Down(nn.Sequential):
    """Half the size: the four pixels of a square become channels, then a 1x1 convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.PixelUnshuffle(2), nn.SiLU(), nn.Conv2d(4 * channels_in, channels_out, 1)
        )


class Up(nn.Sequential):
    """Twice the size: bilinear, then a 1x1 convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        )
