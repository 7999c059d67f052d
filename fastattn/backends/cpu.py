"""The C++ backend: hands raw addresses to ``fastattn._native``.

The native library knows nothing of torch, so this file is the only place where the two meet:
it allocates outputs, flattens addresses and strides into the order ``csrc/bindings.cpp`` reads,
and lends the kernels torch's own threads (a second OpenMP pool would spin against the first).
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastattn import _native
from fastattn.backends import Gradients, Inputs, Outputs
from fastattn.ops.problem import Problem

ISA_VARIABLE = "FASTATTN_CPU_ISA"

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_MAX_DIM = 256
_SEGMENT_TOKENS, _MAX_SEGMENTS = 1024, 64  # kSegmentTokens, kMaxSegments
_RECURRENT_TOKENS = 4  # up to here one token after another beats a chunk's set-up (measured)


def _join_torch_threads() -> None:
    """Run on the threads of the OpenMP runtime that torch ships, if it does."""
    libraries = Path(torch.__file__).parent / "lib"
    for pattern in ("libgomp*", "libiomp5*", "libomp*"):
        for path in sorted(libraries.glob(pattern)):
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
def _native_problem(problem: Problem) -> _native.Problem:
    return _native.Problem(
        batch=problem.batch,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        query_length=problem.query_length,
        key_length=problem.key_length,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        num_sequences=problem.num_sequences or 0,
        dtype=_DTYPES[problem.dtype],
        feature_map=problem.feature_map,
        form=_form(problem),
        is_causal=problem.is_causal,
        normalize=problem.normalize,
        return_state=problem.return_state,
        needs_grad=problem.needs_grad,
        scale=problem.scale,
        eps=problem.eps,
    )


def _form(problem: Problem) -> str:
    if problem.form != "auto":
        return problem.form
    few_tokens = problem.query_length <= _RECURRENT_TOKENS
    return "recurrent" if problem.is_causal and few_tokens else "chunked"


def _strided(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), *tensor.stride())


def _inputs(inputs: Inputs) -> tuple[int, ...]:
    mask, cu, cu_k = inputs.key_mask, inputs.cu_seqlens, inputs.cu_seqlens_k
    S, z = inputs.initial_S, inputs.initial_z
    return (
        *_strided(inputs.query),
        *_strided(inputs.key),
        *_strided(inputs.value),
        *((0, 0, 0) if mask is None else _strided(mask)),
        *((0, 0) if cu is None or cu_k is None else (cu.data_ptr(), cu_k.data_ptr())),
        *_state(S, z),
    )


def _state(S: Tensor | None, z: Tensor | None) -> tuple[int, int]:
    return (0, 0) if S is None or z is None else (S.data_ptr(), z.data_ptr())


def _dense(inputs: Inputs) -> Inputs:
    """States and offsets are small and read by address alone: contiguous, copied if need be."""
    small = (inputs.cu_seqlens, inputs.cu_seqlens_k, inputs.initial_S, inputs.initial_z)
    if all(tensor is None or tensor.is_contiguous() for tensor in small):
        return inputs
    cu, cu_k, S, z = (None if tensor is None else tensor.contiguous() for tensor in small)
    return inputs._replace(cu_seqlens=cu, cu_seqlens_k=cu_k, initial_S=S, initial_z=z)


class CPUBackend:
    """Every problem on CPU tensors with head sizes up to 256."""

    name = "cpu"

    def __init__(self) -> None:
        _join_torch_threads()
        _select_isa()

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"its kernels run on the CPU; the tensors are on {problem.device_type!r}"
        if problem.dtype not in _DTYPES:
            return f"it has no kernels for {problem.dtype}"
        if max(problem.head_dim, problem.value_dim) > _MAX_DIM:
            return f"head sizes go up to {_MAX_DIM}; got {problem.head_dim}, {problem.value_dim}"
        return None

    def kernel(self, problem: Problem) -> str:
        form = _form(problem) if problem.is_causal else "two-pass"
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
            length = torch.sym_max(_SEGMENT_TOKENS, (share + 63) // 64 * 64)
            anchors = problem.batch * torch.sym_max((M - 1) // length, 0)
        # Two elements too many: a size that may be 0 or 1 is one that torch.export specialises on.
        return anchors * problem.num_kv_heads * state_size + 2

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs:
        inputs = _dense(inputs)
        native = _native_problem(problem)
        sums = problem.accumulator_dtype
        out = torch.empty(
            (problem.batch, problem.query_length, problem.num_heads, problem.value_dim),
            dtype=problem.dtype,
        ).transpose(1, 2)
        S = z = None
        if problem.return_state:
            heads = (problem.state_batch, problem.num_kv_heads, problem.feature_dim)
            S = torch.empty((*heads, problem.value_dim), dtype=sums)
            z = torch.empty(heads, dtype=sums)
        # Causal: packed sequences may need fewer states than the bound; the rest is not left to chance.
        new_saved = torch.zeros if problem.is_causal else torch.empty
        saved = new_saved(self.saved_size(problem), dtype=sums)
        numbers = (*_inputs(inputs), *_strided(out), *_state(S, z), saved.data_ptr())
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
        inputs = _dense(inputs)
        if grad_S is not None and grad_z is not None:
            grad_S, grad_z = grad_S.contiguous(), grad_z.contiguous()
        query, key, value = (torch.empty_like(tensor) for tensor in inputs[:3])
        S = None if inputs.initial_S is None else torch.empty_like(inputs.initial_S)
        z = None if inputs.initial_z is None else torch.empty_like(inputs.initial_z)
        numbers = (
            *_inputs(inputs),
            saved.data_ptr(),
            *_strided(grad_out),
            *_state(grad_S, grad_z),
            *_strided(query),
            *_strided(key),
            *_strided(value),
            *_state(S, z),
        )
        _native.backward(_native_problem(problem), numbers, torch.get_num_threads())
        return Gradients(query, key, value, S, z)

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        out = torch.empty(
            (problem.batch, 1, problem.num_heads, problem.value_dim), dtype=problem.dtype
        ).transpose(1, 2)
        numbers = (*_inputs(inputs), *_strided(out))
        _native.step(_native_problem(problem), numbers, torch.get_num_threads())
        return out
