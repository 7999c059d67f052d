"""What the stages minimise: functions of (model, batch) for ``training.fit``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.recipes.training import Batch, Loss, model_inputs
from fastattn.theseus.replaceable import relative_error


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the model's logits against the labels."""
    logits = model(**model_inputs(batch)).logits
    return F.cross_entropy(logits.float(), batch["labels"])


def distillation_loss(
    teacher_logits: Tensor, *, task_weight: float, temperature: float, match: float = 0.0
) -> Loss:
    """Kullback-Leibler divergence from the teacher's softened predictions, plus the task's loss
    (Hinton et al. 2015).

    Args:
        teacher_logits: float32 (rows, classes), in the order of the data set: the teacher runs
            once over the data, not once an epoch.
        task_weight: weight of the cross entropy against the labels.
        match: weight of the ``matching_loss`` in the model's output (see ``Theseus``).
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        output = model(**model_inputs(batch))
        logits = output.logits.float()
        target = teacher_logits.to(logits.device)[batch["row"]]
        total = _divergence(logits, target, temperature)
        if task_weight:
            total = total + task_weight * F.cross_entropy(logits, batch["labels"])
        return total + match * output.matching_loss if match else total

    return loss


def imitation_loss(
    teacher: nn.Module,
    *,
    task_weight: float,
    temperature: float,
    match: float = 0.0,
    hidden: float = 0.0,
    bf16: bool = False,
) -> Loss:
    """As ``distillation_loss`` with the teacher at work beside the student: for texts that are not
    in the data, and for its hidden states.

    Args:
        teacher: in evaluation mode; has n layers where the student has m, m divides n.
        hidden: weight of the squared error of the student's hidden states after each of its
            layers, against the teacher's after n/m as many, relative to their variance; a mean
            over layers.
        bf16: run the teacher in bfloat16 autocast, as the Trainer runs the student.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs = model_inputs(batch)
        capture = {"output_hidden_states": True} if hidden else {}
        device = batch["input_ids"].device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            goal = teacher.to(device)(**inputs, **capture)
        output = model(**inputs, **capture)
        total = _divergence(output.logits.float(), goal.logits.float(), temperature)
        if task_weight:
            labels = batch["labels"]  # of changed texts there is none
            errors = F.cross_entropy(output.logits.float(), labels, reduction="sum")
            total = total + task_weight * errors / (labels >= 0).sum().clamp_min(1)
        if match:
            total = total + match * output.matching_loss
        if hidden:
            got, goals = output.hidden_states[1:], goal.hidden_states[1:]
            every = len(goals) // len(got)
            distances = [
                relative_error(mine.float(), its.float(), batch.get("attention_mask"))
                for mine, its in zip(got, goals[every - 1 :: every], strict=True)
            ]
            total = total + hidden * torch.stack(distances).mean()
        return total

    return loss


def _divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened predictions. The gradient of softened logits is
    smaller by 1 / temperature^2, which is made up for."""
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, -1),
        F.log_softmax(target / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    return temperature**2 * divergence
