"""``python -m bench.publish``: writes the tables of README and docs from the JSON of a run.

A page marks the places: what stands between ``<!-- bench NAME RESULT -->`` and
``<!-- bench end -->`` is replaced by the block of that name, made from
``bench/results/RESULT.json``, so no figure is ever typed in by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import peers
from bench.cases import FORWARD, STEP, TRAIN, Case
from bench.floors import ratio, seconds
from bench.report import GROUPS, case_rows, duration, floor_rows, memory_rows, peaks, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_MARK = re.compile(r"(<!-- bench (\w+) ([\w-]+) -->\n).*?(<!-- bench end -->)", re.DOTALL)

# The rows of README: one line for each thing that people ask first.
_SUMMARY = (
    ("a sentence batch: 32 x 128 tokens", Case("bert", 32, 128)),
    ("a document of 4,096 tokens", Case("long", 1, 4096)),
    ("the same, causal", Case("long", 1, 4096, FORWARD, True)),
    ("the same, training", Case("long", 1, 4096, TRAIN)),
    ("the same, causal, training", Case("long", 1, 4096, TRAIN, True)),
    ("4,096 tokens in bfloat16", Case("long", 1, 4096, FORWARD, False, "bfloat16")),
    ("a document of 16,384 tokens", Case("long", 1, 16384)),
    ("one decoded token", Case("decode", 1, 1, STEP, True)),
)
_PEERS = (peers.PYTORCH, peers.COMPILED, peers.SDPA)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, its first column to the left."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def summary(result: dict[str, Any]) -> str:
    """Our time and how many times as long each peer takes."""
    cases = {case["name"]: case for case in result["cases"]}
    titles = {peer.name: peer.title for peer in peers.PEERS}
    rows = []
    for text, case in _SUMMARY:
        found = cases.get(case.name)
        ratios = [times(ratio(found, name)) for name in _PEERS]
        rows.append([text, duration(seconds(found)), *ratios])
    return markdown(["12 heads of 64, CPU", "fastattn", *(titles[n] for n in _PEERS)], rows)


def where(result: dict[str, Any]) -> str:
    """Machine, limits, versions and date in a sentence."""
    machine, limits = result["machine"], result["limits"]
    run = "Measured in a quick run" if result["settings"]["quick"] else "Measured"
    return (
        f"{run} on {machine['when'][:10]}, {machine['cores']} cores of an {machine['processor']} "
        f"({machine['isa']}; {peaks(limits)} and "
        f"{limits['gbs']:.0f} GB/s copy, measured in the same run), "
        f"torch {machine['versions'].get('torch')}, fastattn at {machine['commit']}."
    )


def tables(result: dict[str, Any]) -> str:
    """Every case of the run, a table for each group."""
    parts = []
    for group, title in GROUPS.items():
        cases = [case for case in result["cases"] if case["group"] == group]
        if cases:
            parts += [f"### {title}", markdown(*case_rows(cases, result["limits"]))]
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "summary": summary,
    "where": where,
    "tables": tables,
    "floors": lambda result: markdown(*floor_rows(result["floors"])),
    "memory": lambda result: markdown(*memory_rows(result["memory"])),
}


def fill(text: str, results: Path = RESULTS) -> str:
    """The page with its marked places written anew.

    Raises:
        KeyError: a mark names no block.
        FileNotFoundError: a mark names no result.
    """

    def block(mark: re.Match[str]) -> str:
        make = BLOCKS[mark[2]]
        result = json.loads((results / f"{mark[3]}.json").read_text())
        return f"{mark[1]}{make(result)}\n{mark[4]}"

    return _MARK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text()
        filled = fill(text)
        if filled != text:
            stale.append(page.name)
            if not args.check:
                page.write_text(filled)
    if args.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python -m bench.publish")
    print(f"written: {', '.join(stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
