"""Time per generated token against position: softmax with its cache of keys and values, which
grows, and linear attention with its state, which does not.

``python -m examples.decode`` makes a GPT-2-like decoder with random weights (time does not depend
on them), generates with both, prints a table and draws ``out/decode.png``.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.generation import LogitsProcessor, LogitsProcessorList

import fastattn

WINDOW = 128  # tokens in a median


class Clock(LogitsProcessor):
    """Called by ``generate`` once a token; notes when, and leaves the scores alone."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def decoder(tokens: int, layers: int, width: int, head_size: int) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // head_size, n_positions=tokens + 1,
        vocab_size=1000, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def measure(model: Any, tokens: int) -> tuple[list[float], int]:
    """Seconds of each token of one ``generate``, and bytes of the cache at its end."""
    clock = Clock()
    cache = DynamicCache(config=model.config)
    takes = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # renamed during transformers 5
    model.generate(
        torch.zeros(1, 1, dtype=torch.long),
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([clock]),
        **{name: cache},
    )
    seconds = [after - before for before, after in itertools.pairwise(clock.times)]
    return seconds, sum(_bytes(layer) for layer in cache.layers)


def _bytes(layer: Any) -> int:
    held = [layer.keys, layer.values, *getattr(layer, "recurrent_states", {}).values()]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.tokens <= WINDOW:
        parser.error(f"--tokens must be more than {WINDOW}, whose median is shown")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    softmax = decoder(options.tokens, options.layers, options.width, options.head_size)
    linear = fastattn.linearize(copy.deepcopy(softmax))
    series, sizes = {}, {}
    for name, model in (("softmax", softmax), ("linear", linear)):
        measure(model, 64)  # warm-up
        seconds, sizes[name] = measure(model, options.tokens)
        series[name] = [
            1e3 * statistics.median(seconds[at : at + WINDOW])
            for at in range(0, len(seconds) - WINDOW + 1, WINDOW)
        ]
    positions = [WINDOW * (index + 1) for index in range(len(series["linear"]))]
    show(positions, series, sizes)
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"positions": positions, "milliseconds": series, "cache_bytes": sizes}
    (options.output / "decode.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(positions, series, options)
    print(f"plot: {options.output / 'decode.png'}")


def show(positions: list[int], series: dict[str, list[float]], sizes: dict[str, int]) -> None:
    table = Table("position", title="Milliseconds for a token (median of 128)")
    for name in series:
        table.add_column(name, justify="right")
    every = max(1, len(positions) // 8)
    for index in [*range(0, len(positions) - 1, every), len(positions) - 1]:
        table.add_row(str(positions[index]), *(f"{v[index]:.2f}" for v in series.values()))
    table.add_row("cache at the end", *(f"{size / 2**20:.1f} MiB" for size in sizes.values()))
    Console().print(table)


def draw(positions: list[int], series: dict[str, list[float]], options: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, color in (("softmax", "#8c8c8c"), ("linear", "#0b6fb8")):
        axis.plot(positions, series[name], color=color, marker="o", markersize=3, label=name)
    axis.set(
        title=f"generate(): {options.layers} layers of {options.width}, batch 1, "
        f"{torch.get_num_threads()} threads",
        xlabel="position",
        ylabel="milliseconds for a token",
        ylim=(0, None),
    )
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(options.output / "decode.png", dpi=130)


if __name__ == "__main__":
    main()
