"""``python -m bench.feature_maps``: what each feature map leaves of a fine-tuned model's accuracy.

Each map goes through ``fastattn linearize`` on few rows and for few epochs: enough to tell the maps
apart, not to train a model to its end. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastattn.cli.linearize import FEATURE_MAPS
from fastattn.cli.options import has_bf16, set_up
from fastattn.recipes.arguments import Arguments
from fastattn.recipes.data import find_files
from fastattn.recipes.linearize import linearize
from fastattn.recipes.report import write_json

STAGES = ("swapped", "transferred", "linear")


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The report of each map's run."""
    train, dev = find_files(options.data)
    reports = []
    for name in options.maps:
        arguments = Arguments(
            model=options.model,
            train=train,
            dev=dev,
            feature_map=name,
            max_length=128,
            train_limit=options.rows,
            transfer_epochs=options.epochs,
            distill_epochs=options.epochs,
            bf16=has_bf16(),
        )
        file = options.output / name / "report.json"
        if not file.is_file():
            write_json(linearize(arguments, options.output / name), file)
        reports.append(json.loads(file.read_text()))
    return reports


def table(reports: list[dict[str, Any]]) -> str:
    """Markdown: accuracy after each stage, best map first."""
    lines = [
        "| feature map | swapped | after attention transfer | after distillation | minutes |",
        "|---|---|---|---|---|",
    ]
    for report in sorted(reports, key=lambda r: -r["models"]["linear"]["accuracy"]):
        scores = [report["models"].get(stage) for stage in STAGES]
        shown = [f"{score['accuracy']:.4f}" if score else "nothing to fit" for score in scores]
        seconds = sum(report["seconds"][stage] for stage in ("transfer", "distill"))
        name = report["arguments"]["feature_map"]
        lines.append(f"| {name} | {' | '.join(shown)} | {seconds / 60:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a fine-tuned softmax classifier")
    parser.add_argument("--data", type=Path, required=True, help="its task's train.* and dev.*")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--maps", nargs="+", choices=FEATURE_MAPS, default=list(FEATURE_MAPS))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=float, default=1.0, help="of transfer and distillation")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_up(options.threads or torch.get_num_threads())
    options.output.mkdir(parents=True, exist_ok=True)
    print(table(compare(options)))


if __name__ == "__main__":
    main()
