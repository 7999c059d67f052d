"""Through transformers' Trainer: resuming in the middle of replacing, and two processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattn.theseus import Theseus
from tests.theseus.conftest import make
from tests.theseus.train import make_theseus, search_step, train

ROOT = Path(__file__).parents[2]


def assert_equal(one: Theseus, two: Theseus) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_the_middle_changes_nothing(tmp_path: Path, accumulate: int) -> None:
    """Also with dropout, and with two forward passes, so two draws, for each optimizer step."""
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": accumulate,
    }
    whole = make_theseus(dropout=0.1)
    record = train(whole, tmp_path / "whole", 8 // accumulate, **options)
    assert record.state.global_step == 16 and len(record.gates) == 16 * accumulate
    assert len(set(record.gates)) == 4  # of two modules: all four combinations

    stopped = train(
        make_theseus(dropout=0.1), tmp_path / "cut", 8 // accumulate, stop_after=7, **options
    )
    assert stopped.state.global_step == 7
    resumed = make_theseus(dropout=0.1)
    again = train(resumed, tmp_path / "cut", 8 // accumulate, resume=True, **options)
    assert again.gates == record.gates[len(record.gates) - len(again.gates) :]
    assert 0 < len(again.gates) < len(record.gates)
    assert_equal(whole, resumed)


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_checkpointing_of_activations_and_smoothed_labels(tmp_path: Path, attention: str) -> None:
    """Options of the Trainer that look into the model: the first changes no number."""
    plain, saving = (make_theseus(attention=attention) for _ in range(2))
    train(plain, tmp_path / "plain", 8, label_smoothing_factor=0.1)
    train(saving, tmp_path / "saving", 8, label_smoothing_factor=0.1, gradient_checkpointing=True)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, saving.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_two_ranks_draw_the_same_gates_and_train_as_one(tmp_path: Path) -> None:
    """torchrun with gloo: two processes with batches of 4 against one process with batches of 8."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    command += ["-m", "tests.theseus.train", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert zero["world"] == one["world"] == 2
    assert zero["gates"] == one["gates"] and len(zero["gates"]) == 16
    for name, value in zero["weights"].items():
        assert torch.equal(value, one["weights"][name]), name
    alone = make_theseus()
    record = train(alone, tmp_path / "alone", 8)
    assert record.gates == zero["gates"]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, zero["weights"][name], rtol=1e-3, atol=1e-4)
    # The search: each rank measured half of the rows, and both took the step of one that saw all.
    step, gradients = search_step(0, 1)
    assert torch.equal(zero["metrics"], one["metrics"])
    torch.testing.assert_close(zero["metrics"], step.candidate_metrics, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(zero["gradients"]) == len(one["gradients"]) > 20
    for expected, first, second in zip(gradients, zero["gradients"], one["gradients"]):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-6)


def test_share_is_logged_to_whatever_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = train(make_theseus(), tmp_path, 32, logging_steps=1, logging_strategy="steps")
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    shares = [float(ast.literal_eval(line)["replacing"]) for line in lines]
    assert shares == [pytest.approx(0.3 + 0.7 / 12 * step, rel=1e-3) for step in range(4)]
    history = [entry["replacing"] for entry in trainer.state.log_history if "loss" in entry]
    assert history == pytest.approx(shares, rel=1e-3)


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    theseus = Theseus(make(head="ForMaskedLM"), num_layers=2)
    file = tmp_path / "weights.safetensors"
    save_file(theseus.state_dict(), file)
    theseus.steps = 5
    theseus.load_state_dict(load_file(file))
    assert theseus.steps == 0
    model = theseus.export()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_matching_in_a_compiled_model() -> None:
    """Also where the share of the successors has changed since the first call."""
    theseus = make_theseus(match=1.0).train()
    rows = {"input_ids": torch.randint(5, 50, (4, 9)), "labels": torch.tensor([0, 1, 0, 1])}
    compiled = torch.compile(theseus, backend="eager")
    for _ in range(3):
        forwards = theseus.forwards
        plain = theseus(**rows).loss
        theseus.forwards = forwards  # the same gates
        torch.testing.assert_close(compiled(**rows).loss, plain)
        theseus.step()
