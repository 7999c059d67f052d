"""Tiny models of four layers, and something to feed them."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "Bert": SIZES,
    "Camembert": SIZES,
    "DistilBert": {
        "vocab_size": 50, "dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 48,
        "max_position_embeddings": 64, "initializer_range": 0.2,
    },
    "Electra": {**SIZES, "embedding_size": 16},
    "Roberta": SIZES,
}  # fmt: skip


def make(family: str = "Bert", head: str = "ForSequenceClassification", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**{**FAMILIES.get(family, SIZES), **changes})
    return getattr(transformers, f"{family}{head}")(config).eval()


def inputs(rows: int = 3, tokens: int = 11, padding: int = 4, seed: int = 1):
    ids = torch.randint(5, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, tokens - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}
