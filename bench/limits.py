"""What the machine could do at best: its arithmetic and its memory, measured where we run.

A case can't take less time than its multiplications at the peak rate of fused multiply-adds, nor
less than its bytes at the bandwidth of a copy: the longer of the two is the limit that times are
shown against. Both come from loops in the native library; without it, from torch, which reaches
less, and the result says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import Case

_CACHE_BYTES = 16 << 20  # tensors that fit into the caches are not bound by the memory's bandwidth


@dataclass(frozen=True)
class Limits:
    """Rates of multiply-adds (2 FLOP each) in float32 and of bfloat16, and of copying (bytes read
    plus written)."""

    gflops: float
    bf16_gflops: float
    gbs: float
    source: str

    def seconds(self, case: Case) -> float:
        """The least time that the case can take on this machine."""
        gflops = self.bf16_gflops if case.dtype == "bfloat16" else self.gflops
        compute = case.flops / (gflops * 1e9)
        if case.bytes < _CACHE_BYTES:
            return compute
        return max(compute, case.bytes / (self.gbs * 1e9))


def measure(threads: int) -> Limits:
    """The best of several tries: a limit, so noise may only lower it."""
    try:
        from fastattn import _native
    except ImportError:
        of_float32, of_bf16 = map(_matmul_gflops, (torch.float32, torch.bfloat16))
        return Limits(of_float32, of_bf16, _torch_copy_gbs(), "torch (native library not built)")
    of_float32, of_bf16 = (
        max(_native.fma_peak_gflops(threads, in_bf16) for _ in range(5))
        for in_bf16 in (False, True)
    )
    return Limits(of_float32, of_bf16, _native.copy_bandwidth_gbs(threads), "native")


def _matmul_gflops(dtype: torch.dtype, size: int = 2048) -> float:
    a, b = (torch.rand(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b) * 1e-9


def _torch_copy_gbs(size: int = 1 << 25) -> float:
    source, target = torch.rand(size), torch.empty(size)
    return 8 * size / _best(lambda: target.copy_(source)) * 1e-9


def _best(work: Callable[[], object], tries: int = 7) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
