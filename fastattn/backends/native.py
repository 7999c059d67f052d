"""Between torch and the native libraries: a Problem and tensors as the plain numbers they take.

The libraries know nothing of torch. The order of the numbers is the one that ``csrc/python.h``
reads; the CPU and the CUDA backend share it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import Inputs, Refused
from fastattn.ops.problem import Problem

# kInterface of csrc/python.h: raised with it, whenever what passes between the two sides changes.
INTERFACE = 4

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_RECURRENT_TOKENS = 4  # up to here one token after another beats a chunk's set-up (measured: CPU)


def library(name: str) -> Any:
    """The native library ``fastattn.<name>``: an ImportError if it is not built, or from sources of
    another time, whose calls would be misread."""
    module = importlib.import_module(f"fastattn.{name}")
    found = getattr(module, "INTERFACE", 0)
    if found != INTERFACE:
        raise Refused(
            f"{module.__file__} was built from other sources (its interface is {found}, this is "
            f"{INTERFACE}); rebuild it with make, or pip install ."
        )
    return module


def form_of(problem: Problem) -> str:
    """The form asked for, or the one that suits the length."""
    if problem.form != "auto":
        return problem.form
    few_tokens = problem.query_length <= _RECURRENT_TOKENS
    return "recurrent" if problem.is_causal and few_tokens else "chunked"


def native_problem(library: Any, problem: Problem, form: str) -> Any:
    """The library's own Problem, in that form; "auto": each sequence as suits its length."""
    return library.Problem(
        batch=problem.batch,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        query_length=problem.query_length,
        key_length=problem.key_length,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        num_sequences=problem.num_sequences or 0,
        dtype=DTYPES[problem.dtype],
        feature_map=problem.feature_map,
        form=form,
        is_causal=problem.is_causal,
        normalize=problem.normalize,
        return_state=problem.return_state,
        needs_grad=problem.needs_grad,
        scale=problem.scale,
        eps=problem.eps,
    )


def strided(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides."""
    return (tensor.data_ptr(), *tensor.stride())


def state_of(S: Tensor | None, z: Tensor | None) -> tuple[int, int]:
    """Addresses of a state, 0 where there is none."""
    return (0, 0) if S is None or z is None else (S.data_ptr(), z.data_ptr())


def numbers_of(inputs: Inputs) -> tuple[int, ...]:
    """Addresses and strides of a call's inputs, which are ``dense``."""
    mask, cu, cu_k = inputs.key_mask, inputs.cu_seqlens, inputs.cu_seqlens_k
    return (
        *strided(inputs.query),
        *strided(inputs.key),
        *strided(inputs.value),
        *((0, 0, 0) if mask is None else strided(mask)),
        *((0, 0) if cu is None or cu_k is None else (cu.data_ptr(), cu_k.data_ptr())),
        *state_of(inputs.initial_S, inputs.initial_z),
    )


def dense(inputs: Inputs) -> Inputs:
    """States and offsets are small and read by address alone: contiguous, copied if need be."""
    small = (inputs.cu_seqlens, inputs.cu_seqlens_k, inputs.initial_S, inputs.initial_z)
    if all(tensor is None or tensor.is_contiguous() for tensor in small):
        return inputs
    cu, cu_k, S, z = (None if tensor is None else tensor.contiguous() for tensor in small)
    return inputs._replace(cu_seqlens=cu, cu_seqlens_k=cu_k, initial_S=S, initial_z=z)
