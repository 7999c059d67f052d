"""The main job: a softmax classifier in, a linear-attention classifier of the same accuracy out.

Four stages, each saved when done (see ``run``):

``softmax``   the softmax model, fine-tuned on the task unless it already is: the teacher
``transfer``  swap linear attention in and fit each layer's feature maps to the output of the
              softmax attention they replace (Zhang et al. 2024, LoLCATs)
``distill``   train the whole linear model towards the teacher's predictions and the labels
``measure``   time and peak memory of both against input length
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from fastattn.models.conversion import is_linear
from fastattn.models.positions import position_limit
from fastattn.recipes.augment import ChangingCollator
from fastattn.recipes.data import Task, limit_train, load_task, tokenize
from fastattn.recipes.errors import ModelError
from fastattn.recipes.evaluate import evaluate, predict
from fastattn.recipes.losses import distillation_loss, imitation_loss, task_loss
from fastattn.recipes.models import (
    check_supported,
    is_fine_tuned,
    load_config,
    load_model,
    load_tokenizer,
    new_classifier,
    output_labels,
)
from fastattn.recipes.run import Results, Run
from fastattn.recipes.training import Loss, Settings, fit, without_dropout

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINTS = "checkpoints"
TOKENS_PER_STEP = 4096
DEFAULT_EPOCHS = {"fine_tune": 3.0, "transfer": 2.0, "replace": 3.0, "distill": 2.0, "tune": 1.0}
ENOUGH_STEPS = 600  # of each of the stages, unless that takes more than MAX_EPOCHS
MAX_EPOCHS = 10.0
TASK_WEIGHT = 0.5
TEMPERATURE = 2.0
FEATURE_MAP_RATE = 10.0  # times the learning rate of the other weights
NEW_HEAD_RATE = 10.0  # the same: it starts from noise


@dataclass(frozen=True)
class Arguments:
    """What a run is asked to do; the results depend on nothing else.

    max_length: tokens the softmax model reads of a text; None: what it has positions for, at
    most 512. extend_to: tokens the linear model reads, with its positions extended; None: the
    same. layers: indices of the layers to make linear; None: all. fine_tune: whether to fine-tune
    the softmax model; None: if it has no trained head. batch_size: rows a step; None: 8 to 64 by
    the length of the texts. change: ask the softmax model about changed texts, too. hidden: weight
    of the loss on hidden states in distillation. lengths: input lengths to measure. The epochs, if
    None, are those of ``DEFAULT_EPOCHS``, and more where the data are so few that these would be a
    few hundred steps.
    """

    model: Path
    train: Path
    dev: Path
    feature_map: str = "hedgehog"
    layers: tuple[int, ...] | None = None
    max_length: int | None = None
    extend_to: int | None = None
    train_limit: int | None = None
    fine_tune: bool | None = None
    fine_tune_epochs: float | None = None
    transfer_epochs: float | None = None
    distill_epochs: float | None = None
    fine_tune_rate: float = 1e-4
    transfer_rate: float = 2e-2
    distill_rate: float = 7e-5
    change: bool = True
    hidden: float = 1.0
    batch_size: int | None = None
    bf16: bool = False
    seed: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def student_length(self) -> int:
        """Tokens the linear model reads; needs ``max_length`` to be settled."""
        assert self.max_length is not None
        return max(self.max_length, self.extend_to or 0)


ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)
JobT = TypeVar("JobT")


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
        "distill": run.stage("distill", job.distill),
    }
    stages["measure"] = run.stage("measure", job.measure)
    return job.report(stages)


def prepare(
    arguments: ArgumentsT,
    config: PretrainedConfig,
    output: Path,
    restart: bool,
    job: Callable[[ArgumentsT, Task, PreTrainedTokenizerBase, Path, bool], JobT],
    check_task: Callable[[ArgumentsT, Task], None] | None = None,
) -> tuple[Run, JobT]:
    """Check everything that can be checked before any training; the run and its stages.

    Raises:
        DataError, ModelError, OutputError
    """
    arguments, fine_tune = _settle(arguments, config)
    labels = None if fine_tune else output_labels(config)
    task = load_task(arguments.train, arguments.dev, labels)
    task = limit_train(task, arguments.train_limit, arguments.seed)
    if check_task is not None:
        check_task(arguments, task)
    tokenizer = load_tokenizer(arguments.model)
    run = Run(output, _fingerprint(arguments), restart)
    return run, job(arguments, task, tokenizer, output, fine_tune)


class Job(Generic[ArgumentsT]):
    """The stages of ``linearize``: each takes its folder and returns what ``run.json`` keeps.

    ``student`` is the stage whose model is distilled, ``final`` what the result is called.
    """

    student = "transfer"
    final = "linear"

    def __init__(
        self,
        arguments: ArgumentsT,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        output: Path,
        fine_tune: bool,
    ) -> None:
        self.arguments, self.task, self.tokenizer = arguments, task, tokenizer
        self.output, self.fine_tune = output, fine_tune
        self._tokens: dict[tuple[str, int], Dataset] = {}

    def softmax(self, folder: Path) -> Results:
        args = self.arguments
        results: Results = {"fine_tuned_here": self.fine_tune}
        if self.fine_tune:
            torch.manual_seed(args.seed)
            model = new_classifier(args.model, self.task)
            freeze_embeddings(model)
            train = self.tokens("train", args.max_length)
            settings = self.settings("fine_tune", train)
            results["train_loss"] = fit(
                model,
                train,
                self.tokenizer,
                task_loss,
                settings,
                folder / CHECKPOINTS,
                "Fine-tuning softmax",
                {"classifier": NEW_HEAD_RATE},
            )
        else:
            model = load_model(args.model)
        results["softmax"] = self.scores(model, args.max_length, "Evaluating softmax")
        self.save(model, folder)
        return results

    def transfer(self, folder: Path) -> Results:
        import fastattn

        args = self.arguments
        model = extend(load_model(self.stage_folder("softmax")), args.student_length)
        fastattn.linearize(model, feature_map=args.feature_map, layers=self.transfer_layers)
        results: Results = {
            "swapped": self.scores(model, args.student_length, "Evaluating the bare swap")
        }
        if args.transfer_epochs != 0 and self._fit_feature_maps(model, folder, results):
            results["transferred"] = self.scores(
                model, args.student_length, "Evaluating the matched swap"
            )
        self.save(model, folder)
        return results

    @property
    def transfer_layers(self) -> tuple[int, ...] | None:
        """Layers of the softmax model that get feature maps; None: all."""
        return self.arguments.layers

    def _fit_feature_maps(self, model: PreTrainedModel, folder: Path, results: Results) -> bool:
        """Attention transfer; False if the feature map has nothing to learn."""
        from fastattn.models.transfer import attention_transfer

        train = self.tokens("train", self.arguments.student_length)
        settings = self.settings("transfer", train)
        with attention_transfer(model) as loss, without_dropout(model):
            if not any(parameter.requires_grad for parameter in model.parameters()):
                return False
            results["train_loss"] = fit(
                model,
                train,
                self.tokenizer,
                loss,
                replace(settings, weight_decay=0.0),
                folder / CHECKPOINTS,
                "Matching softmax attention",
            )
        return True

    def distill(self, folder: Path) -> Results:
        args = self.arguments
        results: Results = {}
        model = load_model(self.stage_folder(self.student))
        if args.distill_epochs != 0:
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            freeze_embeddings(model)
            settings = self.settings("distill", self.tokens("train", args.student_length))
            results["train_loss"] = self.imitate(
                model, settings, folder, "Distilling", hidden=args.hidden
            )
        results[self.final] = self.scores(model, args.student_length, "Evaluating the result")
        self.save(model, folder)
        self.save(model, self.output)
        return results

    def imitate(
        self,
        model: nn.Module,
        settings: Settings,
        folder: Path,
        description: str,
        *,
        match: float = 0.0,
        hidden: float = 0.0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> float:
        """Train ``model`` towards the softmax model's predictions and the labels; returns the loss.

        Where both read the same tokens, the teacher is asked about changed texts as well, and
        for its hidden states. Where the student reads on, the teacher's predictions of what it
        reads itself are all there is.
        """
        args = self.arguments
        train = self.tokens("train", args.student_length)
        options: dict[str, Any] = {"task_weight": TASK_WEIGHT, "temperature": TEMPERATURE}
        collator = None
        if args.student_length == args.max_length:
            teacher = load_model(self.stage_folder("softmax")).eval().requires_grad_(False)
            loss = imitation_loss(teacher, match=match, hidden=hidden, bf16=args.bf16, **options)
            if args.change:
                collator = ChangingCollator(
                    self.tokenizer, args.student_length, join=not self.task.has_pairs
                )
        else:
            loss = distillation_loss(self.teacher_logits(), match=match, **options)
        with without_dropout(model):
            return fit(
                model,
                train,
                self.tokenizer,
                loss,
                settings,
                folder / CHECKPOINTS,
                description,
                {"feature_map": FEATURE_MAP_RATE},
                callbacks,
                collator,
            )

    def measure(self, folder: Path) -> Results:
        from fastattn.recipes.measure import measure

        args = self.arguments
        models = {"softmax": self.stage_folder("softmax"), self.final: self.output}
        points = measure(models, args.lengths, bf16=args.bf16) if args.lengths else []
        return {"points": points}

    def report(self, stages: dict[str, Results]) -> dict[str, Any]:
        from fastattn.recipes.report import machine

        args = self.arguments
        models = {
            "softmax": {**stages["softmax"]["softmax"], "max_length": args.max_length},
            **{
                name: {**stages[stage][name], "max_length": args.student_length}
                for stage, name in (
                    ("transfer", "swapped"),
                    ("transfer", "transferred"),
                    ("replace", "replaced"),
                    ("distill", self.final),
                    ("tune", "tuned"),
                )
                if name in stages.get(stage, ())
            },
        }
        search = stages.get("tune", {}).get("search")
        return {
            "machine": machine(),
            "arguments": _as_json(args),
            "data": {
                "train_rows": len(self.task.train),
                "dev_rows": len(self.task.dev),
                "labels": list(self.task.labels),
            },
            "models": models,
            "seconds": {name: results["seconds"] for name, results in stages.items()},
            "measurements": stages["measure"]["points"],
            **({"search": search} if search else {}),
        }

    def stage_folder(self, stage: str) -> Path:
        return self.output / "run" / stage

    def tokens(self, split: str, max_length: int | None) -> Dataset:
        """``train`` or ``dev`` as token ids, cut at ``max_length``; kept for the next stage."""
        assert max_length is not None
        key = (split, max_length)
        if key not in self._tokens:
            dataset = getattr(self.task, split)
            self._tokens[key] = tokenize(dataset, self.tokenizer, max_length)
        return self._tokens[key]

    def settings(self, stage: str, train: Dataset) -> Settings:
        """Settings of a stage: about ``TOKENS_PER_STEP`` tokens a step, and a learning rate that
        goes with the square root of the batch size (the rates asked for are those of 32 rows)."""
        args = self.arguments
        mean = sum(train["length"][:]) / len(train)
        size = args.batch_size or _power_of_two(TOKENS_PER_STEP / mean)
        rate = getattr(args, f"{stage}_rate")
        epochs = getattr(args, f"{stage}_epochs")
        if epochs is None:
            wanted = min(MAX_EPOCHS, ENOUGH_STEPS * size / len(train))
            epochs = float(math.ceil(max(DEFAULT_EPOCHS[stage], wanted)))
        return Settings(
            epochs, rate * (size / 32) ** 0.5, batch_size=size, bf16=args.bf16, seed=args.seed
        )

    def scores(self, model: PreTrainedModel, max_length: int | None, text: str) -> Results:
        dev = self.tokens("dev", max_length)
        logits = predict(model, dev, self.tokenizer, bf16=self.arguments.bf16, description=text)
        return asdict(evaluate(logits, torch.tensor(dev["label"][:])))

    def distillation_loss(self, match: float = 0.0) -> Loss:
        """Towards the softmax model's predictions and the labels."""
        return distillation_loss(
            self.teacher_logits(), task_weight=TASK_WEIGHT, temperature=TEMPERATURE, match=match
        )

    def teacher_logits(self) -> torch.Tensor:
        """The softmax model's logits of the training rows: computed once and kept beside it, also
        for other runs that are given the model of this one."""
        args = self.arguments
        rows = self.task.train.to_dict()
        key = hashlib.sha256(json.dumps([rows, args.max_length, args.bf16]).encode())
        name = f"teacher_logits_{key.hexdigest()[:16]}.safetensors"
        for folder in (self.stage_folder("softmax"), args.model):
            if (folder / name).is_file() and not (folder is args.model and self.fine_tune):
                return load_file(folder / name)["logits"]
        teacher = load_model(self.stage_folder("softmax"))
        train = self.tokens("train", args.max_length)
        text = "Asking the teacher"
        logits = predict(teacher, train, self.tokenizer, bf16=args.bf16, description=text)
        save_file({"logits": logits}, self.stage_folder("softmax") / name)
        return logits

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """The model with its tokenizer; the checkpoints it was trained from are not needed now."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def extend(model: PreTrainedModel, length: int) -> PreTrainedModel:
    """``model`` with positions for ``length`` tokens, in place."""
    import fastattn

    if length > (position_limit(model.config) or length):
        fastattn.extend_positions(model, length, method="hierarchical")
    return model


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Word embeddings stay as they are: in a small encoder they are half of all parameters, most
    rows are never seen in a task's data, and updating them costs more than it brings."""
    model.get_input_embeddings().weight.requires_grad_(False)


