"""Batches of similar length in a reproducible order, and a fit that goes on after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastattn.recipes import training
from fastattn.recipes.data import find_files, load_task, tokenize
from fastattn.recipes.losses import distillation_loss, task_loss
from fastattn.recipes.training import (
    Collator,
    LengthGroupedSampler,
    Settings,
    fit,
    model_inputs,
    without_dropout,
)


def test_sampler_groups_by_length_and_leaves_nothing_out() -> None:
    lengths = [(7 * i) % 101 + 1 for i in range(333)]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3, pool=50)
    order = list(sampler)
    assert sorted(order) == list(range(333)) and len(sampler) == 333
    batches = [order[i : i + 8] for i in range(0, 328, 8)]
    spread = [max(lengths[r] for r in b) - min(lengths[r] for r in b) for b in batches]
    assert max(spread) <= 4  # at random it would be about 80
    longest = [max(lengths[r] for r in b) for b in batches]
    assert longest != sorted(longest, reverse=True)


def test_sampler_order_is_of_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 65))
    first, second = (LengthGroupedSampler(lengths, 4, seed=0) for _ in range(2))
    assert list(first) == list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(LengthGroupedSampler(lengths, 4, seed=1))


def test_collator_pads_to_the_longest_row(encoder: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    task = load_task(*find_files(data))
    tokens = tokenize(task.train, tokenizer, 16)
    batch = Collator(tokenizer)([tokens[i] for i in range(5)])
    longest = max(tokens["length"][:5])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, longest)
    assert batch["attention_mask"].sum(1).tolist() == tokens["length"][:5]
    assert batch["labels"].tolist() == tokens["label"][:5]
    assert batch["row"].tolist() == [0, 1, 2, 3, 4]
    assert "labels" not in model_inputs(batch)


def test_without_dropout_restores_the_rates() -> None:
    model = nn.Sequential(nn.Dropout(0.25), nn.Linear(8, 8), nn.Dropout(0.5)).train()
    x = torch.ones(4, 8)
    with without_dropout(model):
        assert torch.equal(model(x), model(x))
    assert [model[0].p, model[2].p] == [0.25, 0.5]


def test_distillation_loss_is_zero_at_the_teacher(classifier: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokens = tokenize(load_task(*find_files(data)).train, tokenizer, 16)
    batch = Collator(tokenizer)([tokens[i] for i in (3, 1, 2)])
    with torch.no_grad():
        teacher = torch.zeros(10, 2)
        teacher[[3, 1, 2]] = model(**model_inputs(batch)).logits
        loss = distillation_loss(teacher, task_weight=0.0, temperature=2.0)
        assert loss(model, batch).abs() < 1e-6
        teacher[1] += torch.tensor([3.0, -3.0])
        assert loss(model, batch) > 0.1
        with_task = distillation_loss(teacher, task_weight=0.5, temperature=2.0)
        difference = with_task(model, batch) - loss(model, batch)
        torch.testing.assert_close(difference, 0.5 * task_loss(model, batch))


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on_from_its_last_epoch(
    classifier: Path, data: Path, tmp_path: Path
) -> None:
    """Two epochs in one go and one epoch, a kill and one more give the same weights."""
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokens = tokenize(load_task(*find_files(data)).train, tokenizer, 16)
    settings = Settings(epochs=2, learning_rate=1e-3, batch_size=16)

    def train(folder: Path, kill_at: int | None = None) -> dict[str, torch.Tensor]:
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        steps = 0

        def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == kill_at:
                raise Killed
            return task_loss(model, batch)

        ended = fit(model, tokens, tokenizer, loss, settings, folder, "Training")
        assert steps == (24 if not (folder / "killed").exists() else 12)
        assert isinstance(ended, float)
        assert fit(model, tokens, tokenizer, loss, settings, folder, "Training") is None  # no step
        assert steps == (24 if not (folder / "killed").exists() else 12)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_at=15)
    (tmp_path / "killed" / "killed").touch()
    cut_off = tmp_path / "killed" / "checkpoint-18"  # by a kill while it was written
    shutil.copytree(tmp_path / "killed" / "checkpoint-12", cut_off)
    (cut_off / "trainer_state.json").unlink()
    resumed = train(tmp_path / "killed")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_fit_learns_and_leaves_frozen_parameters(
    classifier: Path, data: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokens = tokenize(load_task(*find_files(data)).train, tokenizer, 32)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    embeddings = model.get_input_embeddings().weight.requires_grad_(False)
    before = embeddings.clone()
    settings = Settings(epochs=8, learning_rate=3e-3, batch_size=16)
    loss = fit(model, tokens, tokenizer, task_loss, settings, tmp_path, "Training")
    assert loss < 0.4  # 0.69 at the start
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize("left", [0.2, 0.5])
def test_fit_gives_memory_back_while_it_is_scarce(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float
) -> None:
    given_back = []
    monkeypatch.setattr(training, "give_back", lambda: given_back.append(True))
    memory = SimpleNamespace(total=100.0, available=100 * left)
    monkeypatch.setattr(training.psutil, "virtual_memory", lambda: memory)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokens = tokenize(load_task(*find_files(data)).train, tokenizer, 32)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    settings = Settings(epochs=0.25, learning_rate=1e-4, batch_size=16)
    fit(model, tokens, tokenizer, task_loss, settings, tmp_path, "Training")
    assert len(given_back) == (3 if left < 0.25 else 0)  # steps: a quarter of 192 / 16
