"""``python -m examples.nvae``: train, measure, compare and draw."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.nvae.baselines import PlainVAE, factorised_nats
from examples.nvae.cells import MIXERS
from examples.nvae.data import DataError, Images, load
from examples.nvae.evaluate import SAMPLES, Nats, evaluate
from examples.nvae.exact import SpectralRegulariser
from examples.nvae.model import NVAE, Shape, reestimate_batch_norm
from examples.nvae.picture import draw
from examples.nvae.training import Settings, balance, fit, kl_coefficient
from fastattn.recipes.memory import keep_freed_memory

PLAIN_BATCH_SIZE = 100
TRAINING_SECONDS, LEAST_STEPS, MOST_STEPS = 200, 1000, 2000

console = Console()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for name in ("matplotlib", "PIL"):  # the picture comes last: it should not fail then
        if importlib.util.find_spec(name) is None:
            sys.exit(f"error: this example needs {name}: pip install 'fastattn[examples]'")
    start = time.monotonic()
    keep_freed_memory()
    torch.manual_seed(options.seed)
    try:
        images = load(options.data, options.size, options.split)
        shape = shape_for(images, options)
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        run(images, shape, options)
    except FloatingPointError as error:
        sys.exit(f"error: {error}: try a lower --learning-rate")
    say(f"{(time.monotonic() - start) / 60:.1f} minutes")


def run(images: Images, shape: Shape, options: argparse.Namespace) -> None:
    binary = shape.levels == 2
    say(
        f"{images.name}: {len(images.train)} images for training and {len(images.test)} for "
        f"testing, {images.channels} x {images.size} x {images.size}, "
        f"{'binary draws of ' if binary else ''}{images.levels} grey levels"
    )
    options.steps = options.steps or affordable_steps(shape, images, options)
    model = NVAE(shape)
    say(
        f"NVAE with {shape.mixer}: {count(model):,} parameters, {sum(shape.groups)} groups, "
        f"{options.steps} steps of {options.batch_size} images"
    )
    curve: list[tuple[int, float]] = []
    model = train_nvae(model, images, settings_for(options), curve)
    torch.save(model.state_dict(), options.output / "nvae.pt")
    results = {f"NVAE, {shape.mixer}": (count(model), measure(model, images, binary, options))}
    if binary:
        plain = train_plain(images, options)
        results["plain VAE"] = (count(plain), measure(plain, images, binary, options))
    report(images, results, shape, options)

    reestimate_batch_norm(model, options.temperature)
    path = options.output / "nvae.png"
    nats = results[f"NVAE, {shape.mixer}"][1]
    title = f"NVAE with {shape.mixer} on {images.name}: bound {nats.bound:.2f} nats"
    draw(model, images, binary, options.temperature, curve, title, path)
    say(f"picture: {path}")


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Where there are any: help texts say themselves what happens without."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nvae",
        description="Train a deep hierarchical VAE with linear attention, and measure it in nats.",
        formatter_class=ShowDefaults,
    )
    add = parser.add_argument
    add("--data", type=Path, help="MNIST-format file, folder of such files, or of images; "
        "scikit-learn's digits if not given")  # fmt: skip
    add("--size", type=int, help="height and width to bring the images of a folder to")
    add("--output", type=Path, default=Path("out/nvae"), help="folder for picture and report")
    add("--mixer", choices=MIXERS, default="attention", help="how pixels exchange information")
    add("--likelihood", choices=("bernoulli", "logistic"), default=None,
        help="binary draws of the pixels, or their grey levels by a mixture of logistics; "
        "bernoulli for one channel, logistic for colour, if not given")  # fmt: skip
    add("--flow", action="store_true", help="inverse autoregressive flow in the posteriors")
    add("--groups", type=numbers, default=(2, 2), help="groups of latents by scale, coarsest first")
    add("--channels", type=int, default=16, help="at full resolution")
    add("--latents", type=int, default=8, help="channels of a group of latents")
    add("--cells", type=int, default=1, help="residual cells per group")
    add("--steps", type=int,
        help=f"of training; {LEAST_STEPS} to {MOST_STEPS}, as this machine can do in "
        f"{TRAINING_SECONDS} seconds, if not given")  # fmt: skip
    add("--plain-steps", type=int, default=3000, help="of training, for the plain VAE")
    add("--batch-size", type=int, default=300,
        help=f"images of a step; the plain VAE takes {PLAIN_BATCH_SIZE}")  # fmt: skip
    add("--learning-rate", type=float, default=3e-2)
    add("--spectral", type=float, default=1e-3, help="weight of the spectral regulariser")
    add("--samples", type=int, default=SAMPLES, help="importance samples per test image")
    add("--temperature", type=float, default=0.8, help="of the samples in the picture")
    add("--seed", type=int, default=0, help="of weights and noise")
    add("--split", type=int, default=0, help="seed of the split into training and test images")
    options = parser.parse_args(arguments)
    for name in ("channels", "latents", "cells", "steps", "plain_steps", "batch_size", "samples"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("learning_rate", "temperature"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite")
    if not 0 <= options.spectral < math.inf:
        parser.error("--spectral must be at least 0 and finite")
    return options


def numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers such as 2,2")
    return found


def shape_for(images: Images, options: argparse.Namespace) -> Shape:
    likelihood = options.likelihood or ("bernoulli" if images.channels == 1 else "logistic")
    if likelihood == "bernoulli" and images.channels != 1:
        raise DataError("--likelihood bernoulli is for images of one channel; these are in colour")
    shape = Shape(
        size=images.size,
        image_channels=images.channels,
        levels=2 if likelihood == "bernoulli" else images.levels,
        channels=options.channels,
        max_channels=4 * options.channels if images.size > 8 else 2 * options.channels,
        latent_channels=options.latents,
        groups=options.groups,
        cells=options.cells,
        mixer=options.mixer,
        flow=options.flow,
    )
    if min(options.batch_size, len(images.train)) == 1 and shape.scales[0][1] == 1:
        raise DataError(
            "a step of one image of one pixel, as the coarsest scale has it, has no batch "
            "statistics: give more images, a larger --batch-size, or fewer scales in --groups"
        )
    return shape


def settings_for(options: argparse.Namespace) -> Settings:
    return Settings(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        orthogonal=True,
        spectral=options.spectral,
        seed=options.seed,
    )


def affordable_steps(shape: Shape, images: Images, options: argparse.Namespace) -> int:
    """By the time of a few steps of a model that is thrown away; no random number is used up."""
    seconds = 0.0
    with torch.random.fork_rng():
        model = NVAE(shape)
        for steps in (3, 10):  # the first are slower
            settings = replace(settings_for(options), steps=steps)
            start = time.monotonic()
            train_nvae(model, images, settings, [], "Timing steps")
            seconds = (time.monotonic() - start) / steps
    return steps_within(TRAINING_SECONDS, seconds)


def steps_within(seconds: float, seconds_per_step: float) -> int:
    """In hundreds, not beyond ``LEAST_STEPS`` and ``MOST_STEPS``."""
    steps = int(seconds / seconds_per_step / 100) * 100
    return max(LEAST_STEPS, min(steps, MOST_STEPS))


def train_nvae(
    model: NVAE,
    images: Images,
    settings: Settings,
    curve: list[tuple[int, float]],
    description: str = "Training NVAE",
) -> NVAE:
    """The running average of the trained model; ``curve`` gets (step, mean bound) now and then."""
    # Weights change little in a step, and the vectors stay: one iteration a step follows them.
    regulariser = SpectralRegulariser(model, iterations=1)
    sizes = model.group_sizes()
    every, recent = max(1, settings.steps // 100), []

    def loss(x: Tensor, step: int) -> tuple[Tensor, float]:
        said = model.encode(x)
        misfit = -said.likelihood.log_prob(x)
        kl = balance(said.kl, sizes, kl_coefficient(step, settings.steps))
        total = (misfit + kl).mean() + settings.spectral * regulariser()
        bound = float((misfit + said.kl.sum(0)).detach().mean())
        recent.append(bound)
        if len(recent) == every:
            curve.append((step + 1, sum(recent) / every))
            recent.clear()
        return total, bound

    return fit(model, loss, images, settings, model.shape.levels == 2, description)


def train_plain(images: Images, options: argparse.Namespace) -> PlainVAE:
    model = PlainVAE(images.channels, images.size)
    settings = Settings(
        steps=options.plain_steps,
        batch_size=PLAIN_BATCH_SIZE,
        learning_rate=1e-3,
        seed=options.seed,
    )

    def loss(x: Tensor, step: int) -> tuple[Tensor, float]:
        said = model.encode(x)
        misfit = -said.likelihood.log_prob(x)
        coefficient = kl_coefficient(step, settings.steps)
        bound = float((misfit + said.kl[0]).detach().mean())
        return (misfit + coefficient * said.kl[0]).mean(), bound

    return fit(model, loss, images, settings, True, "Training plain VAE")


def measure(
    model: NVAE | PlainVAE, images: Images, binary: bool, options: argparse.Namespace
) -> Nats:
    return evaluate(model.encode, images, binary, options.samples)


def report(
    images: Images,
    results: dict[str, tuple[int, Nats]],
    shape: Shape,
    options: argparse.Namespace,
) -> None:
    samples = "importance-weighted"
    table = Table(title=f"Nats per test image of {images.name}")
    for column in ("model", "parameters", "bound", samples, "KL by group, coarsest first"):
        table.add_column(column, justify="left" if column == "model" else "right")
    if shape.levels == 2:
        table.add_row("independent pixels", f"{images.size**2}", f"{factorised_nats(images):.2f}")
    for name, (parameters, nats) in results.items():
        table.add_row(
            name,
            f"{parameters:,}",
            f"{nats.bound:.2f} +- {nats.error:.2f}",
            f"{nats.likelihood:.2f}",
            " ".join(f"{kl:.1f}" for kl in nats.kl),
        )
    console.print(table)
    content = {
        "data": images.name,
        "steps": options.steps,
        "shape": asdict(shape),
        "factorised": factorised_nats(images) if shape.levels == 2 else None,
        "models": {n: {"parameters": p, **asdict(nats)} for n, (p, nats) in results.items()},
    }
    (options.output / "report.json").write_text(json.dumps(content, indent=2) + "\n")


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