def _settle(arguments: ArgumentsT, config: PretrainedConfig) -> tuple[ArgumentsT, bool]:
    """Arguments with the lengths filled in and checked, and whether to fine-tune."""
    if is_linear(config):
        raise ModelError(f"{arguments.model} has linear attention already")
    fine_tune = arguments.fine_tune
    if fine_tune is None:
        fine_tune = not is_fine_tuned(config)
    elif not fine_tune and not is_fine_tuned(config):
        raise ModelError(
            f"{arguments.model} has no classification head (it is a "
            f"{', '.join(config.architectures or ['model of unknown class'])}), "
            "so it must be fine-tuned first: leave out --no-fine-tune"
        )
    limit = position_limit(config)
    max_length = arguments.max_length or min(512, limit or 512)
    if limit is not None and max_length > limit:
        raise ModelError(
            f"max_length {max_length} is more than the {limit} positions of {arguments.model}; "
            "for the linear model to read more, give --extend-to"
        )
    return replace(arguments, max_length=max_length), fine_tune


def _fingerprint(arguments: Arguments) -> dict[str, Any]:
    """The arguments with a digest of each file: a changed file is other data."""
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, path in (
            ("train sha256", arguments.train),
            ("dev sha256", arguments.dev),
            ("config.json sha256", arguments.model / "config.json"),
        )
    }
    return {**_as_json(arguments), **digests}


def _as_json(arguments: Arguments) -> dict[str, Any]:
    fields = asdict(arguments)
    return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in fields.items()}


def _power_of_two(value: float) -> int:
    """The power of two at or below ``value``, from 8 to 64."""
    return max(8, min(64, 1 << max(0, int(value).bit_length() - 1)))
