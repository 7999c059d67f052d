"""``python -m bench.gpu``: the CUDA and Triton kernels beside PyTorch, on a GPU.

Eager times include what Python and the launches cost; graph times are the kernels alone, and the
share of the copy bandwidth is theirs. Every contestant's output is compared with float64 first. On
a machine without a GPU ``--device cpu`` runs the same code on the CPU kernels, as a test of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import plain
from bench.cases import FORWARD, STEP, TRAIN, Case, Inputs, make_inputs

ROOT = Path(__file__).resolve().parent.parent
CHECKED_TOKENS = 4096  # float64 on longer inputs would not fit
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
Run = Callable[[], Tensor]


def cases(quick: bool) -> Iterator[Case]:
    """Where CUDA should win (launch-bound), and where bandwidth decides."""
    for batch in (1, 32) if quick else (1, 8, 32, 64, 256):
        yield Case("decode", batch, 1, STEP, True, "bfloat16")
    for length in (128,) if quick else (64, 128, 256, 512):
        for pass_ in (FORWARD, TRAIN):
            yield Case("bert", 4 if quick else 32, length, pass_, dtype="bfloat16")
    for length in (1024,) if quick else (4096, 16384, 65536, 131072):
        for head_dim in (64,) if quick else (64, 128):
            for pass_ in (FORWARD, TRAIN):
                yield Case("long", 1, length, pass_, True, "bfloat16", 12, head_dim)


def contestants(case: Case, inputs: Inputs, device: torch.device) -> Iterator[tuple[str, Run]]:
    query, key, value = inputs.query, inputs.key, inputs.value
    for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        if case.pass_ == STEP:
            assert inputs.S is not None
            assert inputs.z is not None
            state = fastattn.LinearAttentionState(inputs.S.clone(), inputs.z.clone())
            yield backend, _step(backend, inputs, state)
        else:
            yield backend, _attend(case, inputs, _linear(backend, case.causal))
    if case.pass_ == STEP:
        assert inputs.S is not None
        assert inputs.z is not None
        S, z = inputs.S.clone(), inputs.z.clone()
        yield "plain", lambda: plain.step(query, key, value, S, z)
        return
    yield "plain", _attend(case, inputs, _plain(case.causal))
    if case.length <= 32768:

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        yield "sdpa", _attend(case, inputs, sdpa)


def _step(backend: str, inputs: Inputs, state: fastattn.LinearAttentionState) -> Run:
    def run() -> Tensor:
        return fastattn.linear_attention_step(
            inputs.query, inputs.key, inputs.value, state, backend=backend
        )

    return run


def _linear(backend: str, causal: bool) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = fastattn.linear_attention(q, k, v, is_causal=causal, backend=backend)
        return out

    return attend


def _plain(causal: bool) -> Callable[..., Tensor]:
    return (lambda q, k, v: plain.causal(q, k, v, 64)) if causal else plain.noncausal


def _attend(case: Case, inputs: Inputs, attend: Callable[..., Tensor]) -> Run:
    if case.pass_ != TRAIN:
        return lambda: attend(inputs.query, inputs.key, inputs.value)
    leaves = inputs.leaves()

    def run() -> Tensor:
        out = attend(*leaves)
        torch.autograd.grad(out, leaves, inputs.grad_out)
        return out.detach()

    return run


def error_of(case: Case, inputs: Inputs, out: Tensor) -> float | None:
    """Relative to float64; None where that does not fit. Steps start from a state of the case."""
    if case.length > CHECKED_TOKENS:
        return None
    q, k, v = (x[:1].double() for x in (inputs.query, inputs.key, inputs.value))
    if case.pass_ == STEP:  # which plain.step computes in float32
        assert inputs.S is not None
        assert inputs.z is not None
        right = plain.step(q, k, v, inputs.S[:1].clone(), inputs.z[:1].clone())
    else:
        right = _plain(case.causal)(q, k, v)
    return float((out[:1].double() - right).norm() / right.norm())


def seconds(run: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """Median of several batches of calls, back to back as in a model."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    calls = max(1, min(200, int(budget / 10 / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[len(times) // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graph_seconds(run: Run, device: torch.device) -> float | None:
    """The same calls replayed as one CUDA graph: no host time."""
    if device.type != "cuda":
        return None
    calls = 10
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return seconds(graph.replay, device) / calls


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a large copy."""
    source = torch.empty(
        2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def measure(case: Case, device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    inputs = make_inputs(case, device)
    rows = []
    for name, run in contestants(case, inputs, device):
        row: dict[str, Any] = {"case": case.name, "contestant": name}
        try:
            error = error_of(case, inputs, run()) if name != "sdpa" else None
            row["error"] = error
            if error is not None and error > TOLERANCE[case.dtype]:
                row["failed"] = f"error {error:.1e}"
            else:
                row["eager_us"] = seconds(run, device) * 1e6
                graph = graph_seconds(run, device)
                row["graph_us"] = None if graph is None else graph * 1e6
                share = case.bytes / (graph or row["eager_us"] * 1e-6) / bandwidth
                row["share_of_copy_bandwidth"] = share
        except (RuntimeError, ValueError) as problem:
            row["failed"] = str(problem).splitlines()[0]
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    head = f"{row['case']:<52} {row['contestant']:<8}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    graph = "" if row["graph_us"] is None else f"{row['graph_us']:10.1f} us in a graph"
    return f"{head} {row['eager_us']:10.1f} us eager {graph} {row['share_of_copy_bandwidth']:6.1%}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="a handful of small cases")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "cuda.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; --device cpu only tests this script")
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, copies {bandwidth * 1e-9:.0f} GB/s, torch {torch.__version__}")
    rows = [row for case in cases(args.quick) for row in measure(case, device, bandwidth)]
    result = {"device": name, "copy_bytes_per_second": bandwidth, "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
