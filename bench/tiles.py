"""``python -m bench.tiles``: on a GPU, times candidates for the Triton kernels' launch table.

For every row of fastattn/backends/triton/table.py that bfloat16 calls with 64 or 128 features take:
short texts, heads enough for the whole GPU, and few heads on long texts, as CUDA graphs. A tile
that computes something else than the table's own is named and not timed. Compiling takes most of
the time, so ``--jobs`` processes do it first, into Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import FORWARD, TRAIN, Case, make_inputs
from bench.gpu import Meter
from bench.peers import runner_of
from fastattn import linear_attention
from fastattn.backends.triton import plan, table
from fastattn.backends.triton.launch import Tile

TIMED_SECONDS = 0.01
TOLERANCE = 0.02  # of the norm: two ways to add up bfloat16 products
CHUNKS = {"forward": (32, 64, 128), "backward": (16, 32, 64)}
STAGES = {"forward": (2, 3, 4), "backward": (1, 2, 3)}


@dataclass(frozen=True)
class Row:
    """A row of the table, and the calls it is timed on."""

    kind: str
    features: int

    @property
    def cases(self) -> list[Case]:
        causal, pass_ = self.kind.startswith("causal"), FORWARD
        if self.kind.endswith("backward"):
            pass_ = TRAIN
        shapes = [(32, 12, 128), (8, 16, 8192), (1, 12, 65536)]
        return [
            Case("tiles", batch, length, pass_, causal, "bfloat16", heads, self.features)
            for batch, heads, length in shapes
        ]

    @property
    def tiles(self) -> list[Tile]:
        """The table's own first. The backward of one launch needs all values in one tile."""
        own = table.TILES[self.kind, 2][self.features]
        pass_ = self.kind.split()[1]
        widths = (64, 128) if pass_ == "forward" and self.features > 64 else (self.features,)
        others = product(CHUNKS[pass_], widths, (4, 8), STAGES[pass_])
        return [own, *(tile for tile in (Tile(*numbers) for numbers in others) if tile != own)]


ROWS = [
    Row(f"{form} {pass_}", features)
    for features in (64, 128)
    for form in ("noncausal", "causal")
    for pass_ in ("forward", "backward")
]


@contextmanager
def using(row: Row, tile: Tile, segment: int | None = None) -> Iterator[None]:
    """Plans made with another tile, or segments of another length."""
    before = table.TILES[row.kind, 2][row.features]
    table.TILES[row.kind, 2][row.features] = tile
    lengths = table.segment_tokens
    if segment is not None:
        table.segment_tokens = lambda features, values: segment
    _forget_plans()
    try:
        yield
    finally:
        table.TILES[row.kind, 2][row.features] = before
        table.segment_tokens = lengths
        _forget_plans()


def _forget_plans() -> None:
    plan.forward.cache_clear()
    plan.backward.cache_clear()


def trials(rows: list[Row]) -> Iterator[tuple[Row, Case, Tile, int | None]]:
    """Everything that is tried, the table's own choice before others of its case."""
    for row in rows:
        for case in row.cases:
            for tile in row.tiles:
                yield row, case, tile, None
            if row.kind.startswith("causal"):
                for segment in (512, 1024, 2048):
                    yield row, case, row.tiles[0], segment


def run_of(case: Case, device: torch.device) -> Any:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return linear_attention(query, key, value, is_causal=case.causal, backend="triton")

    return runner_of(attend, case, make_inputs(case, device))


def compile_share(rows: list[Row], share: int, jobs: int, device: torch.device) -> None:
    """Runs every ``jobs``-th trial once, so that its kernels are in Triton's cache."""
    for index, (row, case, tile, segment) in enumerate(trials(rows)):
        if index % jobs == share:
            with using(row, tile, segment):
                try:
                    run_of(case, device)()
                    torch.cuda.synchronize(device)
                except Exception:  # said when it is timed
                    continue


def measure(rows: list[Row], device: torch.device, console: Console) -> list[dict[str, Any]]:
    meter = Meter(device, TIMED_SECONDS)
    found: list[dict[str, Any]] = []
    before: tuple[Row, Case] | None = None
    for row, case, tile, segment in trials(rows):
        if (row, case) != before:
            if before:
                console.print(table_of(found, *before))
            before, run = (row, case), run_of(case, device)
            wanted = [x.float() for x in run()]
        entry = {"kind": row.kind, "case": case.name, "segment": segment, **asdict(tile)}
        with using(row, tile, segment):
            try:
                error = max(
                    float((x.float() - right).norm() / right.norm())
                    for x, right in zip(run(), wanted, strict=True)
                )
                entry["error"] = error
                if error <= TOLERANCE:
                    entry["seconds"] = meter.graph(run)
            except Exception as problem:  # too much shared memory, say
                entry["failed"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
        found.append(entry)
    if before:
        console.print(table_of(found, *before))
    return found


def table_of(found: list[dict[str, Any]], row: Row, case: Case) -> Table:
    """The table's own tile and the five best."""
    ours = [x for x in found if x["kind"] == row.kind and x["case"] == case.name]
    timed = sorted((x for x in ours if x.get("seconds")), key=lambda x: float(x["seconds"]))
    lines = Table(f"{row.kind}: {case.name}", "us", "share of the table's", title_justify="left")
    own = ours[0]
    for entry in [own, *timed[:5]]:
        if not entry.get("seconds"):
            lines.add_row("the table's", str(entry.get("failed", entry.get("error"))), "")
            continue
        tile = Tile(*(entry[name] for name in ("chunk", "block_v", "num_warps", "num_stages")))
        name = "the table's " if entry is own else ""
        name += f"{tile.chunk} tokens, {tile.block_v} values, {tile.num_warps} warps, "
        name += f"{tile.num_stages} stages"
        if entry["segment"]:
            name += f", segments of {entry['segment']}"
        share = entry["seconds"] / own["seconds"] if own.get("seconds") else float("nan")
        lines.add_row(name, f"{entry['seconds'] * 1e6:.1f}", f"{share:.2f}")
    wrong = [x for x in ours if "seconds" not in x]
    if wrong:
        lines.caption = f"{len(wrong)} of {len(ours)} failed or were wrong"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for tiles.json")
    parser.add_argument("--rows", default="", help='only rows whose name contains this ("causal")')
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile first")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [row for row in ROWS if args.rows in f"{row.kind} {row.features}"]
    if args.share is not None:
        compile_share(rows, args.share, args.jobs, device)
        return
    if args.jobs > 1:
        command = [sys.executable, "-m", "bench.tiles", *sys.argv[1:]]
        shares = [subprocess.Popen([*command, "--share", str(i)]) for i in range(args.jobs)]
        for process in shares:
            process.wait()
    found = measure(rows, device, Console(width=100))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "tiles.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
