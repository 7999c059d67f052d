"""Backends: who computes a ``Problem``, and why the others can't.

A backend is a small object with three computations and a ``why_not``. It is created on first
use, so a missing compiler, driver or library is a sentence to the user, never a crash at import.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastattn.backends import rules
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
    """Gradients with the shapes of the inputs, those of the states contiguous; initial_S and
    initial_z None if not given."""

    query: Tensor
    key: Tensor
    value: Tensor
    initial_S: Tensor | None
    initial_z: Tensor | None


def new_out(problem: Problem, device: torch.device) -> Tensor:
    """Memory for ``Outputs.out``; not a view, so that callers may change it in place."""
    shape = (problem.batch, problem.num_heads, problem.query_length, problem.value_dim)
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=problem.dtype, device=device)


class Backend(Protocol):
    """What every backend offers."""

    name: str

    def missing(self) -> str | None:
        """What this machine lacks to run anything at all on it (a GPU, say), None if nothing."""

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
        """grad_out: (B, Hq, N, Dv), any strides. grad_S, grad_z: those of the returned state."""

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        """One token (N = M = 1): updates inputs.initial_S and initial_z IN PLACE (they are
        contiguous here), returns out (B, Hq, 1, Dv)."""


# Module and class, imported on first use. rules.py says which of them "auto" tries, and when.
_BACKENDS = {
    "cpu": ("fastattn.backends.cpu", "CPUBackend"),
    "triton": ("fastattn.backends.triton", "TritonBackend"),
    "cuda": ("fastattn.backends.cuda", "CUDABackend"),
    "reference": ("fastattn.backends.reference", "ReferenceBackend"),
}

# What is missing where a backend can't be imported.
_NEEDS = {
    "cpu": "the native library is not built",
    "triton": "Triton is not installed, or too old or too new (3.6 to 3.9 are known to work)",
    "cuda": "the CUDA kernels are not built",
}


class Refused(ImportError):
    """A library is there and must not be used; the message says why, and what helps."""


def names() -> list[str]:
    """The names that ``backend=`` accepts, besides "auto"."""
    return list(_BACKENDS)


@cache
def load(name: str) -> Backend | str:
    """The backend of that name, or the reason why this machine doesn't have it."""
    module, cls = _BACKENDS[name]
    try:
        backend: Backend = getattr(importlib.import_module(module), cls)()
    except Refused as error:
        return str(error)
    except ImportError as error:
        return f"{_NEEDS[name]}: {error}"
    return backend


def why_not(name: str, problem: Problem) -> str | None:
    """None if that backend can compute the problem here, else the reason in one sentence."""
    backend = load(name)
    return backend if isinstance(backend, str) else backend.why_not(problem)


def choose(problem: Problem, name: str = "auto") -> Backend:
    """The backend that computes the problem: the one named, or the first by the rules that can.

    ValueError if the named one can't. "auto" warns, once per reason, when all that is left is the
    reference: that would be slow for a cause the user may be able to remove.
    """
    try:
        return _choose(problem, name)
    except TypeError:  # sizes that torch.compile traces as symbols have no hash
        return _choose.__wrapped__(problem, name)


@lru_cache(maxsize=4096)
def _choose(problem: Problem, name: str) -> Backend:
    reasons: dict[str, str | None] = {}
    for candidate in rules.order(problem) if name == "auto" else [name]:
        reason = why_not(candidate, problem)
        backend = load(candidate)
        if reason is None and not isinstance(backend, str):
            if candidate == "reference" and name == "auto" and problem.device_type != "meta":
                _warn_slow(reasons)
            return backend
        reasons[candidate] = reason
    raise ValueError(f"backend={name!r} cannot compute this call: {reasons[name]}")


def _warn_slow(reasons: dict[str, str | None]) -> None:
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    _warn_once(f"linear_attention runs on the slow reference backend, because {why}")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
