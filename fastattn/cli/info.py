"""``fastattn info``: what this machine has, and which kernel typical calls take."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

VERSIONS = ("torch", "transformers", "triton", "datasets", "accelerate")
DTYPES = ("float32", "bfloat16")
# Calls in the sizes of BERT-base, and one of a streaming decoder.
TYPICAL_CALLS: dict[str, dict[str, Any]] = {
    "BERT, 32 x 128 tokens": {"batch": 32, "length": 128, "feature_map": "elu"},
    "BERT, learned feature map": {
        "batch": 32, "length": 128, "feature_map": "features", "head_dim": 128,
    },
    "one document of 16384 tokens": {"batch": 1, "length": 16384, "feature_map": "elu"},
    "the same, training": {
        "batch": 1, "length": 16384, "feature_map": "elu", "needs_grad": True,
    },
    "causal, 4096 tokens": {
        "batch": 1, "length": 4096, "feature_map": "elu", "is_causal": True,
    },
    "one decoded token": {
        "batch": 1, "length": 1, "feature_map": "elu", "is_causal": True,
        "has_initial_state": True, "return_state": True,
    },
}  # fmt: skip


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="Compile the Triton kernels for GPUs and show what they cost."
        ),
    ] = False,
) -> None:
    """Show versions, CPU features, backends, and what backend="auto" picks for typical calls."""
    if kernels:
        _print_kernels(as_json)
        return
    _load_cpu()
    report = collect()
    console = Console()
    if as_json:
        console.print_json(data=report)
        return
    console.print(_versions(report))
    console.print(_backends(report))
    console.print(_calls(report))


def _load_cpu() -> None:
    """The environment may name an instruction set that this machine has not: said in one line."""
    from fastattn import backends

    try:
        backends.load("cpu")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def collect() -> dict[str, Any]:
    """Everything that ``info`` shows, as JSON values."""
    import torch

    import fastattn
    from fastattn import backends

    found: dict[str, dict[str, Any]] = {}
    for name in backends.names():
        backend = backends.load(name)
        missing = backend if isinstance(backend, str) else backend.missing()
        found[name] = {"available": missing is None, "reason": missing}
    return {
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in VERSIONS},
        "cpu": {
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            **_instruction_sets(),
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": found,
        "calls": {name: _explain(**call) for name, call in TYPICAL_CALLS.items()},
    }


def _instruction_sets() -> dict[str, Any]:
    try:
        from fastattn.backends.cpu import ISA_VARIABLE, _native
    except ImportError:
        return {"instruction_sets": [], "instruction_set": None}

    return {
        "instruction_sets": list(_native.isas()),
        "instruction_set": _native.active_isa(),
        "forced_by": f"{ISA_VARIABLE}={os.environ[ISA_VARIABLE]}"
        if ISA_VARIABLE in os.environ
        else None,
    }


def _explain(
    *, batch: int, length: int, feature_map: str, head_dim: int = 64, **switches: Any
) -> dict[str, dict[str, str | None]]:
    """Backend and kernel of a call with 12 heads, for each dtype; and why not the others."""
    import torch

    import fastattn
    from fastattn.ops.problem import Problem

    answers: dict[str, dict[str, str | None]] = {}
    fields = {"is_causal": False, **switches}
    for dtype in DTYPES:
        problem = Problem(
            batch=batch, num_heads=12, num_kv_heads=12, query_length=length, key_length=length,
            head_dim=head_dim, value_dim=64, dtype=getattr(torch, dtype),
            device_type="cuda" if torch.cuda.is_available() else "cpu",
            feature_map=feature_map, normalize=True, scale=1.0, eps=1e-6, **fields,
        )  # fmt: skip
        chosen = fastattn.explain(problem)
        answers[dtype] = {"backend": chosen.backend, "kernel": chosen.kernel}
    return answers


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions(report: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=f"fastattn {report['fastattn']}", title_justify="left")
    table.add_row("Python", f"{report['python']}, {report['platform']}")
    for name, version in report["versions"].items():
        table.add_row(name, version or "not installed")
    cpu = report["cpu"]
    sets = ", ".join(
        f"[bold]{isa}[/] (in use)" if isa == cpu["instruction_set"] else isa
        for isa in cpu["instruction_sets"]
    )
    forced = f", forced by {cpu['forced_by']}" if cpu.get("forced_by") else ""
    table.add_row("CPU kernels for", (sets or "none: the native library is not built") + forced)
    table.add_row("threads", str(cpu["threads"]))
    table.add_row("GPU", report["gpu"] or "none that torch can use")
    return table


def _backends(report: dict[str, Any]) -> Table:
    table = Table("backend", "usable", "", title="Backends", title_justify="left")
    for name, backend in report["backends"].items():
        table.add_row(name, "yes" if backend["available"] else "no", backend["reason"] or "")
    return table


def _calls(report: dict[str, Any]) -> Table:
    table = Table("call, 12 heads of 64", title='What backend="auto" takes', title_justify="left")
    for dtype in DTYPES:
        table.add_column(dtype)
    for name, answers in report["calls"].items():
        table.add_row(name, *(f"{a['backend']}: {a['kernel']}" for a in answers.values()))
    return table


def _print_kernels(as_json: bool) -> None:
    """Registers, spills and shared memory of every shipped Triton kernel on every GPU."""
    from dataclasses import asdict

    try:
        from fastattn.backends.triton import aot
    except ImportError as error:
        raise typer.BadParameter(
            f"Triton is not installed: {error}", param_hint="--kernels"
        ) from None
    progress = track(aot.table(), total=None, description="compiling", console=Console(stderr=True))
    rows = [asdict(row) for row in progress]
    console = Console()
    if as_json:
        console.print_json(data=rows)
        return
    table = Table("call", "kernel", "GPU", "warps", "registers", "spilled", "shared")
    for row in rows:
        numbers = (row["num_warps"], row["registers"], row["spilled"], row["shared"])
        table.add_row(row["call"], row["kernel"], row["arch"], *map(str, numbers))
    console.print(table)
