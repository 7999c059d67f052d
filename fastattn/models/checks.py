"""What transformers may ask of an attention function that ours can't do: refused in a sentence."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastattn.models.families import ATTENTION_CLASSES, is_supported
from fastattn.models.marks import MARK, NAME, is_linear


def check_module(module: nn.Module) -> None:
    """Raises:
    NotImplementedError: ``module`` has no linear attention, or not yet.
    ValueError: its model was not linearised, though its configuration says so.
    """
    name = type(module).__name__
    if "CrossAttention" in name or getattr(module, "is_cross_attention", False):
        raise NotImplementedError(f"cross-attention ({name}) has no linear attention")
    if not is_supported(module):
        raise NotImplementedError(
            f"{name} has no linear attention; supported: {', '.join(ATTENTION_CLASSES.values())}"
        )
    if hasattr(module, MARK):
        return
    if is_linear(module.config):
        raise ValueError(
            "this model was not linearised, but shares its config object with one that was: build "
            "each from a config of its own, copy.deepcopy(config)"
        )
    if getattr(module, "is_causal", False):
        raise NotImplementedError(
            f"{name} is that of a decoder, whose cache needs fastattn.linearize(model)"
        )


def check_weights(asked: dict[str, Any]) -> None:
    """Raises:
    NotImplementedError: attention weights are asked for.
    """
    if asked.get("output_attentions"):
        raise NotImplementedError(
            "linear attention never forms its weights: call the model without "
            "output_attentions=True, or restore softmax attention with fastattn.restore(model)"
        )


def refuse_weights(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """The hook of a decoder: GPT-2 doesn't tell its attention modules that weights are wanted."""
    if model.config._attn_implementation == NAME:
        check_weights(kwargs)


def check_causality(module: Any, asked: dict[str, Any]) -> None:
    """Raises:
    NotImplementedError: a decoder is asked to see what follows, or an encoder not to.
    """
    own = bool(getattr(module, "is_causal", False))
    for where, wanted in (
        ("is_causal", asked.get("is_causal")),
        ("config.is_causal", getattr(module.config, "is_causal", None)),
    ):
        if wanted is not None and bool(wanted) != own:
            raise NotImplementedError(
                f"{where}={wanted}: {type(module).__name__} is {'causal' if own else 'not causal'}"
                " and its linear attention can't be made otherwise; leave that out"
            )


def check_softmax(module: Any, asked: dict[str, Any]) -> None:
    """Of ``attn_implementation="fastattn_softmax"``, which is for encoders in training.

    Raises:
        NotImplementedError: it is asked for something else.
    """
    if getattr(module, "is_causal", False) or asked.get("is_causal"):
        raise NotImplementedError(
            f'attn_implementation="fastattn_softmax" is not causal, as {type(module).__name__} '
            'must be: take "sdpa"'
        )
    if asked.get("output_attentions"):
        raise NotImplementedError(
            'attn_implementation="fastattn_softmax" gives no weights: take "eager" for '
            "output_attentions=True"
        )
    if asked.get("position_bias") is not None:
        raise NotImplementedError(
            'attn_implementation="fastattn_softmax" takes no position_bias, which '
            f'{type(module).__name__} adds to its scores: take "sdpa"'
        )
