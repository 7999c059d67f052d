"""One training loop for every stage: ``transformers.Trainer`` with a loss of ours.

The Trainer brings the optimizer, mixed precision, several devices, and checkpoints from which an
interrupted stage goes on. Ours are three things: the loss is a function of (model, batch), batches
hold texts of similar length (on a CPU padding costs as much as text does), and progress is shown
in one line.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fastattn.recipes.memory import give_back
from fastattn.recipes.progress import Advance, progress

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
SCARCE = 0.25  # of the machine's memory: with less left, freed memory is given back
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Settings:
    """How one stage trains. The learning rate rises over the first 6 % of the steps and then
    falls linearly to zero."""

    epochs: float
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 0.01
    bf16: bool = False
    seed: int = 0


class Collator:
    """Rows of a tokenised dataset to one batch, padded to its longest row.

    The batch has the model's inputs, int64 ``labels`` (B,) and int64 ``row`` (B,).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        inputs = [{name: row[name] for name in MODEL_INPUTS if name in row} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        batch["row"] = torch.tensor([row["row"] for row in rows])
        return batch


def model_inputs(batch: Batch) -> Batch:
    """What of a batch goes into the model's forward."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


class LengthGroupedSampler(Sampler[int]):
    """Row numbers such that each run of ``batch_size`` has rows of similar length.

    Rows are shuffled, sorted by length within pools of ``pool`` batches, cut into batches, and the
    batches shuffled (the Trainer's own sampler leaves them sorted: on a small data set every epoch
    then goes from the longest texts to the shortest). The order depends on seed and epoch alone,
    so an interrupted epoch is continued with the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 50) -> None:
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.pool
        pools = [rows[i : i + size] for i in range(0, len(rows), size)]
        ordered = [row for pool in pools for row in sorted(pool, key=lambda r: -self.lengths[r])]
        batches = [
            ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)
        ]
        # A smaller last batch must stay last, or all batches after it would be cut differently.
        full = len(ordered) // self.batch_size
        for i in torch.randperm(full, generator=generator).tolist():
            yield from batches[i]
        for batch in batches[full:]:
            yield from batch


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off also while ``model`` trains: a target that is the model's own output of before
    is blurred by it, and on a CPU it takes a third of the time."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    rates = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate


def fit(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    loss: Loss,
    settings: Settings,
    folder: Path,
    description: str,
    learning_rates: dict[str, float] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    collator: Collator | None = None,
    note: Callable[[], str] | None = None,
) -> float | None:
    """Train the parameters of ``model`` that require gradients, in place.

    Args:
        loss: (model, batch) to a scalar.
        folder: checkpoints of this stage are kept here at the end of each epoch; if there is one,
            training goes on from it.
        learning_rates: factor on the learning rate of the parameters whose name contains the key.
        callbacks: more for the Trainer.
        collator: another than ``Collator``.
        note: what stands beside the progress; by default the loss.

    Returns:
        The mean loss over the last tenth of the steps; None if the checkpoint was of the last one.
    """
    last = _last_checkpoint(folder)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=settings.weight_decay,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        save_strategy="epoch" if settings.epochs > 1 else "no",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = _Trainer(
        model,
        arguments,
        data_collator=collator or Collator(tokenizer),
        train_dataset=dataset,
        loss=loss,
        learning_rates=learning_rates or {},
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # prints a dict at the end
    batches = len(trainer.get_train_dataloader())
    steps = max(1, math.ceil(settings.epochs * batches))
    with progress(description, steps) as advance:
        trainer.add_callback(_GiveBackWhenScarce())
        trainer.add_callback(_ShowProgress(advance, note or trainer.recent_loss))
        trainer.train(resume_from_checkpoint=last)
    recent = trainer.losses[-max(1, len(trainer.losses) // 10) :]
    return float(torch.stack(recent).mean()) if recent else None


class _Trainer(Trainer):
    """The Trainer with our loss, our order of rows and a learning rate per kind of parameter."""

    def __init__(
        self, *args: Any, loss: Loss, learning_rates: dict[str, float], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._loss = loss
        self._learning_rates = learning_rates
        self.losses: list[Tensor] = []
        # Our losses are means over the batch, and take no `num_items_in_batch`.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        loss = self._loss(model, inputs)
        self.losses.append(loss.detach())
        return loss

    def recent_loss(self) -> str:
        return f"loss {float(torch.stack(self.losses[-20:]).mean()):.4f}"

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        train_dataset = train_dataset if train_dataset is not None else self.train_dataset
        lengths: list[int] = train_dataset["length"][:] if train_dataset is not None else []
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        rate, decay = self.args.learning_rate, self.args.weight_decay
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                factors = [f for part, f in self._learning_rates.items() if part in name]
                # Biases, norms and feature maps are not pulled towards zero.
                plain = parameter.ndim < 2 or bool(factors)
                key = (rate * (factors[0] if factors else 1.0), 0.0 if plain else decay)
                groups.setdefault(key, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()],
            lr=rate,
            fused=True,
        )
        return self.optimizer


class _ShowProgress(TrainerCallback):
    def __init__(self, advance: Advance, note: Callable[[], str]) -> None:
        self.advance, self.note, self.step = advance, note, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        count, self.step = state.global_step - self.step, state.global_step
        self.advance(count, self.note())


class _GiveBackWhenScarce(TrainerCallback):
    """Gives what is kept back to the system after a step that left little memory to others.

    Batches of many lengths leave holes between tensors, and a process that keeps them all can grow
    to several times of what it uses at any one time. Giving them back costs up to a quarter of a
    step's time, so it is done only then.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        memory = psutil.virtual_memory()
        if memory.available < SCARCE * memory.total:
            give_back()


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in ``folder``. What was cut off while it was written is deleted: the
    Trainer writes its state last, and would take it for the newest."""
    complete: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / "trainer_state.json").is_file():
            complete[int(path.name.removeprefix("checkpoint-"))] = path
        else:
            shutil.rmtree(path)
    return str(complete[max(complete)]) if complete else None
