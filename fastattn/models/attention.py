"""``attn_implementation="fastattn_linear"``: transformers' attention interface onto our op.

The mask function hands the 2-D padding mask on as it is (without one registered, transformers
would silently pass no mask at all); the attention function turns it into a key mask. Layers that
keep softmax (left out of ``linearize``, or local by design) run it here as well, so that one
model has one attention implementation.

``attn_implementation="fastattn_softmax"`` is softmax in all layers of an encoder, which training
takes: PyTorch's kernel is slow on a CPU in bfloat16, see ``softmax``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastattn.models.cache import LAYER, StateLayer, causal
from fastattn.models.checks import check_causality, check_module, check_softmax, check_weights
from fastattn.models.marks import MARK, NAME
from fastattn.nn.feature_maps import for_kernel
from fastattn.ops import linear_attention

SOFTMAX = "fastattn_softmax"
HEAD = "fastattn_self_terminating"
DEFAULT_MAP = "elu"
SHORT = 256  # keys, up to which products in bfloat16 beat PyTorch's kernel on a CPU


def keep_2d_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask (B, M), unchanged.

    Raises:
        NotImplementedError: the model adds rules of its own about which token sees which, or
            position_ids say that several texts share a row.
    """
    if kwargs.get("use_vmap"):
        raise NotImplementedError("linear attention takes a padding mask, no other mask function")
    known = mask_function in (causal_mask_function, bidirectional_mask_function)
    if not known and "local_size" not in kwargs:
        _refuse_packing(mask_function, **kwargs)
    return attention_mask


def _refuse_packing(mask_function: Callable[..., Any], **sizes: Any) -> None:
    """transformers hides texts packed into one row from each other where their position_ids start
    again. While tracing it can't tell whether they do, so that is checked when the graph runs (not
    in one of torch.jit.trace, which drops the check)."""
    message = (
        "position_ids start again within a row: linear attention does not keep several texts in "
        "one row apart; give each a row of its own, with an attention_mask"
    )
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not (tracing or torch.compiler.is_compiling()):
        raise NotImplementedError(message)
    rows = torch.arange(sizes["batch_size"], device=sizes["device"])
    last = torch.full_like(rows, sizes["q_length"] - 1)
    whole = mask_function(rows, torch.zeros_like(rows), last, torch.zeros_like(rows))
    torch._assert_async(whole.all(), message)


def linear_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, H, N, D) projections to (B, N, H, D) and no weights.

    Args:
        attention_mask: the padding mask (B, M), nonzero where a token takes part.
        scaling, dropout: of the layers that keep softmax; linear attention has no use for them.
        sliding_window: such layers (ModernBERT's) keep softmax, in blocks: they are linear in the
            length already.
    """
    check_weights(kwargs)
    check_module(module)
    check_causality(module, kwargs)
    keeps_softmax = getattr(module, MARK, DEFAULT_MAP) is None
    if keeps_softmax or sliding_window is not None:
        return softmax_forward(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window
        )
    if dropout and not torch.compiler.is_compiling():
        _say_no_dropout()
    mask = key_mask(attention_mask)
    return linear(module, query, key, value, mask, kwargs.get(LAYER)).transpose(1, 2), None


def softmax_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As ``linear_forward``, with softmax attention, which is not causal."""
    check_softmax(module, kwargs)
    mask = key_mask(attention_mask)
    if sliding_window is None:
        out = softmax(query, key, value, mask, scaling, dropout)
    else:
        reach = sliding_window - 1  # transformers counts the token itself
        out = local_softmax(query, key, value, mask, reach, scaling, dropout)
    return out.transpose(1, 2), None


def linear(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    layer: StateLayer | None = None,
) -> Tensor:
    """Linear attention of one module, with its own feature maps if it has them; in a decoder
    causal, with its state in ``layer`` of the cache."""
    query_map = getattr(module, "query_feature_map", None)
    if query_map is not None:
        query, name = for_kernel(query_map, query)
        key, _ = for_kernel(module.key_feature_map, key)
    else:
        name = getattr(module, MARK, DEFAULT_MAP)
    value = value.to(query.dtype)
    if getattr(module, "is_causal", False):
        return causal(layer, query, key, value, mask, name)
    return linear_attention(query, key, value, feature_map=name, key_mask=mask)


def softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention under a key mask (B, M).

    PyTorch's bfloat16 kernel for CPUs takes 35 to 80 ms for the backward pass of 64 texts of 16 to
    64 tokens (12 heads of 32, one thread), where products and a softmax in between take 2 to 10.
    """
    mask = None if mask is None else mask[:, None, None, :]
    short = query.dtype == torch.bfloat16 and key.shape[-2] <= SHORT and not dropout
    if short and query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = (query @ key.mT).float() * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout
    )


def local_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    reach: int,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each token to those at most ``reach`` away, in time linear in N.

    The queries of a block of ``reach`` tokens see keys of their own block and its two neighbours.
    """
    batch, _, tokens, _ = query.shape
    size = max(reach, 1)  # of a block
    blocks = (tokens + size - 1) // size
    after = blocks * size - tokens
    device = query.device
    if mask is None:
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)

    def windows(x: Tensor) -> Tensor:  # (B, H, tokens, D) to (B blocks, H, 3 size, D)
        padded = F.pad(x, (0, 0, size, size + after))
        return padded.unfold(2, 3 * size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)

    seen = F.pad(mask, (size, size + after), value=False).unfold(1, 3 * size, size)
    at = torch.arange(3 * size, device=device) - size
    at = at - torch.arange(size, device=device).unsqueeze(1)  # of the key, seen from the query
    # A token always sees itself: rows without any key would be NaN.
    allowed = ((at.abs() <= reach) & seen[:, :, None, :]) | (at == 0)
    in_blocks = F.pad(query, (0, 0, 0, after)).unflatten(2, (blocks, size))
    out: Tensor = F.scaled_dot_product_attention(
        in_blocks.transpose(1, 2).flatten(0, 1),
        windows(key),
        windows(value),
        attn_mask=allowed.flatten(0, 1).unsqueeze(1),
        scale=scaling,
        dropout_p=dropout,
    )
    out = out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :tokens]


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


@functools.cache
def _say_no_dropout() -> None:
    warnings.warn(
        "linear attention has no attention weights to drop: the model's attention dropout has no "
        "effect in its linear layers",
        stacklevel=2,
    )


AttentionInterface.register(NAME, linear_forward)
AttentionInterface.register(SOFTMAX, softmax_forward)
# The name that a saved self-terminating head gives a softmax decoder's attention: `checkpoint`
# takes it out again before the model ever runs.
AttentionInterface.register(HEAD, ALL_ATTENTION_FUNCTIONS["sdpa"])
AttentionMaskInterface.register(HEAD, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
AttentionMaskInterface.register(NAME, keep_2d_mask)
AttentionMaskInterface.register(SOFTMAX, keep_2d_mask)
