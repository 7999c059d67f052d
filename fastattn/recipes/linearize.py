"""The main job: a softmax classifier in, a linear-attention classifier of the same accuracy out.

The stages, each saved when done (see ``run``):

``softmax``   the softmax model, fine-tuned on the task unless it already is: the teacher
``transfer``  swap linear attention in and fit each layer's feature maps to the output of the
              softmax attention they replace (Zhang et al. 2024, LoLCATs)
``replace``   if asked for: replace softmax attention by linear attention, module by module, at a
              rising rate (``fastattn.theseus``)
``distill``   train the whole linear model towards the teacher's predictions and the labels
``measure``   time and peak memory of both against input length
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastattn.recipes.arguments import Arguments
from fastattn.recipes.job import Job, prepare
from fastattn.recipes.models import check_supported, load_config


def linearize(arguments: Arguments, output: Path, restart: bool = False) -> dict[str, Any]:
    """Run all stages that are not done yet; returns the report.

    The linear model and its tokenizer are saved in ``output``, the softmax model in
    ``output/run/softmax``.

    Raises:
        DataError, ModelError, OutputError: before any training.
    """
    config = load_config(arguments.model)
    check_supported(config, arguments.feature_map, arguments.layers)
    run, job = prepare(arguments, config, output, restart, Job)
    stages = {
        "softmax": run.stage("softmax", job.softmax),
        "transfer": run.stage("transfer", job.transfer),
    }
    if arguments.replace_epochs != 0:
        stages["replace"] = run.stage("replace", job.replace)
    stages["distill"] = run.stage("distill", job.distill)
    stages["measure"] = run.stage("measure", job.measure, arguments.lengths)
    return job.report(stages)
