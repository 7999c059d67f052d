"""A tiny encoder of every supported family, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # with the usual 0.02 all attention is nearly uniform
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Albert": {**SIZES, "embedding_size": 16},
    "Bert": SIZES,
    "Camembert": SIZES,
    "Data2VecText": SIZES,
    "DistilBert": {
        "vocab_size": 50, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64,
        "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2,
    },
    "Electra": {**SIZES, "embedding_size": 16},
    "Ernie": SIZES,
    # Layer 0 attends to all tokens, layers 1 and 2 to four on each side.
    "ModernBert": {
        **SIZES, "local_attention": 8, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
}  # fmt: skip
DISTINCT = ["Albert", "Bert", "DistilBert", "Electra", "ModernBert", "Roberta"]  # no near-copies
ABSOLUTE = [name for name in FAMILIES if name != "ModernBert"]
NUMBERED_FROM_PADDING = ["Camembert", "Data2VecText", "Roberta", "XLMRoberta"]


def make(family: str, head: str = "Model", **changes: Any) -> Any:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**{**FAMILIES[family], **changes})
    return getattr(transformers, f"{family}{head}")(config).eval()


def inputs(
    rows: int = 2, tokens: int = 11, padding: int = 4, side: str = "right"
) -> dict[str, torch.Tensor]:
    """Token ids with the first row padded, and the mask that says so."""
    ids = torch.randint(5, 50, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding:
        where = slice(tokens - padding, tokens) if side == "right" else slice(0, padding)
        mask[0, where] = 0
        ids[0, where] = 0
    return {"input_ids": ids, "attention_mask": mask}
