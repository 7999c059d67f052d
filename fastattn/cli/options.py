"""Options that several subcommands have, each said once, and what they set up alike."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, DATA, TRAINING = "Model", "Data", "Training"


class Schedule(str, Enum):
    linear = "linear"
    constant = "constant"
    blend = "blend"


Output = Annotated[
    Path,
    typer.Option(
        "--output",
        help="Folder for the model, report.json and report.png. New, empty, or of the same run: "
        "then the run goes on from its last saved stage.",
        rich_help_panel=MODEL,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder with train.* and dev.* (.tsv, .csv or .jsonl) with the columns text, label "
        "and perhaps text_pair.",
        rich_help_panel=DATA,
    ),
]
Train = Annotated[
    Path | None,
    typer.Option("--train", help="Training file, if not in --data.", rich_help_panel=DATA),
]
Dev = Annotated[
    Path | None,
    typer.Option("--dev", help="Dev file, if not in --data.", rich_help_panel=DATA),
]
TrainLimit = Annotated[
    int | None,
    typer.Option(
        min=2, help="Use only this many training rows, drawn at random.", rich_help_panel=DATA
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens that the softmax model reads of a text \\[default: what it has positions for, "
        "at most 512].",
        rich_help_panel=DATA,
    ),
]
ExtendTo = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens that the result reads, with its position embeddings extended \\[default: as "
        "--max-length].",
        rich_help_panel=MODEL,
    ),
]
FineTune = Annotated[
    bool | None,
    typer.Option(
        "--fine-tune/--no-fine-tune",
        help="Fine-tune the softmax model first \\[default: if it has no trained head].",
        rich_help_panel=TRAINING,
    ),
]
Epochs = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="Epochs of each of the trainings, instead of their own defaults.",
        rich_help_panel=TRAINING,
    ),
]


def stage_epochs(what: str, default: float, least: float = 0) -> Any:
    """The option of one training's epochs; ``default`` as in the recipe's ``default_epochs``."""
    help_text = f"{what} \\[default: {default:g}, or more for few rows]."
    return typer.Option(min=least, help=help_text, rich_help_panel=TRAINING)


FineTuneEpochs = Annotated[
    float | None,
    stage_epochs("Of fine-tuning the softmax model, where that is done", 3, least=0.01),
]
TransferEpochs = Annotated[
    float | None,
    stage_epochs("Of matching each linear layer's output to its softmax layer's", 2),
]
ReplacingSchedule = Annotated[
    Schedule,
    typer.Option(
        help="Of replacing: the chance of a module to be replaced rises to 1 (linear) or is 1/2 "
        "and then 1 (constant), or both run and their weights change (blend).",
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Rows a step \\[default: 8 to 64, by the length of the texts].",
        rich_help_panel=TRAINING,
    ),
]
Bf16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--no-bf16",
        help="bfloat16 autocast \\[default: where the processor has bfloat16 instructions].",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[int, typer.Option(min=0, rich_help_panel=TRAINING)]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads \\[default: torch's].", rich_help_panel=TRAINING),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="Input lengths to measure time and memory at; '' for none \\[default: 128,256,... to "
        "8192].",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Start over what is in --output.")]


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """ "0,2-4" to (0, 2, 3, 4)."""
    found: list[int] = []
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(
                f"{text!r} is no list of numbers such as 0,2-4", param_hint=option
            )
        between = range(int(first), int(last or first) + 1)
        if not between:
            raise typer.BadParameter(f"{part!r} has its larger number first", param_hint=option)
        found += between
    return tuple(sorted(set(found)))


def lengths_of(text: str | None) -> tuple[int, ...]:
    """The lengths that ``--lengths`` names, or those by default."""
    if text is None:
        from fastattn.recipes.measure import LENGTHS

        return LENGTHS
    found = numbers(text, "--lengths")
    if 0 in found:
        raise typer.BadParameter("an input has at least 1 token; got 0", param_hint="--lengths")
    return found


def refuse_without(context: typer.Context, needed: str, *names: str) -> None:
    """Of the parameters ``names``, those that were given would do nothing, as ``needed`` is not."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(
                f"has no effect without {needed}", param_hint="--" + name.replace("_", "-")
            )


def refuse_idle_fine_tuning(context: typer.Context, model: Path, fine_tune: bool | None) -> None:
    """Epochs of fine-tuning do nothing where the softmax model is taken as it is.

    Raises:
        ModelError: ``model`` holds none.
    """
    from fastattn.recipes.models import is_fine_tuned, load_config

    if fine_tune is None and is_fine_tuned(load_config(model)):
        needed = f"--fine-tune, as {model} is fine-tuned already"
        refuse_without(context, needed, "fine_tune_epochs")


def has_bf16() -> bool:
    """Whether bfloat16 is faster than float32 here: AVX512-BF16 or AMX, or a GPU with it."""
    import torch

    on_gpu = torch.cuda.is_available()
    return bool(torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported())


def chosen_epochs(every: float | None, **own: float | None) -> dict[str, Any]:
    """Epochs by stage where the user said something: a stage's own, else those for all."""
    said = {name: every if value is None else value for name, value in own.items()}
    return {name: value for name, value in said.items() if value is not None}


def set_up(threads: int | None) -> None:
    """Set the threads and keep freed memory; no log lines and bars of transformers between ours."""
    import torch
    import transformers

    from fastattn.recipes.memory import keep_freed_memory

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
