"""How many texts never end? A causal linear-attention model on WikiText-2, decoded seven ways.

Trains a small GPT-2 with linear attention three times for the same number of steps (softmax, st and
nmst heads), then continues contexts from the validation text through ``generate``, which carries a
state of constant size. A line of the corpus is a text; its end is the end of sequence. Reports the
validation perplexity, the share of continuations that have not ended after --length tokens, and the
longest one that has.

    python -m examples.decode_to_the_end --data DIR      # test.txt (trained on) and valid.txt
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import fastattn
from fastattn.cli.options import has_bf16, set_up
from fastattn.generation import ConsistentTopK, ConsistentTopP, SelfTerminatingHead
from fastattn.generation.self_terminating import KINDS
from fastattn.recipes.progress import progress

console = Console()
PAD, UNKNOWN, EOS = 0, 1, 2
CONTEXT, TOKENS = 10, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=540, help="of training, for each model")
    parser.add_argument("--heads", default="softmax,st,nmst", help="the models to train")
    parser.add_argument("--contexts", type=int, default=100)
    parser.add_argument("--scored", type=int, default=2000, help="validation texts for perplexity")
    parser.add_argument("--length", type=int, default=1000, help="tokens to wait for the end")
    parser.add_argument("--epsilon", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("test.txt", "valid.txt"):
        if not (options.data / name).is_file():
            parser.error(f"--data {options.data} has no {name}")
    heads = options.heads.split(",")
    if unknown := set(heads) - {"softmax", *KINDS}:
        parser.error(f"--heads takes softmax, {', '.join(KINDS)}; got {', '.join(sorted(unknown))}")
    set_up(None)

    words, vocabulary = read(options.data / "test.txt", None)
    valid, _ = read(options.data / "valid.txt", vocabulary)
    contexts = torch.stack([text[:CONTEXT] for text in valid if len(text) > 2 * CONTEXT])
    contexts = contexts[: options.contexts]
    console.print(f"{sum(map(len, words))} tokens, {len(vocabulary)} words", highlight=False)

    table = Table(title=f"{len(contexts)} continuations of {CONTEXT} tokens", title_justify="left")
    for column in ("head", "perplexity", "decoding", f"no end after {options.length}", "longest"):
        table.add_column(column)
    for kind in heads:
        torch.manual_seed(options.seed)
        model = make(len(vocabulary), options.length)
        if kind != "softmax":
            SelfTerminatingHead(EOS, options.epsilon, kind).attach(model)
        train(model, words, options.steps, kind)
        perplexity = f"{evaluate(model, valid[: options.scored]):.1f}"
        console.print(f"{kind}: perplexity {perplexity}", highlight=False)
        ways = {"greedy": {}}
        if kind == "softmax":
            sampled = {"do_sample": True, "top_k": 0}
            ways |= {
                "top-2": {**sampled, "top_k": 2},
                "consistent top-2": {**sampled, "logits_processor": [ConsistentTopK(2, EOS)]},
                "nucleus 0.2": {**sampled, "top_p": 0.2},
                "consistent nucleus 0.2": {
                    **sampled, "logits_processor": [ConsistentTopP(0.2, EOS)],
                },
            }  # fmt: skip
        else:
            ways |= {"beams of 2": {"num_beams": 2}}
        for way, how in ways.items():
            torch.manual_seed(options.seed)
            lengths = decode(model, contexts, options.length, how)
            ended = [length for length in lengths if length is not None]
            share = f"{100 * (1 - len(ended) / len(lengths)):.1f} %"
            longest = str(max(ended, default=0))
            table.add_row(kind, perplexity, way, share, longest)
            console.print(f"{kind}, {way}: {share}, longest {longest}", highlight=False)
    console.print(table)


def read(path: Path, vocabulary: dict[str, int] | None) -> tuple[list[torch.Tensor], dict]:
    """Texts as token ids with their end; the vocabulary is that of words seen three times."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if vocabulary is None:
        counts = Counter(word for line in lines for word in line)
        known = [word for word, count in counts.items() if count > 2]
        vocabulary = {"<pad>": PAD, "<unknown>": UNKNOWN, "</s>": EOS}
        vocabulary |= {word: i for i, word in enumerate(known, start=3)}
    texts = [[vocabulary.get(word, UNKNOWN) for word in line] + [EOS] for line in lines]
    return [torch.tensor(text) for text in texts], vocabulary


def make(words: int, length: int) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=words, n_positions=length + CONTEXT + TOKENS, n_embd=128, n_layer=2, n_head=4,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
        attn_pdrop=0.0, embd_pdrop=0.1, resid_pdrop=0.1,
    )  # fmt: skip
    return fastattn.linearize(transformers.GPT2LMHeadModel(config), "elu")


def batches(texts: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """Texts cut to TOKENS, in batches of like length, padded."""
    ordered = sorted((text[:TOKENS] for text in texts), key=len)
    groups = [ordered[i : i + rows] for i in range(0, len(ordered), rows)]
    return [torch.nn.utils.rnn.pad_sequence(group, True, PAD) for group in groups]


def loss_of(model: transformers.GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    mask = (ids != PAD).long()
    labels = ids.masked_fill(ids == PAD, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


def train(
    model: transformers.GPT2LMHeadModel, texts: list[torch.Tensor], steps: int, name: str
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    found = batches(texts, rows=16)
    with progress(f"Training, {name}", steps) as advance:
        for step in range(steps):
            rate = min(1, 20 * (step + 1) / steps) * (
                0.55 + 0.45 * math.cos(math.pi * step / steps)
            )
            optimizer.param_groups[0]["lr"] = 2e-3 * rate
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                loss = loss_of(model, found[int(torch.randint(len(found), ()))])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            advance(1, f"loss {loss.item():.2f}")
    model.eval()


@torch.no_grad()
def evaluate(model: transformers.GPT2LMHeadModel, texts: list[torch.Tensor]) -> float:
    """Perplexity per predicted token, the end included where a text fits."""
    total = count = 0.0
    for ids in batches(texts, rows=16):
        predicted = int((ids[:, 1:] != PAD).sum())
        total += float(loss_of(model, ids)) * predicted
        count += predicted
    return math.exp(total / count)


def decode(
    model: transformers.GPT2LMHeadModel, contexts: torch.Tensor, length: int, how: dict
) -> list[int | None]:
    """Generated tokens of each continuation up to its end; None where there was none."""
    start = time.monotonic()
    given = {"do_sample": False, "max_new_tokens": length, **how}
    mask = torch.ones_like(contexts)
    tokens = model.generate(input_ids=contexts, attention_mask=mask, **given)[:, CONTEXT:]
    seconds = time.monotonic() - start
    console.print(f"{tokens.shape[1]} steps in {seconds:.0f} s", highlight=False)
    ends = [(row == EOS).nonzero().flatten().tolist() for row in tokens]
    return [found[0] + 1 if found else None for found in ends]


if __name__ == "__main__":
    main()
