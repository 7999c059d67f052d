"""The C++ backend: hands raw addresses to ``fastattn._native``.

It allocates outputs, and lends the kernels torch's own threads (a second OpenMP pool would spin
against the first).
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import Gradients, Inputs, Outputs, new_out
from fastattn.backends.native import (
    DTYPES,
    dense,
    form_of,
    library,
    native_problem,
    numbers_of,
    state_of,
    strided,
)
from fastattn.ops.problem import Problem

_native = library("_native")

ISA_VARIABLE = "FASTATTN_CPU_ISA"

_MAX_DIM = 256
_SEGMENT_UNIT = 96  # kSegmentUnit and so on, in csrc/cpu/segments.h
_SEGMENT_TOKENS, _MAX_SEGMENTS = 6 * _SEGMENT_UNIT, 64


def _join_torch_threads() -> None:
    """Run on the threads of the OpenMP runtime that torch has loaded: one that it ships, or the
    system's."""
    libraries = Path(torch.__file__).parent / "lib"
    for name in ("libgomp", "libiomp5", "libomp"):
        for path in (*sorted(libraries.glob(f"{name}*")), f"{name}.so", f"{name}.so.1"):
            if _native.join_openmp(str(path)):
                return


def _select_isa() -> None:
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return
    runnable = _native.isas()
    if wanted not in runnable:
        raise ValueError(
            f"{ISA_VARIABLE} must be one of {', '.join(runnable)} on this machine; got {wanted!r}"
        )
    _native.select_isa(wanted)


@lru_cache(maxsize=1024)
def _native_problem(problem: Problem) -> Any:
    return native_problem(_native, problem, problem.form)


class CPUBackend:
    """Every problem on CPU tensors with head sizes up to 256."""

    name = "cpu"

    def __init__(self) -> None:
        _join_torch_threads()
        _select_isa()

    def missing(self) -> str | None:
        return None

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"its kernels run on the CPU; the tensors are on {problem.device_type!r}"
        if problem.dtype not in DTYPES:
            return f"it has no kernels for {problem.dtype}"
        if max(problem.head_dim, problem.value_dim) > _MAX_DIM:
            return f"head sizes go up to {_MAX_DIM}; got {problem.head_dim}, {problem.value_dim}"
        return None

    def kernel(self, problem: Problem) -> str:
        form = form_of(problem) if problem.is_causal else "two-pass"
        kind = "causal" if problem.is_causal else "non-causal"
        return f"{kind} {form} ({_native.active_isa()})"

    def saved_size(self, problem: Problem) -> int:
        """As in csrc/cpu/segments.h, but in arithmetic that torch.compile follows through symbols:
        asking the native library would pin the length and compile again for every new one."""
        if not problem.needs_grad:
            return 0
        F, M = problem.feature_dim, problem.key_length
        state_size = F * (problem.value_dim + 1)
        if not problem.is_causal:
            statistics = F if problem.feature_map == "efficient" else 0
            return problem.state_batch * problem.num_kv_heads * (state_size + statistics)
        if problem.num_sequences is not None:
            anchors = M // _SEGMENT_TOKENS
        else:
            share = (M + _MAX_SEGMENTS - 1) // _MAX_SEGMENTS
            length = torch.sym_max(
                _SEGMENT_TOKENS, (share + _SEGMENT_UNIT - 1) // _SEGMENT_UNIT * _SEGMENT_UNIT
            )
            anchors = problem.batch * torch.sym_max((M - 1) // length, 0)
        # Two elements too many: a size that may be 0 or 1 is one that torch.export specialises on.
        return anchors * problem.num_kv_heads * state_size + 2

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs:
        inputs = dense(inputs)
        native = _native_problem(problem)
        sums = problem.accumulator_dtype
        out = new_out(problem, inputs.query.device)
        S = z = None
        if problem.return_state:
            heads = (problem.state_batch, problem.num_kv_heads, problem.feature_dim)
            S = torch.empty((*heads, problem.value_dim), dtype=sums)
            z = torch.empty(heads, dtype=sums)
        # Packed causal sequences may need fewer states than the bound: the rest is 0, not noise.
        new_saved = torch.zeros if problem.is_causal else torch.empty
        saved = new_saved(self.saved_size(problem), dtype=sums)
        numbers = (*numbers_of(inputs), *strided(out), *state_of(S, z), saved.data_ptr())
        _native.forward(native, numbers, torch.get_num_threads())
        return Outputs(out, S, z, saved)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        saved: Tensor,
        grad_out: Tensor,
        grad_S: Tensor | None,
        grad_z: Tensor | None,
    ) -> Gradients:
        inputs = dense(inputs)
        if grad_S is not None and grad_z is not None:
            grad_S, grad_z = grad_S.contiguous(), grad_z.contiguous()
        query, key, value = (torch.empty_like(tensor) for tensor in inputs[:3])
        S = None if inputs.initial_S is None else torch.empty_like(inputs.initial_S)
        z = None if inputs.initial_z is None else torch.empty_like(inputs.initial_z)
        numbers = (
            *numbers_of(inputs),
            saved.data_ptr(),
            *strided(grad_out),
            *state_of(grad_S, grad_z),
            *strided(query),
            *strided(key),
            *strided(value),
            *state_of(S, z),
        )
        _native.backward(_native_problem(problem), numbers, torch.get_num_threads())
        return Gradients(query, key, value, S, z)

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        out = new_out(problem, inputs.query.device)
        numbers = (*numbers_of(inputs), *strided(out))
        _native.step(_native_problem(problem), numbers, torch.get_num_threads())
        return out
