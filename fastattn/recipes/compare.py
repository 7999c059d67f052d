"""Two classifiers side by side: what the second gains and what it loses.

Scores come with 95 % intervals from a bootstrap over the rows (Efron 1979); that of the difference
draws the same rows for both, so it is narrower than the two intervals suggest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.models.marks import is_linear
from fastattn.models.positions import position_limit
from fastattn.recipes.data import load_task, tokenize
from fastattn.recipes.errors import ModelError
from fastattn.recipes.evaluate import confusion, evaluate, matthews, predict
from fastattn.recipes.measure import measure
from fastattn.recipes.models import (
    is_fine_tuned,
    load_config,
    load_model,
    load_tokenizer,
    output_labels,
    show_labels,
    weight_files,
)
from fastattn.recipes.report import machine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAWS = 2000
DRAWN_AT_ONCE = 2**22  # rows, over several draws: 50 MB or so


def compare(
    a: Path,
    b: Path,
    dev_file: Path,
    *,
    max_length: int | None = None,
    lengths: Sequence[int] = (),
    bf16: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate both models on ``dev_file`` and measure them; returns the report.

    Args:
        a, b: folders of fine-tuned classifiers with the same labels, softmax or linear.
        max_length: tokens read of a text; None: what each model has positions for; with rotary
            positions what its tokenizer lets through, at most 512 if its attention is softmax.
        lengths: input lengths to measure time and memory at.
        seed: of the bootstrap.

    Raises:
        DataError: the data can't be used.
        ModelError: a model can't be loaded, has no trained head, or knows other labels.
    """
    labels = {name: _labels(path) for name, path in (("A", a), ("B", b))}
    if labels["A"] != labels["B"]:
        raise ModelError(
            f"the models have different labels: {a} {show_labels(labels['A'])}; "
            f"{b} {show_labels(labels['B'])}"
        )
    task = load_task(dev_file, dev_file, labels["A"])
    truth = torch.tensor(task.dev["label"][:])
    models: dict[str, dict[str, Any]] = {}
    logits: dict[str, Tensor] = {}
    for name, path in (("A", a), ("B", b)):
        model, tokenizer = load_model(path), load_tokenizer(path)
        length = _tokens_read(path, tokenizer, max_length)
        dev = tokenize(task.dev, tokenizer, length)
        logits[name] = predict(model, dev, tokenizer, bf16=bf16, description=f"Evaluating {name}")
        models[name] = {
            "path": str(path),
            "layers": model.config.num_hidden_layers,
            "attention": "linear" if is_linear(model.config) else "softmax",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "disk_bytes": sum(file.stat().st_size for file in weight_files(path)),
            "max_length": length,
            **asdict(evaluate(logits[name], truth)),
        }
    said = {name: values.argmax(-1) for name, values in logits.items()}
    intervals = bootstrap(said["A"], said["B"], truth, len(task.labels), seed)
    for name in models:
        models[name]["intervals"] = intervals[name]
    points = measure({"A": a, "B": b}, lengths, bf16=bf16) if lengths else []
    return {
        "machine": machine(),
        "data": {"dev": str(dev_file), "rows": len(task.dev), "labels": list(task.labels)},
        "models": models,
        "difference": {
            score: {
                "value": models["B"][score] - models["A"][score],
                "interval": intervals["B - A"][score],
            }
            for score in ("accuracy", "matthews")
        },
        "agreement": float((said["A"] == said["B"]).double().mean()),
        "measurements": points,
    }


def bootstrap(
    a: Tensor, b: Tensor, truth: Tensor, classes: int, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % percentile intervals of accuracy and Matthews correlation for the predictions ``a`` and
    ``b`` (rows,), and of their difference B - A, as ``[of][score]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(truth)
    scores: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "accuracy": lambda said, counts: counts @ (said == truth).float() / rows,
        "matthews": lambda said, counts: matthews(confusion(said, truth, classes, counts)),
    }
    parts: dict[tuple[str, str], list[Tensor]] = {}
    at_once = max(1, DRAWN_AT_ONCE // rows)
    for start in range(0, DRAWS, at_once):
        shape = (min(at_once, DRAWS - start), rows)
        # How often each row is drawn, which is all that the scores depend on.
        drawn = torch.randint(rows, shape, generator=generator)
        counts = torch.zeros(shape).scatter_add_(1, drawn, torch.ones(shape))
        for score, compute in scores.items():
            for name, said in (("A", a), ("B", b)):
                parts.setdefault((score, name), []).append(compute(said, counts).double())
    found: dict[str, dict[str, tuple[float, float]]] = {"A": {}, "B": {}, "B - A": {}}
    for score in scores:
        of_a, of_b = torch.cat(parts[score, "A"]), torch.cat(parts[score, "B"])
        for name, values in (("A", of_a), ("B", of_b), ("B - A", of_b - of_a)):
            low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype))
            found[name][score] = (float(low), float(high))
    return found


def _labels(path: Path) -> tuple[str, ...]:
    config = load_config(path)
    if not is_fine_tuned(config):
        raise ModelError(f"{path} has no trained classification head, so it can't be compared")
    return output_labels(config)


def _tokens_read(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    config = load_config(path)
    limit = position_limit(config)
    if max_length is not None:
        if limit is not None and max_length > limit:
            raise ModelError(
                f"max_length {max_length} is more than the {limit} positions of {path}"
            )
        return max_length
    if limit is not None:
        return limit
    said = tokenizer.model_max_length  # 1e30 where nothing is said
    trained = said if said < 2**31 else getattr(config, "max_position_embeddings", None)
    most = int(trained or 512)
    return most if is_linear(config) else min(512, most)
