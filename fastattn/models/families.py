"""The encoder families that can be linearised: which of their modules attend."""

from __future__ import annotations

from typing import Any

from torch import nn

# Classes whose forward calls the attention interface for self-attention over one sequence.
ATTENTION_CLASSES = {
    "albert": "AlbertAttention",
    "bert": "BertSelfAttention",
    "camembert": "CamembertSelfAttention",
    "data2vec-text": "Data2VecTextSelfAttention",
    "distilbert": "DistilBertSelfAttention",
    "electra": "ElectraSelfAttention",
    "ernie": "ErnieSelfAttention",
    "modernbert": "ModernBertAttention",
    "roberta": "RobertaSelfAttention",
    "xlm-roberta": "XLMRobertaSelfAttention",
}


def is_supported(module: nn.Module) -> bool:
    """Whether ``module`` is the self-attention of a known family."""
    return any(base.__name__ in ATTENTION_CLASSES.values() for base in type(module).__mro__)


def is_local(module: nn.Module) -> bool:
    """Whether ``module`` attends within a window only (two of three layers of ModernBERT)."""
    return getattr(module, "sliding_window", None) is not None


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of ``model``, first layer first.

    Layers that share their weights (ALBERT) share one module.

    Raises:
        TypeError: no transformers model.
        NotImplementedError: a family without linear attention, or a decoder.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family is None:
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    if family not in ATTENTION_CLASSES:
        raise NotImplementedError(
            f"linear attention is not supported in {type(model).__name__} "
            f"(model_type {family!r}); supported: {', '.join(ATTENTION_CLASSES)}"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(
            f"{type(model).__name__} is a decoder (config.is_decoder or add_cross_attention): "
            "linear attention is supported in encoders"
        )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions.startswith("relative"):
        raise NotImplementedError(
            f"{type(model).__name__} adds relative positions ({positions!r}) to the attention "
            "scores, which linear attention does not have"
        )
    found = [module for module in model.modules() if is_supported(module)]
    if not found:
        raise NotImplementedError(f"found no {ATTENTION_CLASSES[family]} in {type(model).__name__}")
    return found
