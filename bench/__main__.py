"""``python -m bench``: measures, prints tables, writes JSON and a plot."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import cases, floors, gpu, limits, machine, memory, peers, plots, report, runner
from fastattn.recipes.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a first look in about two minutes")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--backend", default="auto", help="fastattn's backend [default: auto]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cuda: any GPU that torch calls so"
    )
    parser.add_argument(
        "--budget", type=float, default=300, metavar="SECONDS",
        help="of the grid on a GPU; what does not fit is left out [default: 300]",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for DEVICE.json and DEVICE.png [default: bench/results, which README and docs "
        "are written from; with --quick or --only out/bench]",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not args.list and not torch.cuda.is_available():
        parser.error(
            "--device cuda needs a GPU that PyTorch can use: torch.cuda.is_available() is False "
            f"(torch {torch.__version__})"
        )
    return args


def main() -> int:
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    grid: Any = gpu if args.device == "cuda" else cases
    selected = [c for c in (grid.quick if args.quick else grid.full)() if args.only in c.name]
    if not selected:
        sys.exit(f"no case has {args.only!r} in its name; see --list")
    if args.list:
        for case in selected:
            console.print(case.name, highlight=False)
        return 0
    if args.device == "cuda":
        return on_gpu(args, selected, console)
    torch.set_num_threads(args.threads)
    kept = keep_freed_memory()
    settings = peers.Settings(torch.device(args.device), args.backend, not args.no_compile)
    effort = runner.QUICK if args.quick else runner.Effort()
    bounds = limits.measure(args.threads)
    measured = []
    for case in selected:
        measured.append(runner.measure(case, settings, effort, bounds))
        report.print_case(measured[-1], console)
    figures = []
    if not args.no_memory and not args.only:
        for case in memory.CASES:
            for name in memory.CONTESTANTS:
                figures.append(memory.measure(case, name, args.backend, args.threads))
    result = {
        "machine": machine.describe(args.threads),
        "limits": asdict(bounds),
        "settings": {
            "quick": args.quick,
            "backend": args.backend,
            "freed_memory_kept": kept,
            **asdict(effort),
        },
        "cases": measured,
        "memory": figures,
    }
    result["floors"] = floors.check(result)
    report.print_report(result, console)
    path = write(args, result)
    plots.draw(result, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}", highlight=False, soft_wrap=True)
    ours = [case["contestants"][peers.OURS]["status"] for case in measured]
    return 0 if all(status == "timed" for status in ours) else 1


def on_gpu(args: argparse.Namespace, selected: list[cases.Case], console: Console) -> int:
    """The grid of bench.gpu; the short table comes last."""
    meter = gpu.Meter(torch.device(args.device))
    settings = peers.Settings(meter.device, compile=not args.no_compile)
    contest = gpu.Contest(meter, settings, meter.copy_bandwidth())
    copy = contest.bandwidth * 1e-9
    console.print(f"{meter.name}, copies {copy:.0f} GB/s, torch {torch.__version__}")
    measured: list[dict[str, Any]] = []
    result = {
        "machine": {**machine.describe(args.threads), "gpu": meter.name},
        "copy_gbs": copy,
        "settings": {"quick": args.quick, "budget": args.budget},
        "cases": measured,
    }
    for case in gpu.run_grid(selected, contest, args.budget, console):
        measured.append(case)
        path = write(args, result)  # at once: a lent GPU may be gone with the next case
    console.print(gpu.summary(measured))
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0 if gpu.is_sound(measured) else 1


def write(args: argparse.Namespace, result: dict[str, Any]) -> Path:
    """The JSON of a run."""
    partial = args.quick or args.only
    folder = args.output or (ROOT / "out" / "bench" if partial else ROOT / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / f"{args.device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
