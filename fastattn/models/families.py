"""The families that can be linearised: which of their modules attend."""

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
DECODER_CLASSES = {
    "gpt2": "GPT2Attention",
    **{
        family: ATTENTION_CLASSES[family]
        for family in ("bert", "camembert", "electra", "roberta", "xlm-roberta")
    },
}


def is_supported(module: nn.Module) -> bool:
    """Whether ``module`` is the self-attention of a known family."""
    known = {*ATTENTION_CLASSES.values(), *DECODER_CLASSES.values()}
    return any(base.__name__ in known for base in type(module).__mro__)


def is_decoder(model: nn.Module) -> bool:
    """Whether ``model`` attends causally (a BERT with ``config.is_decoder``, GPT-2)."""
    config: Any = model.config
    return config.model_type == "gpt2" or bool(getattr(config, "is_decoder", False))


def is_local(module: nn.Module) -> bool:
    """Whether ``module`` attends within a window only (two of three layers of ModernBERT)."""
    return getattr(module, "sliding_window", None) is not None


def attention_modules(model: nn.Module, decoders: bool = False) -> list[nn.Module]:
    """The self-attention modules of ``model``, first layer first.

    Layers that share their weights (ALBERT) share one module. ``decoders``: also take decoders.

    Raises:
        TypeError: no transformers model.
        NotImplementedError: a family without linear attention, cross-attention, or a decoder that
            isn't asked for.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family is None:
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    causal = is_decoder(model)
    classes = DECODER_CLASSES if causal else ATTENTION_CLASSES
    if family not in classes:
        raise NotImplementedError(
            f"linear attention is not supported in {type(model).__name__} "
            f"(model_type {family!r}); supported: {', '.join(classes)}"
        )
    if getattr(config, "add_cross_attention", False):
        raise NotImplementedError(
            f"{type(model).__name__} is a decoder with cross-attention, which has no linear form"
        )
    if causal and not decoders:
        raise NotImplementedError(
            f"{type(model).__name__} is a decoder: this is supported in encoders only"
        )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions.startswith("relative"):
        raise NotImplementedError(
            f"{type(model).__name__} adds relative positions ({positions!r}) to the attention "
            "scores, which linear attention does not have"
        )
    found = [module for module in model.modules() if is_supported(module)]
    if not found:
        raise NotImplementedError(f"found no {classes[family]} in {type(model).__name__}")
    return found
