"""``fastattn diagnose``: two checkpoints, some texts, one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastattn.cli.exits import exit_codes, writing
from fastattn.cli.options import lengths_of

METRICS = ("dist", "cos", "prob", "none")
BASELINES = ("pad", "mask", "zero")


def diagnose(
    original: Annotated[Path, typer.Argument(help="Folder of the model before the change.")],
    patched: Annotated[Path, typer.Argument(help="Folder of the model after it.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data", help="Texts: .txt, one a line, or .tsv, .csv, .jsonl with a column text."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", help="Folder for diagnose.html and diagnose.json.")
    ],
    rows: Annotated[int, typer.Option(min=1, help="Texts to compare, drawn at random.")] = 8,
    max_length: Annotated[
        int, typer.Option(min=3, help="Tokens read of a text; a matrix costs its square.")
    ] = 48,
    baseline: Annotated[
        str, typer.Option(help=f"Where attributions start: {', '.join(BASELINES)}.")
    ] = "pad",
    points: Annotated[int, typer.Option(min=1, help="Points on the path of attributions.")] = 100,
    metric: Annotated[
        str,
        typer.Option(help=f"Of the impact matrices: {', '.join(METRICS)}."),
    ] = "dist",
    lengths: Annotated[
        str, typer.Option(help="Input lengths to measure time and memory at; '' for none.")
    ] = "128,256,512,1024,2048",
    seed: Annotated[int, typer.Option(min=0, help="Draws the texts.")] = 0,
) -> None:
    """Show on one page whether a linearised or compressed model still works like the original.

    Attributions of both models token beside token, their rank correlations and completeness, how
    strongly each token depends on each other one, and time and memory against input length.
    """
    for given, allowed, option in (
        (baseline, BASELINES, "--baseline"),
        (metric, METRICS, "--metric"),
    ):
        if given not in allowed:
            raise typer.BadParameter(
                f"{given!r} is not one of {', '.join(allowed)}", param_hint=option
            )
    chosen_lengths = lengths_of(lengths)
    with exit_codes(extras=("cli", "diagnose")):
        import transformers

        from fastattn.diagnose.page import render
        from fastattn.diagnose.report import diagnose as run

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        page, numbers_file = output / "diagnose.html", output / "diagnose.json"
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        report = run(
            original,
            patched,
            data,
            rows=rows,
            baseline=baseline,
            points=points,
            metric=metric,
            max_length=max_length,
            lengths=chosen_lengths,
            seed=seed,
        )
        with writing(output):
            numbers_file.write_text(json.dumps(report, indent=1) + "\n")
            page.write_text(render(report), encoding="utf-8")
        summary, console = report["summary"], Console()
        for line in (
            f"tokens rank alike     {_shown(summary['spearman'])} (Spearman, mean of texts)",
            f"impact matrices       {_shown(summary['impact_spearman'])} (Spearman, mean of texts)",
            f"output moved by       {summary['output_difference']:.3f} "
            f"({report['settings']['objective']})",
            f"completeness gap      {summary['gap_original']:.0e}, {summary['gap_patched']:.0e} "
            "(original, patched)",
            f"page                  {page}",
            f"numbers               {numbers_file}",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
