"""The run as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench import peers
from bench.floors import ratio, seconds

GROUPS = {
    "bert": "BERT shapes, non-causal",
    "long": "Long documents, B=1",
    "decode": "Decoding: one token onto a state",
}
_RATIOS = (peers.PYTORCH, peers.COMPILED, "fast-transformers", peers.SDPA, peers.EMPTY)
_TITLES = {peer.name: peer.title for peer in peers.PEERS}


def duration(value: float | None) -> str:
    """Three digits and a unit."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def times(value: float | None) -> str:
    """A ratio: 12.3x."""
    return "-" if value is None else f"{value:.3g}x"


def print_case(case: dict[str, Any], console: Console) -> None:
    """One line as soon as a case is measured."""
    parts = []
    for name, contestant in case["contestants"].items():
        if contestant["status"] == "timed":
            parts.append(f"{name} {duration(contestant['seconds'])}")
        elif contestant["status"] != "left out":
            parts.append(f"[red]{name} {contestant['status'].upper()}: {contestant['reason']}[/]")
    console.print(f"{case['name']:<48} " + "  ".join(parts), highlight=False, soft_wrap=True)


def case_rows(
    cases: list[dict[str, Any]], limits: dict[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one group: time, ratio to each peer that was timed, share of the limit."""
    others = [name for name in _RATIOS if any(seconds(case, name) for case in cases)]
    header = ["pass", "type", "B", "N", "D", "fastattn", "of FMA peak", "of limit"]
    header += [f"vs {_TITLES[name]}" for name in others]
    rows = []
    for case in cases:
        own = seconds(case)
        share = limit = "-"
        if own is not None and case["group"] != "decode":
            peak = limits["gflops"]
            if case["dtype"] == "bfloat16":
                peak = limits.get("bf16_gflops", peak)  # older results know the one
            share = f"{100 * case['flops'] / own / (peak * 1e9):.0f} %"
            limit = f"{100 * case['limit_seconds'] / own:.0f} %"
        kind = case["pass"]
        if case["group"] == "long":
            kind += ", causal" if case["causal"] else ", non-causal"
        sizes = [str(case[key]) for key in ("batch", "length", "head_dim")]
        row = [kind, case["dtype"], *sizes, duration(own), share, limit]
        rows.append(row + [times(ratio(case, name)) for name in others])
    if all(row[6] == "-" for row in rows):  # a step is bound by neither limit
        header, rows = header[:6] + header[8:], [row[:6] + row[8:] for row in rows]
    return header, rows


def floor_rows(floors: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the checklist."""
    rows = []
    for floor in floors:
        percent = floor["unit"] == "%"

        def show(value: float | None, percent: bool = percent) -> str:
            if value is None:
                return "-"
            return f"{100 * value:.0f} %" if percent else f"{value:.3g}x"

        sign = "≥" if floor["at_least"] else "≤"
        verdict = {True: "pass", False: "MISS", None: "not measured"}[floor["passed"]]
        wanted = f"{sign} {show(floor['wanted'])}"
        rows.append([floor["text"], wanted, show(floor["value"]), show(floor["at_limit"]), verdict])
    return ["floor", "wanted", "measured", "at this machine's limit", ""], rows


def memory_rows(figures: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the peak memory."""
    rows = []
    for figure in figures:
        kind = "non-causal" if "non-causal" in figure["name"] else "causal"
        row = [kind, _TITLES[figure["peer"]]]
        if figure["status"] == "measured":
            needed, used = figure["needed_bytes"], figure["peak_bytes"]
            row += [f"{used / 2**30:.2f} GiB", f"{needed / 2**30:.2f} GiB", times(used / needed)]
        else:
            row += ["-", "-", figure["reason"]]
        rows.append(row)
    return ["forward and backward, N=65536", "", "peak", "inputs, output, gradients", ""], rows


def peaks(limits: dict[str, Any]) -> str:
    """The measured rates of multiply-adds, in words."""
    said = f"{limits['gflops']:.0f} GFLOP/s multiply-add"
    of_bf16 = limits.get("bf16_gflops", 0)
    return said + (f" ({of_bf16:.0f} in bfloat16)" if of_bf16 > 1.2 * limits["gflops"] else "")


def print_report(result: dict[str, Any], console: Console) -> None:
    """All tables of a run."""
    machine, limits = result["machine"], result["limits"]
    console.print(
        f"\n{machine['processor']}, {machine['threads']} threads, {machine['isa']}, "
        f"torch {machine['versions'].get('torch')}: {peaks(limits)}, "
        f"{limits['gbs']:.1f} GB/s copy ({limits['source']})\n",
        highlight=False,
    )
    for group, title in GROUPS.items():
        cases = [case for case in result["cases"] if case["group"] == group]
        if cases:
            _print_table(title, case_rows(cases, limits), console)
    if result["memory"]:
        _print_table("Peak memory", memory_rows(result["memory"]), console)
    _print_table("Floors", floor_rows(result["floors"]), console)


def _print_table(title: str, content: tuple[list[str], list[list[str]]], console: Console) -> None:
    header, rows = content
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        style = "red" if row[-1] == "MISS" else ""
        table.add_row(*row, style=style)
    console.print(table)
