"""Texts in, model outputs out: how every diagnosis encodes a text and calls the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Text = str | Sequence[str]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def check_texts(texts: Sequence[Text]) -> None:
    """A string is a sequence of strings, too: of its letters."""
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of texts; got one string, {texts[:40]!r}")


def encode(
    model: nn.Module, tokenizer: Any, text: Text, max_length: int | None = None
) -> tuple[dict[str, Tensor], list[bool]]:
    """A text, or a pair, as model inputs (1, T), and which of its tokens are special.

    Raises:
        ValueError: a text without tokens, or longer than ``max_length`` with nothing left of it, or
            with more tokens than the model has positions for; ``max_length`` below 1.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1; got {max_length}")
    parts = (text,) if isinstance(text, str) else tuple(text)
    encoded = tokenizer(
        *parts,
        return_tensors="pt",
        return_special_tokens_mask=True,
        truncation=max_length is not None,
        max_length=max_length,
    )
    special = encoded["special_tokens_mask"][0].bool().tolist()
    if all(special):
        raise ValueError(f"the text {text!r} has no tokens")
    from fastattn.models.positions import position_limit  # needs transformers, as its models do

    limit = position_limit(model.config) if hasattr(model, "config") else None
    if limit is not None and len(special) > limit:
        raise ValueError(
            f"a text has {len(special)} tokens with max_length={max_length}, but "
            f"{type(model).__name__} has {limit} positions: max_length must be at most {limit}"
        )
    device = next(model.parameters()).device
    return {name: encoded[name].to(device) for name in INPUTS if name in encoded}, special


def forward(
    model: Any, inputs: dict[str, Tensor], embeddings: Tensor | None = None
) -> tuple[Any, Tensor]:
    """Outputs of ``model`` and the padding mask of its rows.

    Args:
        inputs: of one text, (1, T).
        embeddings: (rows, T, D), put in place of the word embeddings. The token ids are passed on
            all the same, because some families number positions by them.
    """
    if embeddings is None:
        return model(**inputs), inputs["attention_mask"]
    rows = {name: value.expand(len(embeddings), -1) for name, value in inputs.items()}
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: embeddings)
    try:
        return model(**rows), rows["attention_mask"]
    finally:
        hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients for parameters, inside."""
    was_training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for parameter in wanted:
            parameter.requires_grad_(True)
