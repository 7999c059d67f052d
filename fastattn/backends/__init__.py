"""Backends: who computes a ``Problem``, and why the others can't.

A backend is a small object with three computations and a ``why_not``. It is created on first
use, so a missing compiler, driver or library is a sentence to the user, never a crash at import.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from fastattn.ops.problem import Problem


class Inputs(NamedTuple):
    """Tensors of a call, already checked, never copied.

    query (B, Hq, N, D), key (B, Hk, M, D), value (B, Hk, M, Dv): one dtype, one device, any
    strides. key_mask: bool (B, M), True = takes part. cu_seqlens, cu_seqlens_k: int32
    (num_sequences + 1,), both given or both None. initial_S: (Bs, Hk, F, Dv) and initial_z:
    (Bs, Hk, F) in the accumulator dtype, both given or both None, any strides.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    initial_S: Tensor | None = None
    initial_z: Tensor | None = None


class Outputs(NamedTuple):
    """out: (B, Hq, N, Dv) in (B, N, Hq, Dv) memory. S, z: final state when
    ``problem.return_state``, else None. saved: what backward wants back, a 1-D accumulator-dtype
    tensor of ``saved_size(problem)`` elements (size 0 unless ``problem.needs_grad``)."""

    out: Tensor
    S: Tensor | None
    z: Tensor | None
    saved: Tensor


class Gradients(NamedTuple):
    """Gradients with the shapes of the inputs; initial_S and initial_z None if not given."""

    query: Tensor
    key: Tensor
    value: Tensor
    initial_S: Tensor | None
    initial_z: Tensor | None


class Backend(Protocol):
    """What every backend offers."""

    name: str

    def why_not(self, problem: Problem) -> str | None:
        """None if this backend can compute the problem, else the reason in one sentence."""

    def kernel(self, problem: Problem) -> str:
        """Name of the kernel that a problem takes, for ``explain``."""

    def saved_size(self, problem: Problem) -> int:
        """Number of elements of ``Outputs.saved``: a function of the problem alone."""

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs: ...

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        saved: Tensor,
        grad_out: Tensor,
        grad_S: Tensor | None,
        grad_z: Tensor | None,
    ) -> Gradients:
        """grad_out: (B, Hq, N, Dv), any strides. grad_S, grad_z: gradients of the returned state."""

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        """One token (N = M = 1): updates inputs.initial_S and initial_z IN PLACE (they are
        contiguous here), returns out (B, Hq, 1, Dv)."""


