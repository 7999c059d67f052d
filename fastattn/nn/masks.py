"""The masks of ``torch.nn.MultiheadAttention``, as far as linear attention can honour them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.check import check_tensor


def key_mask(padding: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of ``torch.nn.MultiheadAttention``'s convention, True where a key takes part."""
    check_tensor("key_padding_mask", padding)
    if padding.shape != shape:
        raise ValueError(f"key_padding_mask must have shape {shape}; got {tuple(padding.shape)}")
    if padding.dtype == torch.bool:
        return ~padding
    if not padding.is_floating_point():
        raise TypeError(f"key_padding_mask must be bool or floating point; got {padding.dtype}")
    takes_part = padding == 0
    known = (takes_part | (padding <= torch.finfo(padding.dtype).min)).all()
    message = "key_padding_mask must hold 0 (take part) and -inf (ignore) only, if not bool"
    if torch.compiler.is_compiling() or padding.device.type != "cpu":
        torch._assert_async(known, message)
    elif not known:
        raise ValueError(message)
    return takes_part


def is_causal(mask: Tensor, hint: bool, shape: tuple[int, int], rows: int) -> bool:
    """Whether ``attn_mask``, of N queries and M keys (``shape``), and ``is_causal`` together ask
    for causal attention. ``rows``: heads of the whole batch, which a mask may have one by one."""
    check_tensor("attn_mask", mask)
    if mask.shape not in (shape, (rows, *shape)):
        raise ValueError(
            f"attn_mask must have shape {shape} or {(rows, *shape)}; got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating point; got {mask.dtype}")
    if torch.compiler.is_compiling():
        if hint:
            return True
        raise ValueError(
            "under torch.compile the contents of attn_mask can't be seen: for causal attention "
            "pass is_causal=True"
        )
    hidden = mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    if mask.dtype == torch.bool or bool((hidden | (mask == 0)).all()):
        if not hint and not hidden.any():
            return False
        is_square = mask.dim() == 2 and mask.shape[0] == mask.shape[1]
        if is_square and torch.equal(hidden, torch.ones_like(hidden).triu(1)):
            return True
    raise ValueError(
        "attn_mask must be the causal mask (N, N): linear attention can't choose which token sees "
        f"which; got another mask of shape {tuple(mask.shape)}"
    )
