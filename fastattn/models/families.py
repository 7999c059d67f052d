"""The encoder families that can be linearised: which of their modules attend."""

from __future__ import annotations

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


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of ``model``, first layer first.

    Raises:
        NotImplementedError: a family without linear attention, or a decoder.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in ATTENTION_CLASSES:
        raise NotImplementedError(
            f"linear attention is not supported in {type(model).__name__} "
            f"(model_type {family!r}); supported: {', '.join(ATTENTION_CLASSES)}"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise NotImplementedError("decoders and cross-attention are not supported yet")
    name = ATTENTION_CLASSES[family]
    found = [module for module in model.modules() if type(module).__name__ == name]
    if not found:
        raise NotImplementedError(f"found no {name} in {type(model).__name__}")
    return found
