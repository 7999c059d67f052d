"""The page: a report as one HTML file that needs no network, no server and no script to be read."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

from fastattn.recipes.report import by_length, duration, memory

NAMES = {"original": "original", "patched": "patched"}
COLORS = {"original": "#6b6b6b", "patched": "#0b6fb8"}
RAISES, LOWERS, IMPACT = "11, 111, 184", "201, 79, 31", "87, 46, 140"  # red, green, blue
CHART = {"width": 420, "height": 230, "left": 52, "right": 12, "top": 12, "bottom": 34}


def render(report: dict[str, Any]) -> str:
    """The HTML of a report made by ``diagnose``.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; names the extra that brings it.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the page needs jinja2: pip install 'fastattn[diagnose]'", name="jinja2"
        ) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number, "percent": percent, "scientific": scientific,
        "duration": duration, "memory": memory,
    }  # fmt: skip
    template = environment.from_string(
        (files("fastattn.diagnose") / "page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        report=report,
        names=NAMES,
        colors=COLORS,
        signed=signed_color,
        impact=impact_color,
        largest=lambda scores: max((abs(score) for score in scores), default=0.0),
        lengths=by_length(report["measurements"]),
        charts=charts(report["measurements"]),
    )


def signed_color(score: float, largest: float) -> str:
    """Blue where a token raises the output, orange where it lowers it."""
    strength = abs(score) / largest if largest else 0.0
    return f"rgba({RAISES if score >= 0 else LOWERS}, {0.75 * strength:.3f})"


def impact_color(value: float, largest: float) -> str:
    return f"rgba({IMPACT}, {min(1.0, max(0.0, value / largest)) if largest else 0.0:.3f})"


def number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f} %"


def scientific(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def charts(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time and memory against length, both axes logarithmic, as plain coordinates."""
    if len({point["length"] for point in points}) < 2:
        return []
    drawn = []
    for title, field, scale, unit in (
        ("Time of one forward pass", "seconds", 1e3, "ms"),
        ("Peak memory beyond the weights", "peak_bytes", 2.0**-20, "MiB"),
    ):
        if any(point[field] is None for point in points):
            continue
        values = {
            name: [(n, max(point[field] * scale, 1e-3)) for n, point in series.items()]
            for name, series in by_length(points).items()
        }
        drawn.append({"title": f"{title} ({unit})", **_chart(values)})
    return drawn


def _chart(values: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    xs = sorted({x for series in values.values() for x, _ in series})
    ys = [y for series in values.values() for _, y in series]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    high = max(high, low + 1)
    width = CHART["width"] - CHART["left"] - CHART["right"]
    height = CHART["height"] - CHART["top"] - CHART["bottom"]

    def x_at(x: float) -> float:
        return CHART["left"] + width * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def y_at(y: float) -> float:
        return CHART["top"] + height * (1 - (math.log10(y) - low) / (high - low))

    return {
        **CHART,
        "x_ticks": [(x_at(x), str(x)) for x in xs],
        "y_ticks": [(y_at(10.0**e), f"{10.0**e:g}") for e in range(low, high + 1)],
        "series": {
            name: [(round(x_at(x), 1), round(y_at(y), 1)) for x, y in series]
            for name, series in values.items()
        },
    }
