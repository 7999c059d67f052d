"""``fastattn linearize``: options to arguments, the run, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastattn.cli import options
from fastattn.cli.exits import exit_codes, writing

LEARNED = ("hedgehog", "t2r")
FEATURE_MAPS = (*LEARNED, "elu", "relu", "cosine", "softmax", "exp", "efficient")


def linearize(
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
    data: options.Data = None,
    train: options.Train = None,
    dev: options.Dev = None,
    train_limit: options.TrainLimit = None,
    max_length: options.MaxLength = None,
    extend_to: options.ExtendTo = None,
    feature_map: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(FEATURE_MAPS)}.", rich_help_panel=options.MODEL),
    ] = "hedgehog",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to make linear, such as 0,1,4-5, counted from 0 \\[default: all].",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    fine_tune: options.FineTune = None,
    epochs: options.Epochs = None,
    fine_tune_epochs: options.FineTuneEpochs = None,
    transfer_epochs: options.TransferEpochs = None,
    replace_epochs: Annotated[
        float,
        typer.Option(
            min=0,
            help="Replace softmax attention module by module at a rising rate before distillation.",
            rich_help_panel=options.TRAINING,
        ),
    ] = 0.0,
    schedule: options.ReplacingSchedule = options.Schedule.linear,
    distill_epochs: Annotated[
        float | None, options.stage_epochs("Of training towards the softmax model's predictions", 2)
    ] = None,
    batch_size: options.BatchSize = None,
    bf16: options.Bf16 = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    lengths: options.Lengths = None,
    restart: options.Restart = False,
) -> None:
    """Turn a softmax encoder into one with linear attention and train it back to its accuracy.

    Fine-tunes the softmax model (unless it is), swaps linear attention in, matches each layer's
    output to the softmax layer's, fine-tunes with distillation, evaluates, measures, saves. An
    interrupted run goes on from its last saved stage when the same command is given again.
    """
    if feature_map not in FEATURE_MAPS:
        raise typer.BadParameter(
            f"{feature_map!r} is not one of {', '.join(FEATURE_MAPS)}", param_hint="--feature-map"
        )
    if feature_map not in LEARNED:
        options.refuse_without(context, f"--feature-map {' or '.join(LEARNED)}", "transfer_epochs")
    if replace_epochs == 0:
        options.refuse_without(context, "--replace-epochs above 0", "schedule")
    if fine_tune is False:
        options.refuse_without(context, "--fine-tune", "fine_tune_epochs")
    chosen_layers = options.numbers(layers, "--layers")
    with exit_codes(resumes=True):
        from fastattn.recipes.arguments import Arguments
        from fastattn.recipes.data import find_files
        from fastattn.recipes.linearize import linearize as run
        from fastattn.recipes.report import plot, print_report, write_json

        options.set_up(threads)
        options.refuse_idle_fine_tuning(context, model, fine_tune)
        train_file, dev_file = find_files(data, train, dev)
        arguments = Arguments(
            model=model,
            train=train_file,
            dev=dev_file,
            feature_map=feature_map,
            layers=chosen_layers or None,
            replace_epochs=replace_epochs,
            schedule=schedule.value,
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
                distill_epochs=distill_epochs,
            ),
        )
        report = run(arguments, output, restart)
        with writing(output):
            write_json(report, output / "report.json")
            plot(report, output / "report.png")
        console = Console()
        print_report(report, console)
        for what, where in (
            ("linear model", output),
            ("softmax model", output / "run" / "softmax"),
            ("report", output / "report.json"),
            ("plot", output / "report.png"),
        ):
            console.print(f"{what + ':':15}{where}", markup=False, highlight=False, soft_wrap=True)
