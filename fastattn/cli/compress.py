"""``fastattn compress``: options to arguments, the run, and the report."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastattn.cli import options
from fastattn.cli.exits import exit_codes, writing
from fastattn.cli.linearize import FEATURE_MAPS, LEARNED


class Attention(str, Enum):
    softmax = "softmax"
    linear = "linear"


class Metric(str, Enum):
    f1 = "f1"
    matthews = "matthews"
    accuracy = "accuracy"


def compress(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Option(
            "--model",
            help="Folder of a Hugging Face encoder, with or without a trained classification head.",
            rich_help_panel=options.MODEL,
        ),
    ],
    output: options.Output,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Layers of the result, a divisor of the model's \\[default: as many].",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    attention: Annotated[
        Attention, typer.Option(help="Of the result.", rich_help_panel=options.MODEL)
    ] = Attention.softmax,
    feature_map: Annotated[
        str,
        typer.Option(
            help=f"For linear attention: one of {', '.join(FEATURE_MAPS)}.",
            rich_help_panel=options.MODEL,
        ),
    ] = "hedgehog",
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="Tune the result on this metric of training rows after distillation, by "
            "MLE-guided parameter search \\[default: it is not]. f1: of the second of two labels.",
            rich_help_panel=options.TRAINING,
        ),
    ] = None,
    linear_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of the result to make linear, such as 0,2-3, counted from 0; the others "
            "keep softmax \\[default: all, with --attention linear].",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    data: options.Data = None,
    train: options.Train = None,
    dev: options.Dev = None,
    train_limit: options.TrainLimit = None,
    max_length: options.MaxLength = None,
    extend_to: options.ExtendTo = None,
    fine_tune: options.FineTune = None,
    epochs: options.Epochs = None,
    fine_tune_epochs: options.FineTuneEpochs = None,
    transfer_epochs: options.TransferEpochs = None,
    replace_epochs: Annotated[
        float | None, options.stage_epochs("Of replacing modules by those of the smaller model", 2)
    ] = None,
    schedule: options.ReplacingSchedule = options.Schedule.linear,
    distill_epochs: Annotated[
        float | None, options.stage_epochs("Of training the smaller model towards the original", 6)
    ] = None,
    metric_epochs: Annotated[float | None, options.stage_epochs("Of tuning on --metric", 1)] = None,
    batch_size: options.BatchSize = None,
    bf16: options.Bf16 = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    lengths: options.Lengths = None,
    restart: options.Restart = False,
) -> None:
    """Make a classifier shallower, or linear, or both, by progressive module replacing.

    Fine-tunes the model (unless it is), replaces its layers or its attention at a rising rate by
    those of a smaller model (BERT-of-Theseus), fine-tunes that with distillation, and on --metric
    itself if there is one, evaluates, measures, saves. An interrupted run goes on when the same
    command is given again.
    """
    if feature_map not in FEATURE_MAPS:
        raise typer.BadParameter(
            f"{feature_map!r} is not one of {', '.join(FEATURE_MAPS)}", param_hint="--feature-map"
        )
    if metric is None:
        options.refuse_without(context, "--metric", "metric_epochs")
    if attention is Attention.softmax:
        of_linear = ("feature_map", "linear_layers", "transfer_epochs")
        options.refuse_without(context, "--attention linear", *of_linear)
    elif feature_map not in LEARNED:
        options.refuse_without(context, f"--feature-map {' or '.join(LEARNED)}", "transfer_epochs")
    if replace_epochs == 0:
        options.refuse_without(context, "--replace-epochs above 0", "schedule")
    if fine_tune is False:
        options.refuse_without(context, "--fine-tune", "fine_tune_epochs")
    chosen_layers = options.numbers(linear_layers, "--linear-layers")
    with exit_codes(resumes=True):
        from fastattn.recipes.compress import SEARCH_LOG, CompressArguments
        from fastattn.recipes.compress import compress as run
        from fastattn.recipes.data import find_files
        from fastattn.recipes.report import plot, print_report, write_json

        options.set_up(threads)
        options.refuse_idle_fine_tuning(context, model, fine_tune)
        train_file, dev_file = find_files(data, train, dev)
        arguments = CompressArguments(
            model=model,
            train=train_file,
            dev=dev_file,
            num_layers=layers,
            attention=attention.value,
            feature_map=feature_map,
            layers=chosen_layers or None,
            schedule=schedule.value,
            metric=None if metric is None else metric.value,
            max_length=max_length,
            extend_to=extend_to,
            train_limit=train_limit,
            fine_tune=fine_tune,
            batch_size=batch_size,
            bf16=options.has_bf16() if bf16 is None else bf16,
            seed=seed,
            lengths=options.lengths_of(lengths),
            **options.chosen_epochs(
                epochs,
                fine_tune_epochs=fine_tune_epochs,
                transfer_epochs=transfer_epochs,
                replace_epochs=replace_epochs,
                distill_epochs=distill_epochs,
                **({} if metric is None else {"tune_epochs": metric_epochs}),
            ),
        )
        report = run(arguments, output, restart)
        with writing(output):
            write_json(report, output / "report.json")
            plot(report, output / "report.png")
        search_log = output / "run" / "tune" / SEARCH_LOG
        console = Console()
        print_report(report, console)
        for what, where in (
            ("compressed", output),
            ("predecessor", output / "run" / "softmax"),
            ("report", output / "report.json"),
            ("plot", output / "report.png"),
            *([("search log", search_log)] if search_log.is_file() else []),
        ):
            console.print(f"{what + ':':15}{where}", markup=False, highlight=False, soft_wrap=True)
        console.print(
            f"side by side:  fastattn compare {output / 'run' / 'softmax'} {output} --data ...",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
