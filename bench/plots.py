"""Time against length, ours and the peers', with the limit of the machine under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import peers
from bench.cases import FORWARD, TRAIN
from bench.floors import seconds

_BLUE, _LIGHT_BLUE, _INK = "#0b5fa5", "#62aee6", "#333333"
# name, label, type of the case, style; drawn in this order
_LINES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    (peers.SDPA, "softmax (SDPA)", "float32", {"color": "#9a9a9a", "marker": "s"}),
    (peers.PYTORCH, "linear, PyTorch", "float32", {"color": "#d9730d", "marker": "^"}),
    (peers.COMPILED, "linear, torch.compile", "float32", {"color": "#e8b04a", "marker": "v"}),
    (
        "fast-transformers",
        "linear, fast-transformers",
        "float32",
        {"color": "#5f9e6e", "marker": "D"},
    ),
    (peers.OURS, "fastattn", "float32", {"color": _BLUE, "marker": "o", "linewidth": 2.6}),
    (peers.OURS, "fastattn, bfloat16", "bfloat16", {"color": _LIGHT_BLUE, "marker": "o"}),
)
_ROWS = ((FORWARD, "Forward"), (TRAIN, "Forward and backward"))
_COLUMNS = ((False, "non-causal"), (True, "causal"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the "long" cases: rows are passes, columns non-causal and causal."""
    long = [case for case in result["cases"] if case["group"] == "long"]
    rows = [row for row in _ROWS if any(case["pass"] == row[0] for case in long)]
    if not rows:
        return
    figure = Figure(figsize=(12.5, 0.9 + 4.6 * len(rows)), layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), 2, squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for (pass_, title), line in zip(rows, axes, strict=True):
        for (causal, kind), axis in zip(_COLUMNS, line, strict=True):
            cases = [c for c in long if c["pass"] == pass_ and c["causal"] == causal]
            _panel(axis, cases, f"{title}, {kind}", handles)
        line[0].set_ylabel("time of one call")
    lengths = sorted({case["length"] for case in long})
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
        axis.set_xticks(lengths, [_tokens(n) for n in lengths])
    # The second, empty line keeps room for the machine in smaller type.
    title = f"Time of one call against length: batch 1, {long[0]['heads']} heads of "
    figure.suptitle(
        f"{title}{long[0]['head_dim']}\n",
        x=0.008,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=_INK,
    )
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    machine, height = result["machine"], figure.get_figheight()
    where = (
        f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}, "
        f"torch {machine['versions'].get('torch')}, fastattn {machine['fastattn']}"
    )
    figure.text(0.008, 1 - 0.42 / height, where, va="top", fontsize=9.5, color="#777777")
    figure.savefig(path)


def _panel(axis: Axes, cases: list[dict[str, Any]], title: str, handles: dict[str, Any]) -> None:
    for name, label, dtype, style in _LINES:
        points = _points(cases, name, dtype)
        if points:
            (line,) = axis.plot(*zip(*points, strict=True), **{"markersize": 5, **style})
            handles[label] = line
    limit = sorted((c["length"], c["limit_seconds"]) for c in cases if c["dtype"] == "float32")
    if limit:
        (line,) = axis.plot(
            *zip(*limit, strict=True), color=_INK, linestyle=(0, (2, 2)), linewidth=1.2
        )
        handles["limit of the machine (float32)"] = line
    _say_ratio(axis, cases)
    axis.set_title(title, loc="left", fontsize=11, color=_INK)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: _seconds(value))
    axis.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#bbbbbb")
    axis.tick_params(color="#bbbbbb", labelcolor=_INK)


def _points(cases: list[dict[str, Any]], name: str, dtype: str) -> list[tuple[int, float]]:
    found = ((c["length"], seconds(c, name)) for c in cases if c["dtype"] == dtype)
    return sorted((length, value) for length, value in found if value is not None)


def _say_ratio(axis: Axes, cases: list[dict[str, Any]]) -> None:
    """How far below softmax we are, at the longest input that both were measured on."""
    softmax = dict(_points(cases, peers.SDPA, "float32"))
    ours = dict(_points(cases, peers.OURS, "float32"))
    common = sorted(softmax.keys() & ours.keys())
    if not common:
        return
    length = common[-1]
    low, high = ours[length], softmax[length]
    if high < 2 * low:
        return
    axis.annotate(
        "", (length, low), (length, high),
        arrowprops={"arrowstyle": "<->", "color": "#9a9a9a", "shrinkA": 5, "shrinkB": 5},
    )  # fmt: skip
    axis.annotate(
        f"{high / low:.0f}x", (length, (low * high) ** 0.5), xytext=(6, 0),
        textcoords="offset points", va="center", fontsize=11, fontweight="bold", color=_BLUE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
    )  # fmt: skip


def _tokens(n: int) -> str:
    return str(n) if n < 1024 else f"{n // 1024}k"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size * 0.999:
            return f"{value / size:g} {unit}"
    return f"{value:g} s"
