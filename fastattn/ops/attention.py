"""The public functions: linear attention over a sequence, and one step of it.

They check their arguments and call one op; ``library.py`` turns that into a Problem and a
backend's kernel. Nothing else happens in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.ops import check, feature_maps
from fastattn.ops.library import (
    NEEDS_GRAD,
    TransformedForward,
    autocast,
    below_autocast,
    below_autograd,
    forward_op,
    is_transformed,
    refuse_forward_mode,
    step_op,
)
from fastattn.ops.state import LinearAttentionState

FeatureMapArgument = str | feature_maps.FeatureMap | Callable[[Tensor], Tensor]
StateArgument = LinearAttentionState | tuple[Tensor, Tensor]

_MAX_CHECKED_STEPS = 4096


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMapArgument = ...,
    is_causal: bool = ...,
    normalize: bool = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    initial_state: StateArgument | None = ...,
    return_state: Literal[False] = ...,
    enable_gqa: bool = ...,
    eps: float = ...,
    backend: str = ...,
    form: str = ...,
) -> Tensor: ...


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMapArgument = ...,
    is_causal: bool = ...,
    normalize: bool = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    initial_state: StateArgument | None = ...,
    return_state: Literal[True],
    enable_gqa: bool = ...,
    eps: float = ...,
    backend: str = ...,
    form: str = ...,
) -> tuple[Tensor, LinearAttentionState]: ...


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMapArgument = "elu",
    is_causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    initial_state: StateArgument | None = None,
    return_state: bool = False,
    enable_gqa: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
    form: str = "auto",
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Linear attention: ``scaled_dot_product_attention`` in time linear in the length.

    With phi the feature map, s the scale and m the key mask::

        S_i = sum_j m_j phi(k_j) v_j^T     z_i = sum_j m_j phi(k_j)
        out_i = phi(s q_i)^T S_i / max(phi(s q_i) . z_i, eps)

    where j runs over all keys, or over j <= i if ``is_causal``, and the sums start from
    ``initial_state``. A query with nothing to attend to gives 0. Sums are float32 (float64 for
    float64 inputs) and the same input gives the same bits on every run.

    Args:
        query: (B, Hq, N, D), float32, bfloat16, float16 or float64, any strides. D from 1 to 256.
        key: (B, Hk, M, D), same dtype and device.
        value: (B, Hk, M, Dv), same dtype and device. Dv from 1 to 256.
        feature_map: a name from ``fastattn.feature_maps``, computed inside the kernels; or a
            module or function that maps (B, H, tokens, D) to non-negative features.
        is_causal: token i sees keys 0..i; needs N = M.
        normalize: divide by the denominator. False: out_i = phi(s q_i)^T S_i.
        scale: factor of the query before phi; None means 1.
        key_mask: bool (B, M), True where a key takes part.
        cu_seqlens: int32 (sequences + 1,), where each packed sequence of queries starts, and the
            total: 0, ..., N. Needs B = 1. Also that of the keys unless ``cu_seqlens_k`` is given.
        cu_seqlens_k: the same for keys: 0, ..., M. Contents are checked for CPU tensors only.
        initial_state: state of the tokens before these: S (Bs, Hk, F, Dv) and z (Bs, Hk, F),
            where Bs is B or the number of packed sequences. Not updated. Gradients flow into it.
        return_state: also return the state after these tokens, with gradients.
        enable_gqa: allow Hq to be a multiple of Hk; query head h uses key head h // (Hq / Hk).
        eps: the smallest denominator, at least 1e-30.
        backend: "auto" or one of ``fastattn.backends.names()``; see ``fastattn.explain``.
        form: "chunked" (tiles of tokens), "recurrent" (one token after another) or "auto": the
            same result, for tests and benchmarks.

    Returns:
        out (B, Hq, N, Dv) in the input dtype, in (B, N, Hq, Dv) memory so that
        ``out.transpose(1, 2).flatten(2)`` is free; with ``return_state`` (out, state).

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.

    Under autocast query, key and value are cast as for ``scaled_dot_product_attention``; states
    are not. There are no second derivatives and none in forward mode (``torch.func.jvp``).

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, https://arxiv.org/abs/2006.16236.
    """
    arguments = op_arguments(
        *(query, key, value, feature_map, is_causal, normalize, scale, key_mask, cu_seqlens),
        *(cu_seqlens_k, initial_state, return_state, enable_gqa, eps, backend, form),
    )
    if is_transformed():
        out, S, z, _ = TransformedForward.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        op = below_autocast(forward_op, arguments[0])
        if arguments[NEEDS_GRAD] or torch.compiler.is_compiling():
            out, S, z, _ = op(*arguments)
        else:
            with below_autograd():
                out, S, z, _ = op(*arguments)
    return (out, LinearAttentionState(S, z)) if return_state else out


