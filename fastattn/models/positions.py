"""Longer inputs for models with learned absolute positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METHODS = ("hierarchical", "interpolate")


def extend_positions(
    model: nn.Module, length: int, method: str = "hierarchical", alpha: float = 0.4
) -> Any:
    """Give ``model`` position embeddings for ``length`` tokens, in place, and return it.

    hierarchical: position i n + j of a model with n gets alpha u_i + (1 - alpha) u_j, where
    u = (p - alpha p_0) / (1 - alpha), so the first n stay what they are (Su 2020); up to n^2.
    interpolate: the n vectors stretched linearly over ``length``.

    Raises:
        ValueError: an unknown method, or a length that is not more than the present one or more
            than the method can give.
        NotImplementedError: a model without learned absolute positions, or one (RoBERTa) that
            counts positions from its padding index.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    owners = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding)
    ]
    if len(owners) != 1:
        raise NotImplementedError(f"{type(model).__name__} has no learned absolute positions")
    owner: Any = owners[0]
    if owner.position_embeddings.padding_idx is not None:
        raise NotImplementedError(
            f"{type(model).__name__} counts positions from its padding index: not supported"
        )
    old = owner.position_embeddings.weight.detach()
    n = len(old)
    if length < n or (method == "hierarchical" and length > n * n):
        raise ValueError(f"length must be within {n}..{n * n}; got {length}")
    new = _hierarchical(old, length, alpha) if method == "hierarchical" else _stretch(old, length)
    owner.position_embeddings = nn.Embedding.from_pretrained(new, freeze=False)
    buffers = {
        "position_ids": torch.arange(length, device=old.device).expand(1, -1),
        "token_type_ids": torch.zeros(1, length, dtype=torch.long, device=old.device),
    }
    for name, value in buffers.items():
        if hasattr(owner, name):
            owner.register_buffer(name, value, persistent=False)
    config: Any = model.config
    config.max_position_embeddings = length
    return model


def _hierarchical(old: Tensor, length: int, alpha: float) -> Tensor:
    base = (old - alpha * old[:1]) / (1 - alpha)
    position = torch.arange(length, device=old.device)
    new = alpha * base[position // len(old)] + (1 - alpha) * base[position % len(old)]
    new[: len(old)] = old  # equal up to rounding: make it exact
    return new


def _stretch(old: Tensor, length: int) -> Tensor:
    return F.interpolate(old.T[None], size=length, mode="linear", align_corners=True)[0].T.clone()
