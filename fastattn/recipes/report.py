"""The result of a run for people and programs: tables, ``report.json`` and ``report.png``.

A report is a plain dict (what ``report.json`` holds); everything shown
is computed from it, so a table can be printed again from the file alone.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Report = dict[str, Any]
MODEL_NAMES = {
    "softmax": "softmax, fine-tuned",
    "windows": "the same, mean over windows",
    "swapped": "linear, swapped, untrained",
    "transferred": "linear, attention matched",
    "linear": "linear, distilled",
    "replaced": "successor, after replacing",
    "compressed": "successor, after distillation",
    "tuned": "successor, tuned on the metric",
}
SHORT_NAMES = {
    "softmax": "softmax",
    "windows": "in windows",
    "swapped": "swapped,\nuntrained",
    "transferred": "attention\ntransfer",
    "linear": "linearised",
    "replaced": "replaced",
    "compressed": "compressed",
    "tuned": "tuned on\nthe metric",
}
COLORS = {
    "softmax": "#8c8c8c",
    "windows": "#b5b5b5",
    "swapped": "#cfe3f3",
    "transferred": "#7fb5dc",
    "replaced": "#3d8fc9",
    "linear": "#0b6fb8",
    "compressed": "#0b6fb8",
    "tuned": "#084b7d",
}


def machine() -> dict[str, Any]:
    """Where the numbers come from: processor, threads, versions."""
    import torch
    import transformers

    import fastattn

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastattn": fastattn.__version__,
    }


def write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")


def print_report(report: Report, console: Console) -> None:
    """Accuracy of each model, then time and memory against input length."""
    console.print(accuracy_table(report))
    if "search" in report:
        console.print(search_line(report["search"]), highlight=False)
    if report["measurements"]:
        console.print(length_table(report["measurements"]))


def accuracy_table(report: Report) -> Table:
    rows = next(iter(report["models"].values()))["rows"]
    caption = "tokens: read of a text; MCC: Matthews correlation"
    table = Table(title=f"Accuracy on {rows} dev rows", title_justify="left", caption=caption)
    table.add_column("model")
    with_f1 = "search" in report and report["search"]["metric"] == "f1"
    scores_shown = ("MCC", "F1") if with_f1 else ("MCC",)
    for column in ("tokens", "accuracy", "of softmax", *scores_shown, "loss"):
        table.add_column(column, justify="right")
    softmax = report["models"]["softmax"]["accuracy"]
    for name, scores in report["models"].items():
        table.add_row(
            MODEL_NAMES[name],
            str(scores["max_length"]),
            f"{100 * scores['accuracy']:.1f} %",
            f"{100 * scores['accuracy'] / softmax:.1f} %" if softmax else "",
            f"{scores['matthews']:.3f}",
            *([f"{scores['f1']:.3f}"] if with_f1 else []),
            f"{scores['loss']:.3f}",
        )
    return table


def search_line(search: dict[str, Any]) -> str:
    """What tuning on the metric did on the training rows, and how far it can be believed."""
    line = (
        f"{search['metric']} on training rows: {search['first']:.3f} at the first tenth of "
        f"{search['steps']} steps, {search['last']:.3f} at the last; "
        f"{search['effective_samples']:.1f} of {search['candidates']} candidates counted"
    )
    if few := search["steps_with_too_few"]:
        line += f" (fewer than 1.5 at {few} steps, which were hardly more than random)"
    return line


def length_table(points: list[dict[str, Any]]) -> Table:
    batch = points[0]["batch"]
    table = Table(
        title=f"One forward pass, batch {batch}",
        title_justify="left",
        caption="time, then peak memory beyond the weights",
    )
    table.add_column("tokens", justify="right")
    old, new = by_name = by_length(points)
    for column in (old, new, "faster", old, new):
        table.add_column(column, justify="right")
    for length, before in by_name[old].items():
        after = by_name[new][length]
        table.add_row(
            str(length),
            duration(before["seconds"]),
            duration(after["seconds"]),
            f"{before['seconds'] / after['seconds']:.2f}x",
            memory(before["peak_bytes"]),
            memory(after["peak_bytes"]),
        )
    return table


def plot(report: Report, path: Path) -> None:
    """Accuracies as bars; time and peak memory against length, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    points = report["measurements"]
    figure = Figure(
        figsize=(15, 4.5) if points else (6, 4.5),
        layout=ConstrainedLayoutEngine(rect=(0, 0.03, 1, 0.97)),
    )
    axes = figure.subplots(1, 3 if points else 1, squeeze=False)[0]
    _plot_accuracy(axes[0], report["models"])
    if points:
        plot_lengths(axes[1:], points, COLORS)
    machine = report["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    figure.text(0.995, 0.005, where, ha="right", va="bottom", fontsize=8, color="#8c8c8c")
    figure.savefig(path, dpi=130)


def plot_lengths(
    axes: Any,
    points: list[dict[str, Any]],
    colors: dict[str, str],
    labels: dict[str, str] | None = None,
) -> None:
    """Time on the first of the axes, peak memory on the second, both against length."""
    from matplotlib.ticker import LogLocator

    by_name = by_length(points)
    for name, series in by_name.items():
        lengths = list(series)
        style = {"color": colors[name], "marker": "o", "label": (labels or {}).get(name, name)}
        axes[0].plot(lengths, [1e3 * p["seconds"] for p in series.values()], **style)
        if all(p["peak_bytes"] is not None for p in series.values()):
            megabytes = [max(p["peak_bytes"], 1) / 2**20 for p in series.values()]
            axes[1].plot(lengths, megabytes, **style)
    titles = ("Time of one forward pass", "Peak memory beyond the weights")
    for axis, title, unit in zip(axes, titles, ("milliseconds", "MiB"), strict=True):
        axis.set(title=title, xlabel="input length (tokens)", ylabel=unit)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(frameon=False)


def by_length(points: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Points as ``[name][length]``."""
    series: dict[str, dict[int, dict[str, Any]]] = {}
    for point in points:
        series.setdefault(point["name"], {})[point["length"]] = point
    return series


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def memory(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _plot_accuracy(axis: Any, models: dict[str, dict[str, Any]]) -> None:
    accuracies = [100 * scores["accuracy"] for scores in models.values()]
    colors = [COLORS[name] for name in models]
    bars = axis.bar([SHORT_NAMES[name] for name in models], accuracies, color=colors)
    axis.bar_label(bars, fmt="%.1f")
    axis.axhline(accuracies[0], color="#8c8c8c", linewidth=1, linestyle=":")
    axis.set(title="Accuracy on the dev set", ylabel="per cent", ylim=(0, 108))
    axis.spines[["top", "right"]].set_visible(False)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} x {os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"
