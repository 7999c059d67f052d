"""Longer inputs for models with learned absolute positions (BERT reads 512 tokens)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastattn.models.integers import integer

METHODS = ("hierarchical", "repeat", "interpolate")
TABLES = ("position_embeddings", "wpe")  # wpe: GPT-2's
# RoBERTa and its kin number positions from padding_idx + 1: the rows before are no positions.
OFFSET_FAMILIES = ("camembert", "data2vec-text", "roberta", "xlm-roberta")


def position_limit(config: Any) -> int | None:
    """How many tokens a model of this configuration has positions for; None if nothing says so, or
    if they are rotary and any number will do."""
    rows = getattr(config, "max_position_embeddings", None)
    if rows is None or getattr(config, "rope_parameters", None):
        return None
    offset = (config.pad_token_id or 0) + 1 if config.model_type in OFFSET_FAMILIES else 0
    return int(rows) - offset


def extend_positions(
    model: PreTrainedModel, length: int, method: str = "hierarchical", alpha: float = 0.4
) -> Any:
    """Give ``model`` position embeddings for ``length`` tokens, in place, and return it.

    hierarchical: position i n + j of a model with n gets alpha u_i + (1 - alpha) u_j, where
    u = (p - alpha p_0) / (1 - alpha), so the first n stay what they are; up to n^2.
    Source: Su 2020, https://kexue.fm/archives/7947.
    repeat: position i n + j gets what j has, so what a model has learnt about neighbours holds in
    every block of n. Source: Beltagy et al. 2020 (Longformer), section 5.
    interpolate: the n vectors stretched linearly over ``length``: all move, so train afterwards.

    Args:
        model: a transformers model with one table of learned absolute positions.
        length: tokens, at least what the model has positions for. The tokenizer's
            ``model_max_length`` is yours to raise.
        alpha: of ``hierarchical`` alone; between 0 and 1 and not 0.5, which would make (i, j) and
            (j, i) one position.

    Raises:
        TypeError: a length that is no integer.
        ValueError: an unknown method, or a length or alpha out of range.
        NotImplementedError: a model without learned absolute positions.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not 0 < alpha < 1 or alpha == 0.5:
        raise ValueError(f"alpha must be between 0 and 1, and not 0.5; got {alpha}")
    length = integer("length", length)
    owner, name = _owner(model)
    table: nn.Embedding = getattr(owner, name)
    offset = 0 if table.padding_idx is None else table.padding_idx + 1
    old = table.weight.detach()
    n = len(old) - offset
    longest = n * n if method == "hierarchical" else None
    if length < n or (longest is not None and length > longest):
        most = "" if longest is None else f" and at most {longest} (their square)"
        raise ValueError(f"length must be at least the model's {n} positions{most}; got {length}")

    positions = old[offset:].to(torch.promote_types(old.dtype, torch.float32))
    if method == "interpolate":
        extended = _stretch(positions, length)
    elif method == "repeat":
        extended = positions[torch.arange(length, device=old.device) % n]
    else:
        extended = _hierarchical(positions, length, alpha)
        extended[:n] = positions  # equal up to rounding: make it exact
    new = torch.cat([old[:offset], extended.to(old.dtype)])
    extended_table = nn.Embedding.from_pretrained(
        new, freeze=not table.weight.requires_grad, padding_idx=table.padding_idx
    )
    setattr(owner, name, extended_table)
    buffers = {
        "position_ids": torch.arange(len(new), device=old.device).expand(1, -1),
        "token_type_ids": torch.zeros(1, len(new), dtype=torch.long, device=old.device),
    }
    for name, value in buffers.items():
        if hasattr(owner, name):
            owner.register_buffer(name, value, persistent=False)
    model.config.max_position_embeddings = len(new)
    return model


def _owner(model: nn.Module) -> tuple[Any, str]:
    """The module that holds the position embeddings, and their name in it."""
    found = [
        (module, name)
        for module in model.modules()
        for name in TABLES
        if isinstance(getattr(module, name, None), nn.Embedding)
    ]
    if len(found) == 1:
        return found[0]
    if getattr(getattr(model, "config", None), "rope_parameters", None):
        raise NotImplementedError(
            f"{type(model).__name__} has rotary positions: it takes longer inputs as it is"
        )
    names = " or ".join(TABLES)
    raise NotImplementedError(
        f"{type(model).__name__} has no learned absolute positions that are known: it must have "
        f"one nn.Embedding named {names}; found {len(found)}"
    )


def _hierarchical(old: Tensor, length: int, alpha: float) -> Tensor:
    base = (old - alpha * old[:1]) / (1 - alpha)
    position = torch.arange(length, device=old.device)
    return alpha * base[position // len(old)] + (1 - alpha) * base[position % len(old)]


def _stretch(old: Tensor, length: int) -> Tensor:
    return F.interpolate(old.T[None], size=length, mode="linear", align_corners=True)[0].T
