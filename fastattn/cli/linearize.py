"""``fastattn linearize``: options to arguments, the run, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastattn.cli.exits import exit_codes

FEATURE_MAPS = ("hedgehog", "t2r", "elu", "relu", "cosine", "softmax", "exp", "efficient")
MODEL, DATA, TRAINING = "Model", "Data", "Training"


def linearize(
    model: Annotated[
        Path,
        typer.Option(
            "--model",
            help="Folder of a Hugging Face encoder, with or without a trained classification head.",
            rich_help_panel=MODEL,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            help="Folder for the linear model, report.json and report.png. New, empty, or of the "
            "same run: then the run goes on from its last saved stage.",
            rich_help_panel=MODEL,
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Folder with train.* and dev.* (.tsv, .csv or .jsonl) with the columns text, "
            "label and perhaps text_pair.",
            rich_help_panel=DATA,
        ),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option("--train", help="Training file, if not in --data.", rich_help_panel=DATA),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option("--dev", help="Dev file, if not in --data.", rich_help_panel=DATA),
    ] = None,
    train_limit: Annotated[
        int | None,
        typer.Option(
            min=2, help="Use only this many training rows, drawn at random.", rich_help_panel=DATA
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Tokens that the softmax model reads of a text [default: what it has positions "
            "for, at most 512].",
            rich_help_panel=DATA,
        ),
    ] = None,
    extend_to: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Tokens that the linear model reads, with its position embeddings extended "
            "[default: as --max-length].",
            rich_help_panel=MODEL,
        ),
    ] = None,
    feature_map: Annotated[
        str, typer.Option(help=f"One of {', '.join(FEATURE_MAPS)}.", rich_help_panel=MODEL)
    ] = "hedgehog",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to make linear, such as 0,1,4-5, counted from 0 [default: all].",
            rich_help_panel=MODEL,
        ),
    ] = None,
    fine_tune: Annotated[
        bool | None,
        typer.Option(
            "--fine-tune/--no-fine-tune",
            help="Fine-tune the softmax model first [default: if it has no trained head].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Epochs of each of the three trainings, instead of their own defaults.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    fine_tune_epochs: Annotated[
        float | None, typer.Option(min=0.01, rich_help_panel=TRAINING)
    ] = None,
    transfer_epochs: Annotated[float | None, typer.Option(min=0, rich_help_panel=TRAINING)] = None,
    distill_epochs: Annotated[float | None, typer.Option(min=0, rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows a step [default: 8 to 64, by the length of the texts].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="bfloat16 autocast [default: where the processor has bfloat16 instructions].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=TRAINING)] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads [default: torch's].", rich_help_panel=TRAINING),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(help="Input lengths to measure time and memory at; '' for none."),
    ] = "128,256,512,1024,2048,4096,8192",
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over what is in --output.")
    ] = False,
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
    chosen_layers = numbers(layers, "--layers")
    chosen_lengths = numbers(lengths, "--lengths")
    with exit_codes():
        import torch
        import transformers

        from fastattn.recipes.data import find_files
        from fastattn.recipes.linearize import Arguments
        from fastattn.recipes.linearize import linearize as run
        from fastattn.recipes.report import plot, print_report, write_json

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        train_file, dev_file = find_files(data, train, dev)
        own_epochs: dict[str, float | None] = {
            "fine_tune_epochs": fine_tune_epochs,
            "transfer_epochs": transfer_epochs,
            "distill_epochs": distill_epochs,
        }
        chosen_epochs: dict[str, Any] = {
            name: epochs if own is None else own
            for name, own in own_epochs.items()
            if own is not None or epochs is not None
        }
        arguments = Arguments(
            model=model,
            train=train_file,
            dev=dev_file,
            feature_map=feature_map,
            layers=chosen_layers or None,
            max_length=max_length,
            extend_to=extend_to,
            train_limit=train_limit,
            fine_tune=fine_tune,
            batch_size=batch_size,
            bf16=has_bf16() if bf16 is None else bf16,
            seed=seed,
            lengths=chosen_lengths,
            **chosen_epochs,
        )
        report = run(arguments, output, restart)
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
            console.print(f"{what + ':':15}{where}", highlight=False, soft_wrap=True)


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """ "0,2-4" to (0, 2, 3, 4)."""
    found: list[int] = []
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(
                f"{text!r} is no list of numbers such as 0,2-4", param_hint=option
            )
        found += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(found)))


def has_bf16() -> bool:
    """Whether bfloat16 is faster than float32 here: AVX512-BF16 or AMX, or a GPU with it."""
    import torch

    on_gpu = torch.cuda.is_available()
    return bool(torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported())