def op_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMapArgument = "elu",
    is_causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    initial_state: StateArgument | None = None,
    return_state: bool = False,
    enable_gqa: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
    form: str = "auto",
) -> tuple[Any, ...]:
    """The arguments of ``linear_attention``, checked, as those of ``fastattn::forward``."""
    query, key, value, phi, scale = _prepare(query, key, value, feature_map, scale)
    check.check_tensors(query, key, value, enable_gqa)
    check.check_options(phi, normalize, scale, eps, enable_gqa, backend)
    check.check_structure(query, key, phi, is_causal, return_state, initial_state is not None, form)
    if key_mask is not None:
        check.check_key_mask(key_mask, key)
    if cu_seqlens is not None or cu_seqlens_k is not None:
        check.check_cu_seqlens_pair(cu_seqlens, cu_seqlens_k, query, key)
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    S = z = None
    if initial_state is not None:
        sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check.check_state("initial_state", initial_state, sequences, key, value, phi)
        S, z = initial_state
        needs_grad |= torch.is_grad_enabled() and (S.requires_grad or z.requires_grad)
    _check_forward_mode(query, key, value, S, z)
    if is_transformed():  # what vmap has wrapped doesn't say whether a gradient is wanted
        needs_grad = torch.is_grad_enabled()
    return (
        *(query, key, value, key_mask, cu_seqlens, cu_seqlens_k, S, z),
        *(phi, is_causal, normalize, float(scale), float(eps), form),
        *(return_state, needs_grad, backend),
    )


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: StateArgument,
    *,
    feature_map: FeatureMapArgument = "elu",
    normalize: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    enable_gqa: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """One token of causal linear attention; adds it to ``state`` IN PLACE.

    In a loop this gives what ``linear_attention(..., is_causal=True)`` gives over all tokens, in
    constant time and memory per token.

    Args:
        query: (B, Hq, 1, D).
        key: (B, Hk, 1, D).
        value: (B, Hk, 1, Dv).
        state: S (B, Hk, F, Dv) and z (B, Hk, F), contiguous, float32 (float64 for float64
            inputs): from ``LinearAttentionState.zeros`` or a call with ``return_state=True``.
        key_mask: bool (B, 1). Where False the row's state stays as it is.

    The other arguments, the result (B, Hq, 1, Dv) and the errors are those of
    ``linear_attention``. There is no gradient, because the state is overwritten: for training,
    ``linear_attention(..., initial_state=state, return_state=True)``.
    """
    query, key, value, phi, scale = _prepare(query, key, value, feature_map, scale)
    arguments = (
        query,
        key,
        value,
        state,
        phi,
        normalize,
        scale,
        key_mask,
        enable_gqa,
        eps,
        backend,
    )
    if torch.compiler.is_compiling():
        _check_step(*arguments)
    else:
        _check_step_once(*arguments)
    S, z = state
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or S.requires_grad
        or z.requires_grad
    ):
        raise ValueError(
            "linear_attention_step has no gradient, because it overwrites the state; call it under "
            "torch.no_grad(), or linear_attention(..., initial_state=state, return_state=True)"
        )
    _check_forward_mode(query, key, value, S, z)
    out: Tensor = below_autocast(step_op, query)(
        query, key, value, key_mask, S, z, phi, normalize, float(scale), float(eps), backend
    )
    if not torch.compiler.is_compiling() and not S.is_inference():
        torch._C._increment_version((S, z))
    return out


def _check_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: StateArgument,
    phi: str,
    normalize: bool,
    scale: float,
    key_mask: Tensor | None,
    enable_gqa: bool,
    eps: float,
    backend: str,
) -> None:
    check.check_tensors(query, key, value, enable_gqa)
    check.check_options(phi, normalize, scale, eps, enable_gqa, backend)
    if query.shape[2] != 1 or key.shape[2] != 1:
        raise ValueError(
            "linear_attention_step takes one token, query (B, Hq, 1, D) and key (B, Hk, 1, D); "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if not feature_maps.get(phi).is_separable:
        raise ValueError(f"feature_map={phi!r} has no running state, so it cannot step")
    if key_mask is not None:
        check.check_key_mask(key_mask, key)
    check.check_state("state", state, query.shape[0], key, value, phi)
    check.check_contiguous(*state)


_checked_steps: set[tuple[Any, ...]] = set()


def _check_step_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: StateArgument,
    phi: str,
    normalize: bool,
    scale: float,
    key_mask: Tensor | None,
    enable_gqa: bool,
    eps: float,
    backend: str,
) -> None:
    """Decoding repeats one call thousands of times: what has passed once is only recognised."""
    try:
        S, z = state
        signature = (
            *(query.shape, key.shape, value.shape, S.shape, z.shape, S.stride(), z.stride()),
            *(query.dtype, key.dtype, value.dtype, S.dtype, z.dtype),
            *(query.device, key.device, value.device, S.device, z.device),
            *(phi, normalize, scale, enable_gqa, eps, backend, type(normalize), type(enable_gqa)),
        )
        if key_mask is None and signature in _checked_steps:
            return
    except (AttributeError, TypeError, ValueError):
        signature = None  # something is wrong: the checks say what
    _check_step(
        *(query, key, value, state, phi, normalize, scale, key_mask, enable_gqa, eps, backend)
    )
    if len(_checked_steps) >= _MAX_CHECKED_STEPS:
        _checked_steps.clear()
    if signature is not None:
        _checked_steps.add(signature)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMapArgument,
    scale: Any,
) -> tuple[Tensor, Tensor, Tensor, str, float]:
    """Applies a map that is a module or function, and autocast; gives the fused map's name."""
    if scale is None:
        scale = 1.0
    if isinstance(feature_map, feature_maps.FeatureMap):
        feature_map = feature_maps.name_of(feature_map)
    if not isinstance(feature_map, str):
        if not callable(feature_map):
            raise feature_maps.unknown(feature_map)
        check.check_number("scale", scale)
        query, key = feature_map(query if scale == 1 else query * scale), feature_map(key)
        feature_map, scale = "features", 1.0
    if isinstance(scale, torch.SymFloat):  # of a length that is traced; an op's numbers are fixed
        query, scale = query * scale, 1.0  # type: ignore[operator]
    is_real = isinstance(value, Tensor) and not value.is_meta
    if is_real and torch.is_autocast_enabled(value.device.type):
        query, key, value = (autocast(x) for x in (query, key, value))
    return query, key, value, feature_map, scale


def _check_forward_mode(*tensors: Tensor | None) -> None:
    """Dual numbers would lose their tangents on the way: derivatives of 0."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        refuse_forward_mode()
