"""What is measured: shapes that models really have, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

FORWARD, TRAIN, STEP = "forward", "forward+backward", "step"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LONG = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Case:
    """One problem: elu feature map, normalised, query, key and value of shape (B, H, N, D).

    The tensors are (B, H, N, D) views of (B, N, H, D) memory, because that is what a model's
    projections give. ``pass_`` is FORWARD, TRAIN (forward and backward) or STEP (one token onto a
    state, N = 1).
    """

    group: str
    batch: int
    length: int
    pass_: str = FORWARD
    causal: bool = False
    dtype: str = "float32"
    heads: int = 12
    head_dim: int = 64

    @property
    def name(self) -> str:
        """Unique, readable, stable between runs: the key by which floors and docs find a case."""
        shape = f"B{self.batch} H{self.heads} N{self.length} D{self.head_dim}"
        kind = "" if self.pass_ == STEP else (" causal" if self.causal else " non-causal")
        return f"{self.pass_}{kind} {self.dtype} {shape}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> float:
        """Multiplications and additions that no algorithm linear in N avoids.

        Forward: one outer product onto S and one product with S per token, 4 D^2. Backward: those
        of S and its gradient, 8 D^2. (What a chunked causal kernel computes on top, the scores
        within a chunk, is its own affair.)
        """
        factor = 12 if self.pass_ == TRAIN else 4
        return factor * self.batch * self.heads * self.length * self.head_dim**2

    @property
    def bytes(self) -> float:
        """Every input read once, every output written once; a step also rereads its state."""
        tensor = self.batch * self.heads * self.length * self.head_dim * self.torch_dtype.itemsize
        if self.pass_ == STEP:
            state = self.batch * self.heads * self.head_dim * (self.head_dim + 1) * 4
            return 4 * tensor + 2 * state
        return (4 + 7 if self.pass_ == TRAIN else 4) * tensor


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; ``S`` and ``z`` for STEP, ``grad_out`` for TRAIN."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor | None = None
    S: torch.Tensor | None = None
    z: torch.Tensor | None = None

    def first(self, tokens: int) -> Inputs:
        """The same problem on its first tokens."""
        short = (self.query[:, :, :tokens], self.key[:, :, :tokens], self.value[:, :, :tokens])
        grad_out = None if self.grad_out is None else self.grad_out[:, :, :tokens]
        return Inputs(*short, grad_out)

    def leaves(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """query, key and value as fresh leaves of an autograd graph, in their own layout."""
        tensors = (self.query, self.key, self.value)
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normal random numbers, the same for a case on every run on a device of one kind."""
    generator = torch.Generator(device).manual_seed(case.length)

    def draw() -> torch.Tensor:
        shape = (case.batch, case.length, case.heads, case.head_dim)
        numbers = torch.randn(shape, generator=generator, device=device)
        return numbers.to(case.torch_dtype).transpose(1, 2)

    query, key, value = draw(), draw(), draw()
    if case.pass_ == STEP:
        heads = (case.batch, case.heads, case.head_dim)
        S = torch.rand((*heads, case.head_dim), generator=generator, device=device)
        z = torch.rand(heads, generator=generator, device=device) + 1
        return Inputs(query, key, value, None, S, z)
    return Inputs(query, key, value, draw() if case.pass_ == TRAIN else None)


def full() -> Iterator[Case]:
    """Everything that the tables, the plot and the floors need."""
    for dtype in DTYPES:
        for pass_ in (FORWARD, TRAIN):
            for length in (128, 256, 512):
                yield Case("bert", 32, length, pass_, dtype=dtype)
    for pass_ in (FORWARD, TRAIN):
        yield Case("bert", 32, 128, pass_, head_dim=32)
    for causal in (False, True):
        for length in LONG:
            yield Case("long", 1, length, FORWARD, causal)
        for length in (128, 1024, 4096, 16384, 65536):
            yield Case("long", 1, length, TRAIN, causal)
        for length in (1024, 4096, 16384, 65536):
            yield Case("long", 1, length, FORWARD, causal, "bfloat16")
        yield Case("long", 1, 4096, TRAIN, causal, "bfloat16")
    yield from _steps()


def quick() -> Iterator[Case]:
    """A first look in about a minute: still every case that a floor needs."""
    yield Case("bert", 32, 128)
    for causal in (False, True):
        for length in (128, 1024, 4096, 16384):
            yield Case("long", 1, length, FORWARD, causal)
        yield Case("long", 1, 128, TRAIN, causal)
        yield Case("long", 1, 4096, TRAIN, causal)
        yield Case("long", 1, 4096, FORWARD, causal, "bfloat16")
    yield from _steps()


def _steps() -> Iterator[Case]:
    for batch in (1, 8, 32):
        yield Case("decode", batch, 1, STEP, True)
    yield Case("decode", 1, 1, STEP, True, head_dim=32)
