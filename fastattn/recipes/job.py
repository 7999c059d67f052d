"""The stages that ``linearize`` and ``compress`` are made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn
from transformers import TrainerCallback

from fastattn.models.positions import position_limit
from fastattn.recipes.arguments import (
    ArgumentsT,
    as_json,
    fingerprint,
    settle,
    weights_digest,
)
from fastattn.recipes.augment import ChangingCollator, nearest_tokens
from fastattn.recipes.data import Task, limit_train, load_task, tokenize
from fastattn.recipes.evaluate import evaluate, predict
from fastattn.recipes.losses import distillation_loss, imitation_loss, task_loss
from fastattn.recipes.measure import measure
from fastattn.recipes.models import load_model, load_tokenizer, new_classifier, output_labels
from fastattn.recipes.run import CHECKPOINTS, Results, Run
from fastattn.recipes.teacher import kept_logits, predict_in_windows
from fastattn.recipes.training import Loss, Settings, fit, without_dropout
from fastattn.theseus import Theseus, TheseusCallback
from fastattn.theseus.schedules import make_schedule

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENS_PER_STEP = 4096
ENOUGH_STEPS = 600  # of each of the stages, unless that takes more than MAX_EPOCHS
MAX_EPOCHS = 10.0
TASK_WEIGHT = 0.5
TEMPERATURE = 2.0
FEATURE_MAP_RATE = 10.0  # times the learning rate of the other weights
NEW_HEAD_RATE = 10.0  # the same: it starts from noise

JobT = TypeVar("JobT")


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
    arguments, fine_tune = settle(arguments, config)
    labels = None if fine_tune else output_labels(config)
    task = load_task(arguments.train, arguments.dev, labels)
    task = limit_train(task, arguments.train_limit, arguments.seed)
    if check_task is not None:
        check_task(arguments, task)
    tokenizer = load_tokenizer(arguments.model)
    inputs = {name: getattr(arguments, name) for name in ("model", "train", "dev")}
    run = Run(output, fingerprint(arguments), restart, inputs)
    return run, job(arguments, task, tokenizer, output, fine_tune)


class Job(Generic[ArgumentsT]):
    """The stages of ``linearize``: each takes its folder and returns what ``run.json`` keeps.

    ``final`` is what the result is called.
    """

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
            model = load_model(args.model).float()  # a half-precision one would be trained in it
        results["softmax"] = self.scores(model, args.max_length, "Evaluating softmax")
        if self.has_windows:
            logits = self.ask_teacher(model, "dev", "Evaluating softmax in windows")
            results["windows"] = self._scores_of(logits)
        self.save(model, folder)
        return results

    def transfer(self, folder: Path) -> Results:
        import fastattn

        args = self.arguments
        model = extend(load_model(self.stage_folder("softmax"), train=True), args.student_length)
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

    def theseus(self, predecessor: PreTrainedModel) -> Theseus:
        """The softmax model, with what is to be replaced in it, and by what."""
        args = self.arguments
        return Theseus(
            predecessor,
            attention="linear",
            feature_map=args.feature_map,
            linear_layers=args.layers,
            start=load_model(self.stage_folder("transfer")),
            match=args.match,
            seed=args.seed,
        )

    def replace(self, folder: Path) -> Results:
        args = self.arguments
        softmax = extend(load_model(self.stage_folder("softmax"), train=True), args.student_length)
        theseus = self.theseus(softmax)
        results: Results = {}
        if args.replace_epochs != 0:
            train = self.tokens("train", args.student_length)
            settings = self.settings("replace", train)
            steps = settings.epochs * len(train) / settings.batch_size
            theseus.schedule = make_schedule(args.schedule, int(steps), args.base)
            callback = TheseusCallback(theseus)
            results["train_loss"] = self.imitate(
                theseus, settings, folder, "Replacing", match=args.match, callbacks=[callback]
            )
        model = theseus.export()
        results["replaced"] = self.scores(model, args.student_length, "Evaluating the successor")
        self.save(model, folder)
        return results

    def distill(self, folder: Path) -> Results:
        args = self.arguments
        results: Results = {}
        student = "transfer" if args.replace_epochs == 0 and self.final == "linear" else "replace"
        model = load_model(self.stage_folder(student), train=True)
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
    ) -> float | None:
        """Train ``model`` towards the softmax model's predictions and the labels; returns the loss
        as ``fit`` does.

        For changed texts and hidden states the teacher works beside it. Otherwise, and where the
        student reads further than the teacher can, the teacher's predictions of the rows as they
        are are all there is, made once.
        """
        args = self.arguments
        train = self.tokens("train", args.student_length)
        options: dict[str, Any] = {"task_weight": TASK_WEIGHT, "temperature": TEMPERATURE}
        collator = None
        same_tokens = args.student_length == args.max_length
        if same_tokens and (args.change or hidden):
            teacher = (
                load_model(self.stage_folder("softmax"), train=True).eval().requires_grad_(False)
            )
            loss = imitation_loss(teacher, match=match, hidden=hidden, bf16=args.bf16, **options)
            if args.change:
                collator = self._changing_collator(train, teacher)
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

    def _changing_collator(self, train: Dataset, teacher: PreTrainedModel) -> ChangingCollator:
        embeddings: Any = teacher.get_input_embeddings()
        special = set(self.tokenizer.all_special_ids)
        tokens = {token for row in train["input_ids"] for token in row} - special
        return ChangingCollator(
            self.tokenizer,
            self.arguments.student_length,
            join=not self.task.has_pairs,
            neighbours=nearest_tokens(embeddings.weight, tokens),
        )

    def measure(self, folder: Path) -> Results:
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
                    ("softmax", "windows"),
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
            "arguments": as_json(args),
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
            epochs = float(math.ceil(max(args.default_epochs[stage], wanted)))
        return Settings(
            epochs, rate * (size / 32) ** 0.5, batch_size=size, bf16=args.bf16, seed=args.seed
        )

    def scores(self, model: PreTrainedModel, max_length: int | None, text: str) -> Results:
        dev = self.tokens("dev", max_length)
        return self._scores_of(
            predict(model, dev, self.tokenizer, bf16=self.arguments.bf16, description=text)
        )

    def _scores_of(self, logits: torch.Tensor) -> Results:
        return asdict(evaluate(logits, torch.tensor(self.task.dev["label"][:])))

    @property
    def has_windows(self) -> bool:
        """Whether the softmax model reads in windows what the result reads at once. (Not where
        texts are pairs: half a pair is none.)"""
        args = self.arguments
        return args.student_length != args.max_length and not self.task.has_pairs

    def ask_teacher(self, model: PreTrainedModel, split: str, text: str) -> torch.Tensor:
        """The softmax model's logits, of whole texts if it ``has_windows``."""
        args = self.arguments
        assert args.max_length is not None
        how: dict[str, Any] = {"bf16": args.bf16, "description": text}
        if not self.has_windows:
            return predict(model, self.tokens(split, args.max_length), self.tokenizer, **how)
        tokens = self.tokens(split, args.student_length)
        return predict_in_windows(model, tokens, self.tokenizer, args.max_length, **how)

    def distillation_loss(self, match: float = 0.0) -> Loss:
        """Towards the softmax model's predictions and the labels."""
        return distillation_loss(
            self.teacher_logits(), task_weight=TASK_WEIGHT, temperature=TEMPERATURE, match=match
        )

    def teacher_logits(self) -> torch.Tensor:
        """The softmax model's logits of the training rows: computed once and kept beside it, also
        for other runs that are given the model of this one."""
        args = self.arguments
        softmax = self.stage_folder("softmax")
        rows = self.tokens("train", args.student_length)["input_ids"][:]
        weights = weights_digest(softmax)
        read = [args.max_length, args.student_length if self.has_windows else None]

        def ask() -> torch.Tensor:
            return self.ask_teacher(load_model(softmax, train=True), "train", "Asking the teacher")

        folders = [softmax] if self.fine_tune else [softmax, args.model]
        return kept_logits(folders, [rows, read, args.bf16, weights], ask)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """The model with its tokenizer, which lets through as many tokens as the model reads."""
        model.save_pretrained(folder)
        tokenizer = copy.deepcopy(self.tokenizer)
        extend_to, limit = self.arguments.extend_to, position_limit(model.config)
        if extend_to is not None and (limit is None or limit >= extend_to):
            tokenizer.model_max_length = extend_to
        tokenizer.save_pretrained(folder)


def extend(model: PreTrainedModel, length: int) -> PreTrainedModel:
    """``model`` with positions for ``length`` tokens, in place."""
    import fastattn

    if length > (position_limit(model.config) or length):
        fastattn.extend_positions(model, length, method="repeat")
    return model


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Word embeddings stay as they are: in a small encoder they are half of all parameters, most
    rows are never seen in a task's data, and updating them costs more than it brings."""
    model.get_input_embeddings().weight.requires_grad_(False)


def _power_of_two(value: float) -> int:
    """The power of two at or below ``value``, from 8 to 64."""
    return max(8, min(64, 1 << max(0, int(value).bit_length() - 1)))
