"""``attn_implementation="fastattn_linear"``: transformers' attention interface onto our op.

The mask function hands the 2-D padding mask on as it is (without one registered, transformers
would silently pass no mask at all); the attention function turns it into a key mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from fastattn.ops import linear_attention

NAME = "fastattn_linear"
DEFAULT_MAP = "elu"


def keep_2d_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The padding mask (B, M), unchanged."""
    return attention_mask


def linear_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, H, N, D) projections to the output (B, N, H, D); linear or, for a layer that was left
    out of ``linearize``, softmax."""
    if kwargs.get("output_attentions"):
        raise NotImplementedError("linear attention has no weights: output_attentions must be off")
    if kwargs.get("sliding_window") is not None:
        raise NotImplementedError("linear attention can't attend to a sliding window")
    mask = key_mask(attention_mask)
    if getattr(module, "fastattn_softmax", False):
        return softmax(query, key, value, mask, scaling).transpose(1, 2), None
    return linear(module, query, key, value, mask).transpose(1, 2), None


def linear(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """Linear attention of one module, with its learned feature maps if it has them."""
    query_map = getattr(module, "query_feature_map", None)
    if query_map is not None:
        query, key, name = query_map(query), module.key_feature_map(key), "features"
    else:
        name = getattr(module, "fastattn_feature_map", DEFAULT_MAP)
    value = value.to(query.dtype)
    return linear_attention(query, key, value, feature_map=name, key_mask=mask)


def softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def key_mask(attention_mask: Tensor | None) -> Tensor | None:
    """transformers' mask to a bool mask (B, M), True where a key takes part."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise NotImplementedError(
            "linear attention takes a padding mask of shape (batch, tokens); got shape "
            f"{tuple(attention_mask.shape)}: which token sees which can't be chosen"
        )
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0


AttentionInterface.register(NAME, linear_forward)
AttentionMaskInterface.register(NAME, keep_2d_mask)
