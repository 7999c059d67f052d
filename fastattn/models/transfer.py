"""Attention transfer: fit linear attention, layer by layer, to the softmax it replaces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastattn.models.attention import keep_2d_mask, key_mask, linear, softmax_forward
from fastattn.models.conversion import MAPS
from fastattn.models.families import attention_modules
from fastattn.models.marks import MARK, is_linear

TRANSFER = "fastattn_transfer_{}"  # a name for each context: several may be open
_numbers = itertools.count()
INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


@contextmanager
def attention_transfer(
    model: PreTrainedModel,
) -> Iterator[Callable[[nn.Module, dict[str, Tensor]], Tensor]]:
    """Within it, softmax attention flows through ``model`` and only the feature maps require
    gradients; yields the loss: the squared error of each layer's linear attention output relative
    to the variance of the softmax output, summed over layers. Local layers (ModernBERT's) keep
    their window.

    Raises:
        ValueError: ``model`` is not linearised; of the loss: it has no linear layer.
    """
    modules = attention_modules(model)
    if not is_linear(model.config):
        raise ValueError("model must be linearised: call fastattn.linearize(model, ...) first")
    previous = model.config._attn_implementation
    losses: list[Tensor] = []

    def forward(
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
        out, _ = softmax_forward(
            module, query, key, value, attention_mask, scaling, 0.0, sliding_window, **kwargs
        )
        if getattr(module, MARK) is not None:
            mask, target = key_mask(attention_mask), out.transpose(1, 2)
            with torch.enable_grad():
                got = linear(module, query.detach(), key.detach(), value.detach(), mask)
                losses.append(relative_error(got.float(), target.float(), mask))
        return out, None

    name = TRANSFER.format(next(_numbers))
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, keep_2d_mask)
    maps = {
        id(p) for m in modules for n in MAPS if hasattr(m, n) for p in getattr(m, n).parameters()
    }
    required = {p: p.requires_grad for p in model.parameters()}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses.clear()
        with torch.no_grad():
            model(**{name: batch[name] for name in INPUTS if name in batch})
        if not losses:
            raise ValueError("no layer of the model is linear: there is nothing to fit")
        return torch.stack(losses).sum()

    try:
        model.set_attn_implementation(name)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in maps)
        yield loss
    finally:
        losses.clear()  # transformers keeps the function that was registered, and it these
        model.set_attn_implementation(previous)
        for parameter, was in required.items():
            parameter.requires_grad_(was)


def relative_error(got: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over the variance across tokens, both over the tokens that take part."""
    weight = (
        torch.ones_like(target[:, :1, :, :1]) if mask is None else mask[:, None, :, None].to(target)
    )
    mean = (target * weight).sum((0, 2), keepdim=True) / weight.sum()
    variance = ((target - mean).square() * weight).sum()
    return ((got - target).square() * weight).sum() / variance.clamp_min(1e-6)
