"""One picture that shows what numbers do not: reconstructions, samples, the course of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.nvae.data import Images
from examples.nvae.model import NVAE
from examples.nvae.training import pixels

COLUMNS = 12


@torch.no_grad()
def draw(
    model: NVAE,
    images: Images,
    binary: bool,
    temperature: float,
    curve: list[tuple[int, float]],
    title: str,
    path: Path,
) -> None:
    """Test images over what the model makes of them, samples at ``temperature``, and the bound on
    training batches by step (``curve``)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.manual_seed(0)
    columns = min(COLUMNS, len(images.test))
    shown = images.test[:columns]
    seen = pixels(shown, images, binary)
    pairs = [shown / (images.levels - 1)]
    if binary:
        pairs.append(seen)
    pairs.append(model.encode(seen).likelihood.mean())
    samples = model.decode(6 * columns, temperature).mean()

    figure, axes = pyplot.subplots(
        3, 1, figsize=(8, 9.2), height_ratios=[len(pairs), 6, 3.2], layout="constrained"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    rows = "image, binary draw, reconstruction" if binary else "image, reconstruction"
    panels = (
        (torch.cat(pairs), f"Test images: {rows}"),
        (samples, f"Samples at temperature {temperature:g} (mean of each pixel)"),
    )
    for axis, (tiles, label) in zip(axes, panels):
        grid = _grid(tiles, columns)
        axis.imshow(grid, cmap="gray" if grid.ndim == 2 else None, vmin=0, vmax=1)
        axis.set_title(label, loc="left", fontsize=10)
        axis.axis("off")
    steps, nats = zip(*curve)
    axes[2].plot(steps, nats, color="#1f5fa8", linewidth=1.5)
    low, high = min(nats), sorted(nats)[int(0.9 * (len(nats) - 1))]
    axes[2].set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
    axes[2].set_title("Bound on training batches, nats, by step", loc="left", fontsize=10)
    axes[2].spines[["top", "right"]].set_visible(False)
    axes[2].grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _grid(tiles: Tensor, columns: int) -> np.ndarray:
    """(N, C, S, S) in [0, 1] as one image, ``columns`` tiles a row, with a border of a pixel."""
    padded = torch.nn.functional.pad(tiles.float(), (1, 1, 1, 1), value=0.5)
    count, channels, side, _ = padded.shape
    grid = padded.reshape(count // columns, columns, channels, side, side)
    image = grid.permute(0, 3, 1, 4, 2).reshape(count // columns * side, columns * side, channels)
    return image.squeeze(-1).numpy() if channels == 1 else image.numpy()
