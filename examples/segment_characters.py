"""Words out of an encoder that never saw a space: perturbed masking on a small character model.

Trains a masked language model over the characters of the SIGHAN 2005 test texts, spaces removed,
and cuts sentences where neighbouring characters have little impact on each other. Reference points:
each character a word, and bigram mutual information. The threshold is the best of ten quantiles,
chosen with the gold words in hand (an oracle), for every method alike.

    python -m examples.segment_characters --data DIR   # pku_test_gold.txt, msr_test_gold.txt

About eleven minutes of one core. With --attention elu the layer that sees the whole sentence is
linear; the others attend within a window anyway.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import fastattn
from fastattn.cli.options import has_bf16, set_up
from fastattn.diagnose import (
    adjacent_impact,
    impact_matrix,
    score_segmentation,
    segment,
    spans_of_words,
)
from fastattn.recipes.progress import progress

console = Console()
LENGTH = 48
PAD, MASK = 0, 1
CORPORA = ("pku", "msr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=8, help="of processor time, to train each model"
    )
    parser.add_argument("--sentences", type=int, default=250, help="of each corpus, to segment")
    parser.add_argument("--attention", default="softmax", help="softmax, feature maps, or several")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in CORPORA:
        if not (options.data / f"{name}_test_gold.txt").is_file():
            parser.error(f"--data {options.data} has no {name}_test_gold.txt")
    set_up(None)

    corpora = {name: read(options.data / f"{name}_test_gold.txt") for name in CORPORA}
    texts = ["".join(words) for sentences in corpora.values() for words in sentences]
    vocabulary = {c: i + 2 for i, c in enumerate(sorted(set("".join(texts))))}
    console.print(f"{len(texts)} sentences, {len(vocabulary)} characters", highlight=False)
    draw = random.Random(options.seed)
    samples = {name: draw.sample(found, options.sentences) for name, found in corpora.items()}

    table = Table(title="F1 of words", title_justify="left")
    for column in ("method", *(name.upper() for name in CORPORA)):
        table.add_column(column)
    scores = {"every character": {}, "bigram mutual information": {}}
    counts = count(texts)
    for name, sentences in samples.items():
        gold = [spans_of_words(words) for words in sentences]
        single = [[(i, i + 1) for i in range(len("".join(words)))] for words in sentences]
        scores["every character"][name] = score_segmentation(single, gold).f1
        links = [mutual_information("".join(words), *counts) for words in sentences]
        scores["bigram mutual information"][name] = best_f1(links, gold)
    for attention in options.attention.split(","):
        torch.manual_seed(options.seed)
        model = make(len(vocabulary) + 2, attention)
        loss = train(model, texts, vocabulary, 60 * options.minutes, draw)
        for metric in ("prob", "dist"):
            row = scores.setdefault(f"{attention}, loss {loss:.2f}, {metric}", {})
            for name, sentences in samples.items():
                gold = [spans_of_words(words) for words in sentences]
                row[name] = best_f1(probe(model, sentences, vocabulary, metric), gold)
    for method, row in scores.items():
        table.add_row(method, *(f"{100 * row[name]:.1f}" for name in CORPORA))
    console.print(table)


def read(path: Path) -> list[list[str]]:
    """Sentences, as words: lines cut after punctuation, longer ones than a model reads left out."""
    sentences = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words: list[str] = []
        for word in line.split():
            words.append(word)
            if not any(character.isalnum() for character in word):
                sentences.append(words)
                words = []
        sentences.append(words)
    joined: list[list[str]] = []
    for words in sentences:  # clauses to sentences of nearly LENGTH characters
        if joined and len("".join(joined[-1] + words)) <= LENGTH:
            joined[-1] += words
        elif 2 <= len("".join(words)) <= LENGTH:
            joined.append(list(words))
    return joined


def make(size: int, attention: str) -> transformers.ModernBertForMaskedLM:
    """The first layer sees the whole sentence, the others four characters to each side. Without
    rotary positions and narrow windows so small a model learns no more than how frequent each
    character is in the time it gets: a BERT of this size was still there after 4,600 steps."""
    config = transformers.ModernBertConfig(
        vocab_size=size, hidden_size=160, num_hidden_layers=3, num_attention_heads=5,
        intermediate_size=320, max_position_embeddings=LENGTH,
        global_attn_every_n_layers=3, local_attention=8,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=None, cls_token_id=None,
        sep_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    model = transformers.ModernBertForMaskedLM(config)
    return model if attention == "softmax" else fastattn.linearize(model, attention)


def train(
    model: transformers.ModernBertForMaskedLM,
    texts: list[str],
    vocabulary: dict[str, int],
    seconds: float,
    draw: random.Random,
    rows: int = 32,
) -> float:
    """Mask 15 % of the characters, guess them; the mean loss of the last tenth of the time."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    encoded = [torch.tensor([vocabulary[c] for c in text]) for text in sorted(texts, key=len)]
    start, last = time.process_time(), []
    with progress("Training", 100) as advance:
        done = 0
        while (share := (time.process_time() - start) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, 20 * share) * (0.5 + 0.5 * math.cos(math.pi * share))
            first = draw.randrange(len(encoded) - rows)  # neighbours in length: little padding
            batch = torch.nn.utils.rnn.pad_sequence(encoded[first : first + rows], True, PAD)
            chosen = (torch.rand(batch.shape) < 0.15) & (batch != PAD)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                hidden = model.model(
                    input_ids=batch.masked_fill(chosen, MASK), attention_mask=(batch != PAD).long()
                ).last_hidden_state
                guesses = model.decoder(model.head(hidden[chosen]))  # of the masked ones alone
            loss = torch.nn.functional.cross_entropy(guesses.float(), batch[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            last += [loss.item()] if share > 0.9 else []
            advance(int(100 * share) - done, f"loss {loss.item():.2f}")
            done = int(100 * share)
    model.eval()
    return sum(last) / max(len(last), 1)


def probe(
    model: transformers.ModernBertForMaskedLM,
    sentences: list[list[str]],
    vocabulary: dict[str, int],
    metric: str,
) -> list[torch.Tensor]:
    """Impact matrices, of neighbours only."""
    ids = [torch.tensor([vocabulary[c] for c in "".join(words)]) for words in sentences]
    return [impact_matrix(model, text, MASK, metric=metric, band=1) for text in ids]


def count(texts: list[str]) -> tuple[Counter[str], Counter[str]]:
    return Counter("".join(texts)), Counter(t[i : i + 2] for t in texts for i in range(len(t) - 1))


def mutual_information(text: str, characters: Counter[str], bigrams: Counter[str]) -> torch.Tensor:
    """log p(ab) / p(a) p(b) of neighbours, laid out as an impact matrix."""
    total = characters.total()
    matrix = torch.zeros(len(text), len(text), dtype=torch.float64)
    for i in range(len(text) - 1):
        joint = bigrams[text[i : i + 2]] * total
        value = math.log(joint / (characters[text[i]] * characters[text[i + 1]]))
        matrix[i, i + 1] = matrix[i + 1, i] = value
    return matrix


def best_f1(matrices: list[torch.Tensor], gold: list[list[tuple[int, int]]]) -> float:
    """With the best of ten quantiles of all neighbours' impacts as the threshold."""
    pooled = torch.cat([adjacent_impact(matrix) for matrix in matrices])
    thresholds = torch.quantile(pooled, torch.linspace(0.05, 0.95, 10, dtype=pooled.dtype))
    return max(
        score_segmentation([segment(m, threshold=float(t)) for m in matrices], gold).f1
        for t in thresholds
    )


if __name__ == "__main__":
    main()
