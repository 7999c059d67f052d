"""``fastattn compare A B``: two models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastattn.cli import options
from fastattn.cli.exits import exit_codes, writing


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a fine-tuned classifier.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another, softmax or linear.")],
    data: options.Data = None,
    dev: options.Dev = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Tokens that both read of a text \\[default: what each has positions for; with "
            "rotary positions at most 512 for a softmax model].",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    lengths: options.Lengths = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Also draw them into this PNG.")
    ] = None,
    bf16: options.Bf16 = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    threads: options.Threads = None,
) -> None:
    """Show two models side by side: scores with intervals, agreement, size, time, memory."""
    with exit_codes():
        from fastattn.recipes.compare import compare as run
        from fastattn.recipes.comparison import plot_comparison, print_comparison
        from fastattn.recipes.data import find_dev_file
        from fastattn.recipes.errors import OutputError
        from fastattn.recipes.report import write_json

        options.set_up(threads)
        for file in (json_file, plot_file):
            if file is not None and not file.parent.is_dir():
                raise OutputError(f"can't write {file}: there is no folder {file.parent}")
            if file is not None and file.is_dir():
                raise OutputError(f"can't write {file}: it is a folder")
        if plot_file is not None and plot_file.suffix != ".png":
            raise OutputError(f"--plot must end in .png; got {plot_file}")
        dev_file = find_dev_file(data, dev)
        report = run(
            a,
            b,
            dev_file,
            max_length=max_length,
            lengths=options.lengths_of(lengths),
            bf16=options.has_bf16() if bf16 is None else bf16,
            seed=seed,
        )
        print_comparison(report, Console())
        if json_file is not None:
            with writing(json_file):
                write_json(report, json_file)
        if plot_file is not None:
            with writing(plot_file):
                plot_comparison(report, plot_file)
