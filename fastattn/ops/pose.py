"""From the arguments of an op to the ``Problem`` that they pose.

The public functions check what a user wrote. A graph (torch.export, torch.jit.trace) calls the ops
again without them, perhaps with tensors of other sizes and types, so here tensors are checked to
agree, too, once for every combination of sizes and types: kernels trust what they are told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import Inputs
from fastattn.ops import check
from fastattn.ops.problem import Problem

NUM_INPUTS = len(Inputs._fields)

_MAX_KEPT = 4096
_problems: dict[tuple[Any, ...], Problem] = {}
_steps: dict[tuple[Any, ...], tuple[Problem, backends.Backend]] = {}


def split_arguments(args: tuple[Any, ...]) -> tuple[Inputs, tuple[Any, ...], str]:
    """An op's arguments as (inputs, the options that problem_of takes, the backend's name)."""
    return Inputs(*args[:NUM_INPUTS]), args[NUM_INPUTS:-1], args[-1]


def problem_of(inputs: Inputs, *options: Any) -> Problem:
    """The Problem that these inputs pose with these options: ``_pose`` says which.

    Raises ValueError or TypeError where the tensors don't agree with each other.
    """
    query, key, value, mask, cu_seqlens, cu_seqlens_k, S, z = inputs
    signature = (
        *(_kind(query), _kind(key), _kind(value), _kind(mask), _kind(cu_seqlens)),
        *(_kind(cu_seqlens_k), _kind(S), _kind(z), options),
    )
    try:
        problem = _problems.get(signature)
    except TypeError:  # sizes that torch.compile traces as symbols have no hash
        return _pose(inputs, *options)
    if problem is None:
        problem = _pose(inputs, *options)
        _keep(_problems, signature, problem)
    return problem


def step_plan(
    inputs: Inputs, feature_map: str, normalize: bool, scale: float, eps: float, backend: str
) -> tuple[Problem, backends.Backend]:
    """One look-up in place of two: decoding is where a microsecond counts."""
    query, key, value, mask, _, _, S, z = inputs
    assert S is not None and z is not None
    check.check_contiguous(S, z)
    signature = (
        query.shape, key.shape, value.shape, S.shape, z.shape,
        query.dtype, key.dtype, value.dtype, S.dtype, z.dtype,
        query.device, key.device, value.device, S.device, z.device,
        _kind(mask), feature_map, normalize, scale, eps, backend,
    )  # fmt: skip
    plan = _steps.get(signature)
    if plan is None:
        problem = _pose(inputs, feature_map, True, normalize, scale, eps, "auto", False, False)
        plan = problem, backends.choose(problem, backend)
        _keep(_steps, signature, plan)
    return plan


def _keep(known: dict[tuple[Any, ...], Any], signature: tuple[Any, ...], value: Any) -> None:
    if len(known) >= _MAX_KEPT:
        known.clear()
    known[signature] = value


def _kind(x: Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    return None if x is None else (x.shape, x.dtype, x.device)


def _pose(
    inputs: Inputs,
    feature_map: str,
    is_causal: bool,
    normalize: bool,
    scale: float,
    eps: float,
    form: str,
    return_state: bool,
    needs_grad: bool,
) -> Problem:
    query, key, value, key_mask, cu_seqlens, cu_seqlens_k, S, z = inputs
    check.check_tensors(query, key, value, enable_gqa=True)
    check.check_structure(query, key, feature_map, is_causal, return_state, S is not None, form)
    if key_mask is not None:
        check.check_key_mask(key_mask, key)
    num_sequences = None
    if cu_seqlens is not None:
        check.check_cu_seqlens_pair(cu_seqlens, cu_seqlens_k, query, key)
        num_sequences = cu_seqlens.shape[0] - 1
    batch, num_heads, query_length, head_dim = query.shape
    if S is not None:
        sequences = batch if num_sequences is None else num_sequences
        check.check_state("initial_state", (S, z), sequences, key, value, feature_map)
    return Problem(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=key.shape[1],
        query_length=query_length,
        key_length=key.shape[2],
        head_dim=head_dim,
        value_dim=value.shape[3],
        dtype=query.dtype,
        device_type=query.device.type,
        device_index=query.device.index,
        feature_map=feature_map,
        is_causal=is_causal,
        normalize=normalize,
        scale=scale,
        eps=eps,
        form=form,
        has_key_mask=key_mask is not None,
        num_sequences=num_sequences,
        has_initial_state=S is not None,
        return_state=return_state,
        needs_grad=needs_grad,
    )


def check_contents(problem: Problem, inputs: Inputs) -> None:
    """Reads cu_seqlens where that costs nothing; on a GPU it would stop the stream."""
    cu_seqlens, cu_seqlens_k = inputs.cu_seqlens, inputs.cu_seqlens_k
    if cu_seqlens is None or cu_seqlens_k is None or cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    check.check_offsets("cu_seqlens", offsets, problem.query_length)
    if cu_seqlens_k is cu_seqlens:
        return
    offsets_k = cu_seqlens_k.tolist()
    check.check_offsets("cu_seqlens_k", offsets_k, problem.key_length)
    if problem.is_causal and offsets_k != offsets:
        raise ValueError(
            "is_causal=True needs as many queries as keys in every sequence, so cu_seqlens_k must "
            f"equal cu_seqlens, {offsets}; got {offsets_k}"
        )
