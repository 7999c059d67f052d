"""The result of ``compare`` for people: a table and a plot, from the report alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastattn.recipes.report import Report, length_table, memory, plot_lengths

COLORS = {"A": "#8c8c8c", "B": "#0b6fb8"}


def print_comparison(report: Report, console: Console) -> None:
    console.print(score_table(report))
    if report["measurements"]:
        console.print(length_table(report["measurements"]))


def score_table(report: Report) -> Table:
    """One row a quantity: A, B, and B against A."""
    a, b = report["models"]["A"], report["models"]["B"]
    rows = report["data"]["rows"]
    title = f"{rows} rows; 95 % intervals from a paired bootstrap"
    caption = Text(f"A: {a['path']}\nB: {b['path']}")  # a [word] in a path is no markup
    table = Table("", title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("A", "B", "B against A"):
        table.add_column(column, justify="right")
    table.add_row("layers, attention", *(f"{m['layers']}, {m['attention']}" for m in (a, b)))
    table.add_row("reads tokens", str(a["max_length"]), str(b["max_length"]))
    difference = report["difference"]
    table.add_row(
        "accuracy",
        *(_percent(m["accuracy"], m["intervals"]["accuracy"]) for m in (a, b)),
        _signed(difference["accuracy"], 100, ".1f", " points"),
    )
    table.add_row(
        "Matthews correlation",
        *(_plain(m["matthews"], m["intervals"]["matthews"]) for m in (a, b)),
        _signed(difference["matthews"], 1, ".3f"),
    )
    table.add_row("kept of the accuracy", "", "", _ratio(b["accuracy"], a["accuracy"]))
    table.add_row("loss", f"{a['loss']:.3f}", f"{b['loss']:.3f}")
    table.add_row("same prediction", "", "", f"{100 * report['agreement']:.1f} %")
    for name, show in (("parameters", _millions), ("disk_bytes", memory)):
        label = name.replace("disk_bytes", "on disk")
        table.add_row(label, show(a[name]), show(b[name]), _ratio(b[name], a[name]))
    return table


def plot_comparison(report: Report, path: Path) -> None:
    """Scores with their intervals; time and peak memory against length, if measured."""
    from matplotlib.figure import Figure

    points = report["measurements"]
    figure = Figure(figsize=(15, 4.5) if points else (5, 4.5), layout="constrained")
    axes = figure.subplots(1, 3 if points else 1, squeeze=False)[0]
    models = report["models"]
    names = {n: f"{n}: {m['layers']} layers,\n{m['attention']}" for n, m in models.items()}
    values = [100 * m["accuracy"] for m in models.values()]
    ends = [[100 * end for end in m["intervals"]["accuracy"]] for m in models.values()]
    spread = [
        [v - low for v, (low, _) in zip(values, ends)],
        [high - v for v, (_, high) in zip(values, ends)],
    ]
    axes[0].bar(
        list(names.values()), values, color=[COLORS[n] for n in names], yerr=spread, capsize=6
    )
    for position, value in enumerate(values):
        axes[0].annotate(f"{value:.1f}", (position, value / 2), ha="center", color="white")
    title = f"Accuracy on {report['data']['rows']} rows, 95 % interval"
    axes[0].set(title=title, ylabel="per cent", ylim=(0, 108))
    axes[0].spines[["top", "right"]].set_visible(False)
    if points:
        labels = {name: text.replace("\n", " ") for name, text in names.items()}
        plot_lengths(axes[1:], points, COLORS, labels)
    figure.savefig(path, dpi=130)


def _percent(value: float, interval: list[float]) -> str:
    low, high = interval
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _plain(value: float, interval: list[float]) -> str:
    low, high = interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _signed(difference: dict[str, Any], factor: float, form: str, unit: str = "") -> str:
    low, high = (factor * end for end in difference["interval"])
    return f"{factor * difference['value']:+{form}}{unit} ({low:+{form}} to {high:+{form}})"


def _ratio(new: float, old: float) -> str:
    return f"{100 * new / old:.1f} %" if old else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e6 else str(count)
