"""Fine-tuning on the metric itself, as the stage after replacing.

Cross entropy is a stand-in for accuracy, F1 or whatever counts in the end. MLE-guided parameter
search (MGS) needs no gradient of the metric: it tries a few changes of the parameters, half of them
around the step that the loss proposes, and moves to their mean weighted by how much each improved
the metric. Source: Welleck and Cho, "MLE-guided parameter search for task loss minimization in
neural sequence modeling", 2020, https://arxiv.org/abs/2006.03158.

With the metric M, parameters w and the gradient g of the loss, a change d is drawn from

    q(d) = 1/2 N(d | -g, s^2) + 1/2 N(d | 0, s^2)

and weighted by exp(beta (M(w + d) - M(w))) / q(d), which makes the weighted mean an estimate of the
mean of d under p(d) ~ exp(beta M(w + d)). For a quadratic metric that is Newton's step.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastattn.theseus.callback import add_to_logs

Batch = Any  # whatever the loss and the metric understand
Loss = Callable[[nn.Module, Batch], Tensor]
Metric = Callable[[nn.Module, Batch], float]

DENSITIES = ("unit", "none", "exact")
NOISE_UNITS = ("parameter", "gradient", "absolute")
FEWEST_EFFECTIVE_SAMPLES = 1.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchStep:
    """What a step saw: the metric before it and of each candidate (K,), and the candidates'
    weights (K,), float64, which add up to 1."""

    metric: float
    candidate_metrics: Tensor
    weights: Tensor

    @property
    def effective_samples(self) -> float:
        """Of K candidates, how many the weighted mean is worth: 1 / sum of squared weights."""
        return float(1 / self.weights.square().sum())


def mgs_step(
    model: nn.Module,
    loss: Loss,
    metric: Metric,
    batch: Batch,
    *,
    candidates: int = 4,
    beta: float = 100.0,
    noise: float = 0.05,
    noise_unit: str = "parameter",
    density: str = "unit",
    max_norm: float | None = 1.0,
    seed: int | None = None,
) -> SearchStep:
    """Put the negative MGS update into the parameters' ``grad``, for any optimizer to apply.
    Gradients that are there already are dropped; ``search`` starts from accumulated ones.

    Plain SGD with a learning rate of 1 makes the step exactly. The parameters are the same, bit for
    bit, afterwards; beside the model's own memory this takes one copy of its parameters.

    Args:
        loss: (model, batch) to a scalar, with a gradient.
        metric: (model, batch) to a number; HIGHER is better. Called candidates + 1 times in
            evaluation mode without gradients. It should give the same for the same parameters.
        candidates: how many changes of the parameters are tried.
        beta: how sharply a better metric counts: a candidate that gains 1 / beta counts e times.
        noise: standard deviation of the changes, in ``noise_unit``s.
        noise_unit: "parameter": of each tensor, the root mean square of its values, so that what
            is tried is as different at the end of training as at the start, and a tensor of zeros
            goes with the gradient alone; "gradient": the mean of its |gradient| (the authors'
            choice), which vanishes where the loss has converged; "absolute": the same for all.
        density: how q enters the weights. "unit": with a variance of 1, as in the authors' code,
            which tempers it; "none": not at all; "exact": as above, right but of use in a few
            dimensions only, because in many one candidate gets all the weight.
        max_norm: the gradient is clipped to this norm first; None: it is not.
        seed: of the noise; None draws one from torch's generator. Ranks of a distributed run must
            give the same one; their metrics are averaged.

    Raises:
        ValueError, TypeError: an argument out of its range, a metric that is NaN, no gradient.

    A ``RuntimeWarning`` says when fewer than 1.5 candidates count, so that the step is hardly more
    than a random one: then beta is too large or the noise too small.
    """
    _check(candidates, beta, noise, noise_unit, density)
    model.zero_grad(set_to_none=True)
    loss(model, batch).backward()
    _check_dense(model)
    if max_norm is not None:
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None; got {max_norm}")
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return search(
        model, metric, batch, candidates=candidates, beta=beta, noise=noise,
        noise_unit=noise_unit, density=density, seed=seed,
    )  # fmt: skip


def search(
    model: nn.Module,
    metric: Metric,
    batch: Batch,
    *,
    candidates: int = 4,
    beta: float = 100.0,
    noise: float = 0.05,
    noise_unit: str = "parameter",
    density: str = "unit",
    seed: int | None = None,
) -> SearchStep:
    """``mgs_step`` from the gradients that the parameters already have. Parameters without one
    are left alone."""
    _check(candidates, beta, noise, noise_unit, density)
    _check_dense(model)
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("no parameter of model has a gradient: nothing to search around")
    scales = [noise * _unit(noise_unit, p, g) for p, g in zip(parameters, gradients)]
    if not all(map(math.isfinite, scales)) or not all(bool(g.isfinite().all()) for g in gradients):
        raise ValueError("the gradients are not finite")
    seeds = _seeds(seed, candidates)
    before, found, log_density = 0.0, [], torch.zeros(candidates, dtype=torch.float64)
    with _evaluating(model), _restoring(parameters) as saved:
        before = _number(metric(model, batch))
        for k, candidate_seed in enumerate(seeds):
            guided = k % 2 == 0
            noises = _noises(gradients, candidate_seed)
            distances = _Distances(density)
            for w, start, g, s, e in zip(parameters, saved, gradients, scales, noises):
                distances.add(g, s, e, guided)
                w.copy_(start).add_(e, alpha=s)
                if guided:
                    w.sub_(g)
            log_density[k] = distances.log_density(share=(candidates + 1) // 2 / candidates)
            found.append(_number(metric(model, batch)))
    metrics = _mean_over_ranks(torch.tensor([before, *found], dtype=torch.float64))
    weights = _weights(metrics[1:] - metrics[0], log_density, beta)
    _replace_gradients(gradients, scales, seeds, weights.tolist())
    step = SearchStep(float(metrics[0]), metrics[1:], weights)
    _report(step)
    return step


class MGSCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """``Trainer(model, ..., callbacks=[MGSCallback(metric, batches)])``: every step of the Trainer
    becomes one of MGS, around the gradient of the Trainer's own loss (which it clips to its
    ``max_grad_norm``). Logs get ``mgs_metric`` and ``mgs_effective_samples``.

    Args:
        metric: (model, batch) to a number; higher is better.
        batches: what the metric is measured on, in turn. F1 and correlations of a few rows say
            little: give batches of a hundred rows or more, on the model's device.
        options: those of ``search``, except the seed, which follows from the Trainer's and the
            step, so that a resumed run goes on as if it had not stopped.
    """

    def __init__(self, metric: Metric, batches: Sequence[Batch], **options: Any) -> None:
        if len(batches) == 0:
            raise ValueError("batches must have at least one batch")
        if "seed" in options:
            raise TypeError("MGSCallback takes the seed from the Trainer's arguments")
        accepted = inspect.signature(search).bind(None, metric, None, **options)
        accepted.apply_defaults()
        _check(*(accepted.arguments[name] for name in _OPTIONS))
        self.metric, self.batches, self.options = metric, batches, options
        self.steps: list[SearchStep] = []  # since the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            raise ValueError("MGS needs unscaled gradients, so not fp16; use bf16 or float32")

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        batch = self.batches[state.global_step % len(self.batches)]
        seed = args.seed + 1_000_003 * state.global_step
        self.steps.append(search(model, self.metric, batch, seed=seed, **self.options))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.steps or logs is None:
            return
        count = len(self.steps)
        metric = sum(step.metric for step in self.steps) / count
        samples = sum(step.effective_samples for step in self.steps) / count
        add_to_logs(logs, state, {"mgs_metric": metric, "mgs_effective_samples": samples})
        self.steps.clear()


_OPTIONS = ("candidates", "beta", "noise", "noise_unit", "density")


def _check(candidates: int, beta: float, noise: float, noise_unit: str, density: str) -> None:
    if isinstance(candidates, bool) or not isinstance(candidates, int):
        raise TypeError(f"candidates must be an int; got {candidates!r}")
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1; got {candidates}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative; got {beta}")
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be finite and positive; got {noise}")
    if noise_unit not in NOISE_UNITS:
        raise ValueError(f"noise_unit must be one of {', '.join(NOISE_UNITS)}; got {noise_unit!r}")
    if density not in DENSITIES:
        raise ValueError(f"density must be one of {', '.join(DENSITIES)}; got {density!r}")


def _check_dense(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: make its Embedding a dense one")


def _unit(noise_unit: str, parameter: Tensor, gradient: Tensor) -> float:
    if noise_unit == "absolute" or not parameter.numel():
        return 1.0
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    if noise_unit == "gradient":
        return float(gradient.abs().mean(dtype=dtype))
    return float(parameter.detach().to(dtype).square().mean().sqrt())


def _number(value: float) -> float:
    value = float(value)
    if math.isnan(value):
        raise ValueError("metric gave NaN, which is neither better nor worse than anything")
    return value


def _seeds(seed: int | None, candidates: int) -> list[int]:
    if seed is None:
        if _world_size() > 1:
            raise ValueError("seed must be given in a distributed run: ranks must draw the same")
        seed = int(torch.randint(2**62, ()))
    generator = torch.Generator().manual_seed(seed)
    return [int(s) for s in torch.randint(2**62, (candidates,), generator=generator)]


def _noises(gradients: list[Tensor], seed: int) -> Iterator[Tensor]:
    """Standard normal noise for each tensor in turn: from the same seed the same noise, so that
    K changes of all parameters never need to be in memory."""
    generator = torch.Generator(gradients[0].device).manual_seed(seed)
    for g in gradients:
        if g.device != generator.device:
            generator = torch.Generator(g.device).manual_seed(seed)
        yield torch.randn(g.shape, generator=generator, dtype=g.dtype, device=g.device)


class _Distances:
    """How far a change d lies from the two centres of q, added up tensor by tensor.

    With d = s e around 0 and d = s e - g around -g both distances follow from the products of e
    and g, without a third tensor.
    """

    def __init__(self, density: str) -> None:
        self.density = density
        self.to_zero: Tensor | float = 0.0  # |d|^2 / variance
        self.to_guide: Tensor | float = 0.0  # |d + g|^2 / variance

    def add(self, g: Tensor, s: float, e: Tensor, guided: bool) -> None:
        if self.density == "none" or (self.density == "exact" and s == 0):
            return
        variance = s * s if self.density == "exact" else 1.0
        ee, eg, gg = ((x * y).sum(dtype=torch.float64) for x, y in ((e, e), (e, g), (g, g)))
        own = s * s * ee / variance
        other = (s * s * ee + (-2 if guided else 2) * s * eg + gg) / variance
        self.to_guide = self.to_guide + (own if guided else other)
        self.to_zero = self.to_zero + (other if guided else own)

    def log_density(self, share: float) -> float:
        """log q(d) without the constant that all candidates have in common, with ``share`` of them
        around -g."""
        if self.density == "none":
            return 0.0
        distances = torch.tensor([float(self.to_guide), float(self.to_zero)], dtype=torch.float64)
        shares = torch.tensor([share, 1 - share], dtype=torch.float64)
        return float((shares.log() - distances / 2).logsumexp(0))


def _weights(gains: Tensor, log_density: Tensor, beta: float) -> Tensor:
    log_weights = (beta * gains if beta else torch.zeros_like(gains)) - log_density
    weights = log_weights.softmax(0)
    if weights.isnan().any():
        raise ValueError("metric is infinite in a way that leaves no candidate to prefer")
    return weights


@torch.no_grad()
def _replace_gradients(
    gradients: list[Tensor], scales: list[float], seeds: list[int], weights: list[float]
) -> None:
    """Each gradient becomes minus the weighted mean of the changes, in place."""
    for g in gradients:
        g.mul_(sum(weights[::2]))
    for seed, weight in zip(seeds, weights):
        for g, s, e in zip(gradients, scales, _noises(gradients, seed)):
            g.sub_(e, alpha=weight * s)


def _report(step: SearchStep) -> None:
    logger.debug(
        "metric %.4f, candidates %s, effective samples %.2f",
        *(step.metric, [round(m, 4) for m in step.candidate_metrics.tolist()]),
        step.effective_samples,
    )
    if step.effective_samples < FEWEST_EFFECTIVE_SAMPLES < len(step.weights):
        warnings.warn(
            f"fewer than {FEWEST_EFFECTIVE_SAMPLES} of {len(step.weights)} candidates count: "
            "lower beta, or raise noise or candidates",  # no number, so that it is said once
            RuntimeWarning,
            stacklevel=3,
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _restoring(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """A copy of the parameters, which is written back: w + d - d would not be w."""
    saved = [p.detach().clone() for p in parameters]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for parameter, start in zip(parameters, saved):
                parameter.copy_(start)


def _world_size() -> int:
    distributed = torch.distributed
    on = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if on else 1


def _mean_over_ranks(metrics: Tensor) -> Tensor:
    if _world_size() == 1:
        return metrics
    gathered: list[Any] = [None] * _world_size()
    torch.distributed.all_gather_object(gathered, metrics.tolist())
    return torch.tensor(gathered, dtype=torch.float64).mean(0)
