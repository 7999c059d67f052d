"""Trains a tiny Theseus through the Trainer; also the program that two ranks run, with a step of
MGS at its end.

``python -m tests.theseus.train FOLDER`` under torchrun writes FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastattn.theseus import LinearSchedule, Theseus, TheseusCallback
from fastattn.theseus.mgs import SearchStep, mgs_step

ROWS, TOKENS = 64, 9


class Rows(Dataset):
    """Random tokens; the label says whether the first is from the upper half of the vocabulary."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 50, (ROWS, TOKENS), generator=generator)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = self.ids[row]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": (ids[0] > 27).long(),
        }


def make_theseus(dropout: float = 0.0, **options: Any) -> Theseus:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, initializer_range=0.2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    options = {"num_layers": 2, "attention": "linear", **options}
    schedule = LinearSchedule.over(12, base=0.3)
    return Theseus(BertForSequenceClassification(config), schedule=schedule, seed=3, **options)


class RecordingTrainer(Trainer):
    """Keeps the gates of each pass and the batches' rows in the order they came."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gates: list[tuple[float, ...]] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        theseus = self.accelerator.unwrap_model(model)
        self.gates.append(tuple(block.share for block in theseus.blocks))
        return loss


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def train(
    theseus: Theseus,
    folder: Path,
    batch: int,
    resume: bool = False,
    stop_after: int | None = None,
    **options: Any,
) -> RecordingTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        num_train_epochs=2,
        learning_rate=1e-3,
        seed=7,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_strategy": "no", **options},
    )
    callbacks: list[TrainerCallback] = [TheseusCallback(theseus)]
    if stop_after is not None:
        callbacks.append(StopAfter(stop_after))
    trainer = RecordingTrainer(theseus, arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def search_step(rank: int, world: int) -> tuple[SearchStep, list[torch.Tensor]]:
    """One step of MGS, and the gradients it leaves. Of the metric each rank sees its own rows."""
    model, rows = make_theseus().export(), Rows()
    all_rows = default_collate([rows[row] for row in range(ROWS)])
    own_rows = {name: values[rank::world] for name, values in all_rows.items()}
    step = mgs_step(
        model,
        lambda model, _: model(**all_rows).loss,
        lambda model, _: -float(model(**own_rows).loss),
        None,
        beta=5.0,
        seed=5,
    )
    return step, [p.grad for p in model.parameters() if p.grad is not None]


def main() -> None:
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    theseus = make_theseus()
    trainer = train(theseus, folder / "run", batch=4)
    world = trainer.args.world_size
    step, gradients = search_step(rank, world)
    results = {
        "gates": trainer.gates, "weights": theseus.state_dict(), "world": world,
        "metrics": step.candidate_metrics, "gradients": gradients,
    }  # fmt: skip
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
