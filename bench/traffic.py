"""``python -m bench.traffic``: the bytes that the Triton kernels move, counted as they run.

Linear attention is bound by memory on every GPU, so bytes are what its kernels are judged by where
no GPU is at hand. Triton's interpreter runs them, and every load and store is counted: those of
tokens (queries, keys, values, outputs and their gradients) apart from those of states (S and z,
partial sums, row factors). "asked for" is all of it. "moved" leaves out what a program loads again
while it is still among the last CACHE bytes that this program touched: its share of a GPU's L2
cache (50 MB for the 132 multiprocessors of an H100, 40 MB for the 108 of an A100). All in bytes
per token and head over the head size d, 16-bit. docs/triton.md has the results.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

CACHE = 256 << 10
SECTOR = 32  # bytes: the least that memory delivers
TOKENS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
MANY, FEW = 1, 10**6  # multiprocessors that a plan is made for: heads enough for them, or not


@dataclass
class Count:
    """Bytes of one kind of tensor."""

    asked: int = 0
    moved: int = 0


@dataclass
class Traffic:
    """What a call's kernels moved. ``kernels``: names, in order of their launches."""

    tokens: Count = field(default_factory=Count)
    states: Count = field(default_factory=Count)
    kernels: list[str] = field(default_factory=list)


class _Counter:
    """Follows the interpreter: one cache for the program that runs."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.ranges: list[tuple[int, int]] = []
        self.cache: OrderedDict[int, None] = OrderedDict()

    def launch(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.traffic.kernels.append(kernel)
        tensors = [arguments[name] for name in TOKENS if name in arguments]
        self.ranges = [
            (x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors
        ]

    def access(self, pointers: Any, mask: Any, is_load: bool) -> None:
        addresses = pointers.data[mask.data.astype(bool)]
        if addresses.size == 0:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first = int(addresses.flat[0])
        is_token = any(begin <= first < begin + length for begin, length in self.ranges)
        count = self.traffic.tokens if is_token else self.traffic.states
        count.asked += addresses.size * size
        missed = self._touch({int(sector) for sector in addresses.ravel() // SECTOR})
        # No more than was asked for: a lone number takes a sector, but its neighbours follow.
        count.moved += min(missed * SECTOR if is_load else 2**62, addresses.size * size)

    def _touch(self, sectors: set[int]) -> int:
        missed = 0
        for sector in sectors:
            if sector in self.cache:
                self.cache.move_to_end(sector)
            else:
                missed += 1
                self.cache[sector] = None
        while len(self.cache) > CACHE // SECTOR:
            self.cache.popitem(last=False)
        return missed


@contextmanager
def counting(multiprocessors: int) -> Iterator[Traffic]:
    """Counts what kernels do within, planned for a GPU of so many multiprocessors."""
    from triton.runtime.interpreter import interpreter_builder as builder

    from fastattn.backends.triton import backend, launch

    if not launch.INTERPRETED:
        raise RuntimeError("bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    counter = _Counter()
    load, store, start = builder.create_masked_load, builder.create_masked_store, launch.Step.launch

    def counted_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.access(pointers, mask, True)
        return load(pointers, mask, *rest, **named)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.access(pointers, mask, False)
        return store(pointers, value, mask, *rest, **named)

    def program(x: int, y: int, z: int) -> None:
        counter.cache.clear()
        type(builder).set_grid_idx(builder, x, y, z)

    def counted_launch(step: Any, arguments: dict[str, Any], *rest: Any) -> None:
        counter.launch(step.kernel.__name__, arguments)
        start(step, arguments, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "set_grid_idx", program),
        mock.patch.object(launch.Step, "launch", counted_launch),
        mock.patch.object(backend, "_multiprocessors", return_value=multiprocessors),
    ):
        yield counter.traffic


@dataclass(frozen=True)
class Call:
    """A training call in bfloat16, one head. ``budget``: d of tokens that forward and backward
    are held to."""

    is_causal: bool
    length: int
    head_dim: int
    multiprocessors: int
    budget: tuple[float, float]

    @property
    def title(self) -> str:
        kind = "causal" if self.is_causal else "non-causal"
        heads = "few" if self.multiprocessors == FEW else "many"
        return f"{kind}, {self.length} tokens, d = {self.head_dim}, {heads} heads"


# Causal: segments shared out are read by two launches (12d and 22d). What a program reads again is
# partly in its cache.
CALLS = (
    Call(False, 512, 64, MANY, (8, 14)),
    Call(False, 2048, 64, MANY, (8, 14)),
    Call(False, 2048, 64, FEW, (8, 14)),
    Call(False, 2048, 128, FEW, (8, 14)),
    Call(True, 2048, 64, MANY, (8, 17.75)),
    Call(True, 2048, 64, FEW, (12, 22)),
    Call(True, 2048, 128, MANY, (8, 21.5)),
    Call(True, 2048, 128, FEW, (12, 22)),
)
STATES = 3  # d that states, partial sums and row factors may take on top


def measure(call: Call) -> tuple[Traffic, Traffic]:
    """Of the forward and of the backward."""
    from fastattn import linear_attention

    shape = (1, call.length, 1, call.head_dim)
    leaves = [
        torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    with counting(call.multiprocessors) as forward:
        out = linear_attention(*leaves, is_causal=call.is_causal, backend="triton")
    grad_out = torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2)
    with counting(call.multiprocessors) as backward:
        torch.autograd.grad(out, leaves, grad_out)
    return forward, backward


def in_head_sizes(bytes_: int, call: Call) -> float:
    """Bytes per token and head over the head size."""
    return bytes_ / (call.length * call.head_dim)


def main() -> None:
    table = Table("call", "pass", "launches", "budget", "tokens moved", "asked for", "states moved")
    for call in CALLS:
        for name, budget, traffic in zip(("forward", "backward"), call.budget, measure(call)):
            numbers = (traffic.tokens.moved, traffic.tokens.asked, traffic.states.moved)
            table.add_row(
                call.title, name, str(len(traffic.kernels)), f"{budget:g}d",
                *(f"{in_head_sizes(number, call):.4g}d" for number in numbers),
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
