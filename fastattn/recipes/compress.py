"""A fine-tuned classifier in, one with fewer layers or linear attention or both out.

The stages of ``linearize`` with one more before distillation:

``softmax``   the model, fine-tuned on the task unless it already is: predecessor and teacher
``transfer``  for linear attention: feature maps fitted to each softmax layer's output
``replace``   layers or attention modules replaced at a rising rate (``fastattn.theseus``), towards
              the teacher's predictions and the labels and each replaced module's output
``distill``   the successor alone, all of it but its word embeddings
``tune``      where a metric is given: towards it, by MLE-guided parameter search
``measure``   time and peak memory of both against input length
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification

from fastattn.recipes.arguments import Arguments
from fastattn.recipes.errors import ModelError
from fastattn.recipes.job import Job, freeze_embeddings, prepare
from fastattn.recipes.models import load_config, load_model
from fastattn.recipes.run import CHECKPOINTS
from fastattn.recipes.training import fit, without_dropout
from fastattn.recipes.tune import LoggedSearch, check_metric, metric_batches, metric_of_batch
from fastattn.theseus import Theseus

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from fastattn.recipes.data import Task
    from fastattn.recipes.run import Results

SEARCH_LOG = "search.jsonl"  # of the stage "tune": what each step saw


@dataclass(frozen=True)
class CompressArguments(Arguments):
    """What a run is asked to do; the results depend on nothing else.

    num_layers: of the result, a divisor of the model's; None: as many. attention: "softmax" or
    "linear". layers: indices, in the result, of those to make linear; None: all. first: start from
    the first layers rather than from those spread over the model. metric: what the result is tuned
    on after distillation, one of ``fastattn.recipes.tune.METRICS``; None: it is not.
    """

    num_layers: int | None = None
    attention: str = "softmax"
    first: bool = False
    replace_epochs: float | None = None
    distill_rate: float = 1.4e-4
    change: bool = True
    hidden: float = 1.0
    metric: str | None = None
    tune_epochs: float | None = None
    tune_rate: ClassVar[float] = 2e-5
    # Changed texts are new in each epoch, so there is more to learn from them.
    default_epochs: ClassVar[dict[str, float]] = {
        **Arguments.default_epochs, "distill": 6.0, "tune": 1.0,
    }  # fmt: skip


def compress(arguments: CompressArguments, output: Path, restart: bool = False) -> dict[str, Any]:
    """Run all stages that are not done yet; returns the report.

    The result and its tokenizer are saved in ``output``, the predecessor in ``output/run/softmax``.

    Raises:
        DataError, ModelError, OutputError: before any training.
    """
    config = load_config(arguments.model)
    _check(arguments, config)
    run, job = prepare(arguments, config, output, restart, CompressJob, _check_task)
    stages = {"softmax": run.stage("softmax", job.softmax)}
    if arguments.attention == "linear":
        stages["transfer"] = run.stage("transfer", job.transfer)
    stages["replace"] = run.stage("replace", job.replace)
    stages["distill"] = run.stage("distill", job.distill)
    if arguments.metric is not None:
        stages["tune"] = run.stage("tune", job.tune)
    stages["measure"] = run.stage("measure", job.measure, arguments.lengths)
    return job.report(stages)


class CompressJob(Job[CompressArguments]):
    """The stages of ``linearize`` for fewer layers, and one for a metric."""

    final = "compressed"

    @property
    def transfer_layers(self) -> tuple[int, ...] | None:
        """``layers`` are those of the result: if it has fewer, feature maps are fitted for all."""
        depth = load_config(self.stage_folder("softmax")).num_hidden_layers
        return self.arguments.layers if self.arguments.num_layers in (None, depth) else None

    def theseus(self, predecessor: PreTrainedModel) -> Theseus:
        args = self.arguments
        linear = args.attention == "linear"
        return Theseus(
            predecessor,
            args.num_layers,
            args.attention,  # type: ignore[arg-type]
            args.feature_map if linear else None,
            linear_layers=args.layers,
            start=load_model(self.stage_folder("transfer")) if linear else None,
            first=args.first,
            match=args.match,
            seed=args.seed,
        )

    def tune(self, folder: Path) -> Results:
        args = self.arguments
        assert args.metric is not None
        results: Results = {}
        model = load_model(self.stage_folder("distill"), train=True)
        if args.tune_epochs != 0:
            freeze_embeddings(model)
            train = self.tokens("train", args.student_length)
            settings = self.settings("tune", train)
            search = LoggedSearch(
                args.metric,
                metric_of_batch(args.metric, len(self.task.labels), args.bf16),
                metric_batches(train, self.tokenizer, args.seed),
                folder / SEARCH_LOG,
            )
            with without_dropout(model), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the report says it once, in words
                results["train_loss"] = fit(
                    model,
                    train,
                    self.tokenizer,
                    self.distillation_loss(),
                    settings,
                    folder / CHECKPOINTS,
                    f"Tuning {args.metric}",
                    callbacks=[search],
                    note=search.note,
                )
            results["search"] = search.summary()
        results["tuned"] = self.scores(model, args.student_length, "Evaluating the tuned model")
        self.save(model, folder)
        self.save(model, self.output)
        return results


def _check_task(arguments: CompressArguments, task: Task) -> None:
    if arguments.metric is not None:
        check_metric(arguments.metric, task)


def _check(arguments: CompressArguments, config: PretrainedConfig) -> None:
    """Try it on a model without memory, so that what can't be done is said at once."""
    if arguments.num_layers in (None, config.num_hidden_layers) and arguments.attention != "linear":
        raise ModelError(
            f"nothing to do: {arguments.model} has {config.num_hidden_layers} layers already; give "
            "fewer --layers, or --attention linear"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
            Theseus(
                model,
                arguments.num_layers,
                arguments.attention,  # type: ignore[arg-type]
                arguments.feature_map if arguments.attention == "linear" else None,
                linear_layers=arguments.layers,
            )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"this model can't be compressed so: {error}") from error
