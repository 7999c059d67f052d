"""How kernels are declared and started: compiled once, started with as little Python as possible.

A kernel is specialised on its constexprs and on nothing else: no length, stride or scalar is
looked at, so a new length never compiles. Triton's own launcher inspects some sixty arguments on
every call to find that out again; where all pointers are as usual the compiled kernel is kept and
started directly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.runtime

INTERPRETED = bool(triton.knobs.runtime.interpret)
_IS_AMD = torch.version.hip is not None
ALIGNMENT = 16  # bytes; what Triton assumes of a pointer if the first one it sees has it
_SMALL = 2**31 - 1  # bytes of memory in which Triton counts in 32 bits, on AMD


@cache
def warp_size() -> int:
    """Threads of a warp on the GPUs here: AMD's have 64 (CDNA) or 32 (RDNA)."""
    return int(triton.runtime.driver.active.get_current_target().warp_size) if _IS_AMD else 32


def kernel(function: Callable[..., None]) -> Any:
    """Declares a Triton kernel whose numbers (parameters annotated with an integer or float type)
    are never specialised on."""
    parameters = inspect.signature(function).parameters.values()
    numbers = [p.name for p in parameters if str(p.annotation).startswith(("tl.int", "tl.float"))]
    return triton.jit(function, do_not_specialize=numbers)


def are_usual(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether Triton compiles for these pointers what it compiles for nearly all: it makes a kernel
    of its own where one is not aligned and, on AMD, where one lies in more than 2 GB of memory."""
    for tensor in tensors:
        if tensor.data_ptr() % ALIGNMENT:
            return False
        if _IS_AMD and tensor.untyped_storage().nbytes() > _SMALL:
            return False
    return True


@dataclass(frozen=True)
class Tile:
    """How a kernel is compiled: tokens of a tile, most values of a tile, warps, pipeline stages."""

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int


@dataclass(eq=False)
class Step:
    """One launch of a plan: all that does not change from call to call. ``renamed``: parameters
    of the kernel that go by other names in the plan."""

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    numbers: dict[str, int | float]
    tile: Tile
    renamed: dict[str, str] = field(default_factory=dict)
    compiled: dict[int, Any] = field(default_factory=dict)  # by device

    def __post_init__(self) -> None:
        self.grid = (*self.grid, 1, 1)[:3]  # a compiled kernel wants all three
        fixed = {**self.constants, **self.numbers}
        # Of every parameter: its value, or else the name under which a call brings it.
        self.fixed = [fixed.get(name) for name in self.kernel.arg_names]
        self.names = [
            None if name in fixed else self.renamed.get(name, name)
            for name in self.kernel.arg_names
        ]

    def options(self, warp_size: int) -> dict[str, int]:
        """The table counts warps of 32 threads; AMD's have 64, and half as many share as many
        registers. Nor are loops pipelined there: Triton 3.7 fails to compile the causal forward if
        they are."""
        num_warps, num_stages = self.tile.num_warps, self.tile.num_stages
        if warp_size != 32:
            num_warps, num_stages = max(1, num_warps * 32 // warp_size), 1
        # The default of Triton up to 3.9; later ones change it.
        return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}

    def launch(self, arguments: dict[str, Any], device: int, usual: bool) -> None:
        """Starts the kernel on the current stream. ``usual``: ``are_usual(its tensors)``."""
        if 0 in self.grid:
            return
        values = [
            value if name is None else arguments[name]
            for value, name in zip(self.fixed, self.names)
        ]
        if INTERPRETED:
            self.kernel[self.grid](*values)
        elif not usual:
            self._start(values)
        elif device in self.compiled:
            self.compiled[device][self.grid](*values)
        else:
            self.compiled[device] = self._start(values)

    def _start(self, values: list[Any]) -> Any:
        """By Triton's launcher, which compiles and loads what has not run yet."""
        try:
            return self.kernel[self.grid](*values, **self.options(warp_size()))
        except Exception as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a kernel that has not run yet can't be loaded while a CUDA graph is captured: "
                    "make this very call once before the capture"
                ) from error
            raise
