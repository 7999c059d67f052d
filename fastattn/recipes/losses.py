"""What the stages minimise: functions of (model, batch) for ``training.fit``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.recipes.training import Batch, Loss, model_inputs


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
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, -1),
            F.log_softmax(target / temperature, -1),
            log_target=True,
            reduction="batchmean",
        )
        # The gradient of softened logits is smaller by 1 / temperature^2.
        total = temperature**2 * divergence
        if task_weight:
            total = total + task_weight * F.cross_entropy(logits, batch["labels"])
        return total + match * output.matching_loss if match else total

    return loss
