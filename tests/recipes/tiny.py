"""A BERT of 2 layers with a vocabulary of 40 words, and a task it can learn: small enough that a
whole run takes seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = {
    "good": ["fine", "great", "lovely", "superb", "warm", "bright", "kind", "happy"],
    "bad": ["awful", "dull", "sad", "poor", "cold", "bleak", "cruel", "tired"],
}
FILLERS = ["the", "a", "film", "plot", "actor", "scene", "was", "is", "and", "with", "of", "this"]
POSITIONS = 64


def make_model(
    folder: Path, *, labels: list[str] | None = None, positions: int = POSITIONS
) -> Path:
    """Save a randomly initialised model with its tokenizer; with a head if ``labels`` is given."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *WORDS["good"], *WORDS["bad"]]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=positions)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,  # with the usual 0.02 so narrow a model learns nothing for long
        max_position_embeddings=positions,
    )
    if labels is None:
        model = BertModel(config)
    else:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int, longest: int = 24) -> list[dict[str, str]]:
    """Texts of fillers and a few words of one mood; the label is the mood."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = "good" if i % 2 else "bad"
        words = draw.choices(FILLERS, k=draw.randint(2, longest)) + draw.choices(WORDS[label], k=3)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def make_data(folder: Path, train: int = 192, dev: int = 48) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train, 1), ("dev", dev, 2)):
        lines = [json.dumps(row) for row in make_rows(count, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
