"""What is minimised, and the loop that does it, for the deep VAE and for its baselines alike.

The bound alone leaves most groups of latents unused: the warm-up lets them be used before they
cost anything, and the balancing keeps one scale from starving the others meanwhile (NVAE,
section 3.2 and appendix A).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.nvae.data import Images, binarise
from fastattn.recipes.progress import progress

WARM_UP_SHARE, WARM_UP_FLOOR = 0.3, 1e-4


@dataclass(frozen=True)
class Settings:
    """How a model is trained. The learning rate falls along a cosine to a hundredth."""

    steps: int
    batch_size: int = 100
    learning_rate: float = 1e-2
    orthogonal: bool = False  # matrices by Muon instead of Adamax
    warm_up_steps: int = 50
    spectral: float = 1e-2
    average: float = 0.99  # of the weights that are kept, from step to step
    seed: int = 0


def kl_coefficient(step: int, steps: int) -> float:
    """Rises linearly from 1e-4 to 1 over the first 30 % of the steps."""
    return max(min(step / (WARM_UP_SHARE * steps), 1.0), WARM_UP_FLOOR)


def balance(kl: Tensor, group_sizes: list[tuple[int, int]], coefficient: float) -> Tensor:
    """The KL term (B,): ``coefficient`` times the sum over groups of ``kl`` (L, B), balanced.

    While ``coefficient`` < 1, a group counts in proportion to its mean KL and inversely to its
    share of the latents of all scales, so that groups that carry little are charged little.
    The factors average to 1 and have no gradient.
    """
    if coefficient >= 1:
        return kl.sum(0)
    share = kl.new_tensor([max(size**2 / groups, 1.0) for size, groups in group_sizes])
    factors = (kl.detach().mean(1).abs() + 0.01) / (share / share.min())
    factors = factors / factors.mean()
    return coefficient * (factors[:, None] * kl).sum(0)


def batches(images: Images, batch_size: int, steps: int) -> Iterator[Tensor]:
    """``steps`` batches of training images (uint8) in a fresh order each epoch; the last, smaller
    batch of an epoch is left out."""
    size = min(batch_size, len(images.train))
    done = 0
    while True:
        order = torch.randperm(len(images.train))
        for rows in order[: len(order) // size * size].split(size):
            if done == steps:
                return
            done += 1
            yield images.train[rows]


def pixels(batch: Tensor, images: Images, binary: bool) -> Tensor:
    """What the network sees of a batch: a draw of binary pixels, or the grey levels."""
    return binarise(batch, images.levels) if binary else batch.float()


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, int], tuple[Tensor, float]],
    images: Images,
    settings: Settings,
    binary: bool,
    description: str,
) -> nn.Module:
    """Trains ``model`` and returns the running average of it, in evaluation mode.

    Args:
        loss: (pixels, step) to (what to minimise, the bound in nats for the display).

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    torch.manual_seed(settings.seed)
    average = copy.deepcopy(model).eval()
    kept, state = in_one_piece(floats(average)), in_one_piece(floats(model))
    parameters = [*others(model), *matrices(model)]
    weights = nn.Parameter(state[: sum(p.numel() for p in parameters)])
    weights.grad = torch.zeros_like(weights)
    for parameter, gradient in zip(parameters, like(parameters, weights.grad)):
        parameter.grad = gradient
    optimizers = optimizers_for(model, weights, settings)
    model.train()
    shown = math.nan
    with progress(description, settings.steps) as advance:
        for step, batch in enumerate(batches(images, settings.batch_size, settings.steps)):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
            total, bound = loss(pixels(batch, images, binary), step)
            if not math.isfinite(bound):
                raise FloatingPointError(f"the loss is {bound} at step {step}")
            weights.grad.zero_()
            total.backward()
            nn.utils.clip_grad_norm_([weights], 200.0)
            for optimizer in optimizers:
                optimizer.step()
            # Of weights and batch statistics; the first count less, because they are far off.
            kept.lerp_(state, 1 - min(settings.average, (1 + step) / (10 + step)))
            shown = bound if math.isnan(shown) else 0.98 * shown + 0.02 * bound
            advance(1, f"{shown:.2f} nats")
    return average


def optimizers_for(
    model: nn.Module, weights: nn.Parameter, settings: Settings
) -> list[torch.optim.Optimizer]:
    """Adamax for all ``weights``, or with ``settings.orthogonal`` for those that are no matrices.
    Matrices are then left to Muon (Jordan et al. 2024), whose steps favour none of their
    directions: what Adamax learns of the digits in 2,000 steps, it learns in less than 1,000."""
    assert weights.grad is not None
    optimizers: list[torch.optim.Optimizer] = []
    vector, slopes = weights.data, weights.grad
    if settings.orthogonal:
        tensors = matrices(model)
        sizes = [vector.numel() - sum(t.numel() for t in tensors), *(t.numel() for t in tensors)]
        vector, *parts = vector.split(sizes)
        slopes, *part_slopes = slopes.split(sizes)
        flat = []
        for tensor, part, slope in zip(tensors, parts, part_slopes):
            flat.append(nn.Parameter(part.view(len(tensor), -1)))
            flat[-1].grad = slope.view(len(tensor), -1)
        optimizers.append(
            torch.optim.Muon(
                flat,
                lr=settings.learning_rate,
                weight_decay=0.0,
                momentum=0.9,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    rest = nn.Parameter(vector)
    rest.grad = slopes
    optimizers.append(torch.optim.Adamax([rest], lr=settings.learning_rate, eps=1e-3))
    return optimizers


def learning_rate(step: int, settings: Settings) -> float:
    if step < settings.warm_up_steps:
        return settings.learning_rate * (step + 1) / settings.warm_up_steps
    done = (step - settings.warm_up_steps) / max(1, settings.steps - settings.warm_up_steps)
    low = settings.learning_rate / 100
    return low + (settings.learning_rate - low) * (1 + math.cos(math.pi * done)) / 2


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of several outputs with several inputs each; depthwise convolutions have one."""
    return [p for p in model.parameters() if p.dim() > 1 and len(p) > 1 and p.shape[1] > 1]


def others(model: nn.Module) -> list[nn.Parameter]:
    chosen = {id(p) for p in matrices(model)}
    return [p for p in model.parameters() if id(p) not in chosen]


def floats(model: nn.Module) -> list[Tensor]:
    """The parameters, matrices last, and the buffers that are averaged with them."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    return [*others(model), *matrices(model), *buffers]


def in_one_piece(tensors: list[Tensor]) -> Tensor:
    """``tensors`` as one (N,), of which they become parts: what is done to each of some hundred
    small tensors, at every step, takes as long as computing what to do."""
    piece = torch.cat([t.detach().as_strided((t.numel(),), (1,)) for t in tensors])
    for tensor, part in zip(tensors, like(tensors, piece)):
        tensor.data = part
    return piece


def like(tensors: Iterable[Tensor], piece: Tensor) -> list[Tensor]:
    """Consecutive parts of ``piece``, of the shapes and strides of ``tensors``, which are dense."""
    tensors = list(tensors)
    parts = piece[: sum(t.numel() for t in tensors)].split([t.numel() for t in tensors])
    return [part.as_strided(t.shape, t.stride()) for t, part in zip(tensors, parts)]
