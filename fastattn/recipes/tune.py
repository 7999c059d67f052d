"""The stage after replacing: the metric itself as what is searched for (``fastattn.theseus.mgs``).

Each step measures the metric on a few hundred training rows, and writes what it saw as one line of
``search.jsonl``: an interrupted run goes on with the lines of the steps it keeps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn.recipes.errors import DataError
from fastattn.recipes.evaluate import accuracy, confusion, f1, matthews
from fastattn.recipes.training import Batch, Collator, LengthGroupedSampler, model_inputs
from fastattn.theseus.mgs import FEWEST_EFFECTIVE_SAMPLES, Metric, MGSCallback

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fastattn.recipes.data import Task

METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "f1": f1,
    "matthews": matthews,
    "accuracy": accuracy,
}
ROWS = 256  # that the metric is measured on at a step


def check_metric(name: str, task: Task) -> None:
    """
    Raises:
        DataError: no such metric, or one that says nothing about these labels.
    """
    if name not in METRICS:
        raise DataError(f"metric must be one of {', '.join(METRICS)}; got {name!r}")
    if name == "f1" and len(task.labels) != 2:
        raise DataError(
            f"metric f1 is for two labels; these data have {len(task.labels)} "
            f"({', '.join(task.labels[:5])}{', ...' if len(task.labels) > 5 else ''}): "
            "use matthews or accuracy"
        )
    counts = Counter(task.train["label"][:])
    if name != "accuracy" and len(counts) < 2:
        only = task.labels[next(iter(counts))]
        raise DataError(
            f"metric {name} is constant on these data: all {len(task.train)} training rows have "
            f"the label {only!r}"
        )


def metric_of_batch(name: str, classes: int, bf16: bool) -> Metric:
    """The metric as a function of (model, batch)."""

    def metric(model: nn.Module, batch: Batch) -> float:
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**model_inputs(batch)).logits
        return float(METRICS[name](confusion(logits.argmax(-1), batch["labels"], classes)))

    return metric


def metric_batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, seed: int, rows: int = ROWS
) -> list[Batch]:
    """All rows in batches of ``rows`` of like length; fewer rows make one batch."""
    size = min(rows, len(dataset))
    order = list(LengthGroupedSampler(dataset["length"][:], size, seed))
    collate = Collator(tokenizer)
    starts = range(0, len(order) // size * size, size)
    return [collate([dataset[row] for row in order[i : i + size]]) for i in starts]


class LoggedSearch(MGSCallback):
    """``MGSCallback`` with a line of ``log`` for each step, and a note for the progress bar."""

    def __init__(self, name: str, metric: Metric, batches: list[Batch], log: Path) -> None:
        super().__init__(metric, batches)
        self.name, self.log = name, log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        kept = [line for line in self.lines() if line["step"] < state.global_step]
        self.log.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        step = self.steps[-1]
        line = {
            "step": state.global_step,
            self.name: step.metric,
            "candidates": step.candidate_metrics.tolist(),
            "effective_samples": step.effective_samples,
        }
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        if not self.log.is_file():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def note(self) -> str:
        """Of the last twenty steps."""
        recent = self.steps[-20:]
        metric = sum(step.metric for step in recent) / len(recent)
        effective = sum(step.effective_samples for step in recent) / len(recent)
        of = len(recent[0].weights)
        return f"{self.name} {metric:.4f}, {effective:.1f} of {of} candidates count"

    def summary(self) -> dict[str, Any]:
        """The metric at the first and last tenth of the steps, and how many candidates counted."""
        lines = self.lines()
        tenth = max(1, len(lines) // 10)
        effective = [line["effective_samples"] for line in lines]
        return {
            "metric": self.name,
            "steps": len(lines),
            "first": _mean([line[self.name] for line in lines[:tenth]]),
            "last": _mean([line[self.name] for line in lines[-tenth:]]),
            "candidates": len(lines[0]["candidates"]),
            "effective_samples": _mean(effective),
            "steps_with_too_few": sum(e < FEWEST_EFFECTIVE_SAMPLES for e in effective),
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
