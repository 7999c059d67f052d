"""Linear attention as a good PyTorch user writes it: the peer that matters most.

Non-causal it is two matrix products. Causal it is the chunked form: products within chunks, a
cumulative sum of the states between them. Both take any float type, so in float64 they are also
the truth that everything timed has to agree with, and both are differentiated by autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1, in two passes over memory (as where(x > 0, x + 1, exp(x)) it takes four)."""
    return F.elu(x) + 1


def noncausal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = phi(query), phi(key)
    state = key.transpose(-1, -2) @ value
    total = key.sum(-2).unsqueeze(-1)
    return (query @ state) / (query @ total).clamp_min(EPS)


def causal(query: Tensor, key: Tensor, value: Tensor, chunk: int) -> Tensor:
    """N must be a multiple of ``chunk``, or at most as long.

    The copies pay: batched products over chunks of a strided view would copy more (measured).
    """
    length = query.shape[-2]
    chunk = min(chunk, length)
    shape = (*query.shape[:2], length // chunk, chunk)
    query = phi(query.contiguous()).view(*shape, query.shape[-1])
    key = phi(key.contiguous()).view(*shape, key.shape[-1])
    value = value.contiguous().view(*shape, value.shape[-1])
    scores = (query @ key.transpose(-1, -2)).tril()
    out = scores @ value
    denominator = scores.sum(-1, keepdim=True)
    if length > chunk:
        state = before(key.transpose(-1, -2) @ value)
        total = before(key.sum(-2).unsqueeze(-1))
        out = out + query @ state
        denominator = denominator + query @ total
    return (out / denominator.clamp_min(EPS)).flatten(2, 3)


def before(sums: Tensor) -> Tensor:
    """The sum over all earlier chunks (dimension 2)."""
    return sums.cumsum(2) - sums


def step(query: Tensor, key: Tensor, value: Tensor, S: Tensor, z: Tensor) -> Tensor:
    """One token (N = 1), added to S (B, H, D, Dv) and z (B, H, D) in place."""
    query, key = phi(query.float()), phi(key.float())
    S.addcmul_(key.transpose(-1, -2), value.float())
    z += key.squeeze(2)
    out = (query @ S) / (query @ z.unsqueeze(-1)).clamp_min(EPS)
    return out.to(value.dtype)


def softmax(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """What ``scaled_dot_product_attention`` computes, N^2 scores in memory."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out: Tensor = scores.softmax(-1) @ value
    return out
