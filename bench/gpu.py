"""``python -m bench --device cuda``: the grid on a GPU, timed eagerly and as a CUDA graph.

Eager times include what Python and the launches cost; graph times are the kernels alone, and
achieved GB/s are theirs: the bytes that the case can't avoid over the time, also as a share of what
a copy reaches. First the whole result of the first batch element is compared with float64 (softmax:
of its first tokens); what is wrong is not timed. A grid ends on time: cases that ``budget`` seconds
leave no room for are named, and left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu_peers, truth
from bench.cases import FORWARD, STEP, TRAIN, Case, Inputs, make_inputs
from bench.peers import Peer, Settings, runner_of, step_runner_of
from bench.report import duration, times

Run = Callable[[], tuple[torch.Tensor, ...]]
SOFTMAX_FLOPS = 300e12  # no softmax kernel is tried that would take longer than this at that rate:
SOFTMAX_SECONDS = 0.2
TIMED_SECONDS = 0.1
SAMPLES, SAMPLES_OF_LONG_CALLS = 7, 3
GRAPH_CALLS = 10


def full() -> Iterator[Case]:
    """Where launches decide, where bandwidth does, and where softmax is overtaken."""
    for batch in (1, 8, 32, 64, 128, 256):
        yield Case("decode", batch, 1, STEP, True, "bfloat16")
    for length in (64, 128, 256, 512):
        for pass_ in (FORWARD, TRAIN):
            yield Case("bert", 32, length, pass_, False, "bfloat16")
    for length in (1024, 2048, 4096):
        yield Case("crossover", 8, length, FORWARD, False, "bfloat16")
        yield Case("crossover", 8, length, FORWARD, True, "bfloat16")
    for causal in (False, True):
        for head_dim in (64, 128):
            for pass_ in (FORWARD, TRAIN):
                yield Case("full", 8, 8192, pass_, causal, "bfloat16", 16, head_dim)
                for length in (4096, 16384, 65536):
                    yield Case("long", 1, length, pass_, causal, "bfloat16", 12, head_dim)
    for pass_ in (FORWARD, TRAIN):
        yield Case("long", 1, 131072, pass_, True, "bfloat16")
        yield Case("long", 1, 16384, pass_, True, "float32")


def quick() -> Iterator[Case]:
    """One case of every kind, small."""
    yield Case("decode", 1, 1, STEP, True, "bfloat16")
    for pass_ in (FORWARD, TRAIN):
        yield Case("bert", 4, 128, pass_, False, "bfloat16")
        yield Case("long", 1, 1024, pass_, True, "bfloat16")


class Meter:
    """Takes the times of one device. On the CPU, which only tests of this module use, there are no
    graphs and no peaks."""

    def __init__(self, device: torch.device, timed_seconds: float = TIMED_SECONDS) -> None:
        self.device = device
        self.timed_seconds = timed_seconds
        self.is_gpu = device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_gpu else "CPU"

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one call from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return max(time.perf_counter() - start, 1e-6)

    def eager(self, run: Callable[[], object]) -> float:
        """Seconds a call, median of several batches of calls back to back, as in a model."""
        run()
        once = self.once(run)
        count = SAMPLES if SAMPLES * once < self.timed_seconds else SAMPLES_OF_LONG_CALLS
        calls = max(1, min(200, int(self.timed_seconds / count / once)))
        samples = []
        for _ in range(count):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            self.synchronize()
            samples.append((time.perf_counter() - start) / calls)
        return sorted(samples)[len(samples) // 2]

    def graph(self, run: Callable[[], object]) -> float | None:
        """The same, replayed as one CUDA graph, of several calls if short: no host time."""
        if not self.is_gpu:
            return None
        graph = torch.cuda.CUDAGraph()
        before, stream = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
            once = self.once(run)
        before.wait_stream(stream)
        calls = max(1, min(GRAPH_CALLS, int(self.timed_seconds / SAMPLES / once)))
        try:
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    run()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        return self.eager(graph.replay) / calls

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes that a call allocates at most, beyond what is there before."""
        if not self.is_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy_bandwidth(self) -> float:
        """Bytes read plus bytes written per second by a large copy."""
        source = torch.empty(2**30 if self.is_gpu else 2**25, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.eager(lambda: target.copy_(source))


@dataclass(frozen=True)
class Contest:
    """What all cases of a run share."""

    meter: Meter
    settings: Settings
    bandwidth: float
    peers: tuple[Peer, ...] = gpu_peers.PEERS


def measure(case: Case, contest: Contest) -> dict[str, Any]:
    """One case with all its contestants, as plain data for the JSON."""
    try:
        found = _contestants(case, make_inputs(case, contest.settings.device), contest)
    except Exception as problem:  # no memory, or a kernel has broken the GPU's context
        found = {peer.name: _failed(problem) for peer in contest.peers}
    return {
        "name": case.name,
        "group": case.group,
        "bytes": case.bytes,
        "contestants": found,
    }


def _contestants(case: Case, inputs: Inputs, contest: Contest) -> dict[str, dict[str, Any]]:
    wanted: dict[str, tuple[torch.Tensor, ...]] = {}
    found: dict[str, dict[str, Any]] = {}
    with torch.set_grad_enabled(case.pass_ == TRAIN):
        for peer in contest.peers:
            reason = peer.why_not(case, contest.settings)
            if reason is None:
                reason = _too_slow(peer, case)
            if reason is None:
                found[peer.name] = _contestant(peer, case, inputs, contest, wanted)
            elif reason:
                found[peer.name] = {"status": "left out", "reason": reason}
    return found


def _failed(problem: Exception) -> dict[str, Any]:
    reason = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    return {"status": "failed", "reason": reason}


def _too_slow(peer: Peer, case: Case) -> str | None:
    if peer.family != "softmax":
        return None
    flops = 4.0 * case.batch * case.heads * case.length**2 * case.head_dim
    seconds = flops * (3.5 if case.pass_ == TRAIN else 1) / SOFTMAX_FLOPS
    return f"one call would take about {seconds:.1f} s" if seconds > SOFTMAX_SECONDS else None


def _contestant(
    peer: Peer,
    case: Case,
    inputs: Inputs,
    contest: Contest,
    wanted: dict[str, tuple[torch.Tensor, ...]],
) -> dict[str, Any]:
    meter = contest.meter
    try:
        run, error = _checked(peer, case, inputs, contest.settings, wanted)
        if not error <= truth.TOLERANCE[case.dtype]:
            return {"status": "wrong", "reason": f"relative error {error:.1e}", "error": error}
        eager, graph = meter.eager(run), None
        result: dict[str, Any] = {"status": "timed", "error": error, "eager_seconds": eager}
        result["peak_bytes"] = meter.peak(run)
        try:
            graph = meter.graph(run)
        except RuntimeError as problem:  # not everybody's kernels can be captured
            result["reason"] = f"no graph: {problem}".splitlines()[0][:200]
        result["graph_seconds"] = graph
        seconds = graph or eager
        result["gbs"] = case.bytes / seconds * 1e-9
        result["share_of_copy"] = case.bytes / seconds / contest.bandwidth
    except Exception as problem:  # a peer that breaks is a result, and must not end the run
        return _failed(problem)
    return result


def _checked(
    peer: Peer,
    case: Case,
    inputs: Inputs,
    settings: Settings,
    wanted: dict[str, tuple[torch.Tensor, ...]],
) -> tuple[Run, float]:
    """What is to be timed, and its error: of the first batch element, against float64."""
    if case.pass_ == STEP:
        assert peer.step is not None and inputs.S is not None and inputs.z is not None
        step = peer.step(case, settings)
        run, first = step_runner_of(step, inputs), step_runner_of(step, inputs)
        one = Inputs(*(x[:1] for x in (inputs.query, inputs.key, inputs.value)))
        one = Inputs(one.query, one.key, one.value, None, inputs.S[:1], inputs.z[:1])
    else:
        assert peer.attend is not None
        attend = peer.attend(case, inputs, settings)
        run = first = runner_of(attend, case, inputs)
        tensors = (inputs.query, inputs.key, inputs.value, inputs.grad_out)
        one = Inputs(*(x if x is None else x[:1] for x in tensors))  # type: ignore[arg-type]
        tokens = truth.tokens_to_check(peer, case)
        if tokens < case.length:
            one = one.first(tokens)
            first = runner_of(attend, case, one)
    if peer.family not in wanted:
        wanted[peer.family] = truth.truth(peer.family, case, one)
    return run, truth.error(tuple(x[:1] for x in first()), wanted[peer.family])


def run_grid(
    cases: list[Case], contest: Contest, budget: float, console: Console
) -> Iterator[dict[str, Any]]:
    """Every case in turn, printed as soon as it is measured."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > budget:
            left = cases[cases.index(case) :]
            console.print(f"out of time: {len(left)} cases left out, from {case.name} on")
            break
        measured = measure(case, contest)
        console.print(case_table(measured))
        yield measured


def is_sound(cases: list[dict[str, Any]]) -> bool:
    """Whether all of ours that took part were right, and Triton's kernels took part throughout."""
    for case in cases:
        found = [case["contestants"].get(name, {}).get("status") for name in gpu_peers.OURS]
        if found[0] != "timed" or "wrong" in found or "failed" in found:
            return False
    return bool(cases)


# --- tables -----------------------------------------------------------------------------------


def case_table(case: dict[str, Any]) -> Table:
    """All contestants of a case."""
    table = Table(case["name"], title_justify="left")
    for column in ("eager", "graph", "GB/s", "of copy", "peak memory", "error"):
        table.add_column(column, justify="right")
    for name, found in case["contestants"].items():
        if found["status"] != "timed":
            table.add_row(name, found["status"], found["reason"])
            continue
        peak = found["peak_bytes"]
        table.add_row(
            name, duration(found["eager_seconds"]), duration(found["graph_seconds"]),
            f"{found['gbs']:.0f}", f"{found['share_of_copy']:.0%}",
            "-" if peak is None else f"{peak / 2**20:.1f} MiB", f"{found['error']:.0e}",
        )  # fmt: skip
    return table


def summary(cases: list[dict[str, Any]]) -> Table:
    """A line a case: ours, share of the bandwidth, and the fastest other one of each family."""
    columns = [*gpu_peers.OURS, "of copy", "fastest other", "", "softmax", ""]
    table = Table("case", *columns, title="fastattn against the rest", title_justify="left")
    families = {peer.name: peer.family for peer in gpu_peers.PEERS}
    for case in cases:
        seconds = {
            name: found["graph_seconds"] or found["eager_seconds"]
            for name, found in case["contestants"].items()
            if found["status"] == "timed"
        }
        ours = [seconds.get(name) for name in gpu_peers.OURS]
        best = min((x for x in ours if x is not None), default=None)
        row = [case["name"], *map(duration, ours)]
        shares = [
            found["share_of_copy"]
            for name, found in case["contestants"].items()
            if name in gpu_peers.OURS and found["status"] == "timed"
        ]
        row.append(f"{max(shares):.0%}" if shares else "-")
        for family in ("linear", "softmax"):
            others = {
                name: value
                for name, value in seconds.items()
                if name not in gpu_peers.OURS and families[name] == family
            }
            name = min(others, key=others.__getitem__, default="-")
            other = others.get(name)
            row += [name, times(other / best if other and best else None)]
        table.add_row(*row)
    return table
