"""Argument checks: everything that a user can get wrong is refused here, in the user's words.

Each message names the argument, what was given and what is allowed. Nothing here reads a tensor's
contents, so nothing waits for a GPU; offsets that live on the CPU are read by ``check_offsets``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import feature_maps

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_DIM = 256
_NUMBER: Any = Real  # also those of NumPy
LEAST_EPS = 1e-30  # its inverse times a number is one in float32
FORMS = ("auto", "chunked", "recurrent")


def check_tensors(query: Any, key: Any, value: Any, enable_gqa: bool) -> None:
    """Shapes, dtypes and devices of query, key and value."""
    for name, x, shape in (
        ("query", query, "(B, Hq, N, D)"),
        ("key", key, "(B, Hk, M, D)"),
        ("value", value, "(B, Hk, M, Dv)"),
    ):
        check_tensor(name, x)
        if x.is_nested or x.layout is not torch.strided:
            raise TypeError(
                f"{name} must be a dense tensor; got {_layout(x)} (for sequences of different "
                "lengths pass key_mask, or pack them and pass cu_seqlens)"
            )
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape {shape}; got {_shape(x)}")
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64; got {query.dtype}")
    B, Hq, _, D = query.shape
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype, {query.dtype}; got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}; got {x.device}")
        if x.shape[0] != B:
            raise ValueError(f"{name} must have query's batch size B = {B}; got {_shape(x)}")
    if key.shape[3] != D:
        raise ValueError(f"key must have query's head size D = {D}; got {_shape(key)}")
    Hk, M = key.shape[1], key.shape[2]
    if value.shape[1] != Hk or value.shape[2] != M:
        raise ValueError(
            f"value must have key's heads and tokens, (B, {Hk}, {M}, Dv); got {_shape(value)}"
        )
    for name, size in (("query's D", D), ("value's Dv", value.shape[3])):
        if not 1 <= size <= MAX_DIM:
            raise ValueError(f"{name} (the last size) must be between 1 and {MAX_DIM}; got {size}")
    if Hq != Hk and not enable_gqa:
        raise ValueError(
            f"key and value must have query's {Hq} heads; got {Hk} (with enable_gqa=True query "
            "heads may share key heads)"
        )
    if Hk < 1 or Hq < 1 or Hq % Hk:
        raise ValueError(
            "query's number of heads must be a multiple of key's, both at least 1; "
            f"got {Hq} and {Hk}"
        )


def check_options(
    feature_map: str, normalize: Any, scale: Any, eps: Any, enable_gqa: Any, backend: Any
) -> None:
    """Switches that every call has."""
    phi = feature_maps.get(feature_map)
    check_bool("normalize", normalize)
    check_bool("enable_gqa", enable_gqa)
    if normalize and not phi.is_nonnegative:
        raise ValueError(
            f"normalize=True needs non-negative features, which feature_map={feature_map!r} does "
            "not give; pass normalize=False, or feature_map='features' if your tensors hold "
            "non-negative features already"
        )
    check_number("scale", scale)
    check_eps(eps)
    check_backend(backend)


def check_backend(backend: Any) -> None:
    if backend != "auto" and backend not in backends.names():
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(map(repr, backends.names()))}; "
            f"got {backend!r}"
        )


def check_structure(
    query: Tensor,
    key: Tensor,
    feature_map: str,
    is_causal: Any,
    return_state: Any,
    has_initial_state: bool,
    form: Any,
) -> None:
    """What excludes what: causal and cross attention, states and the "efficient" map."""
    check_bool("is_causal", is_causal)
    check_bool("return_state", return_state)
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}; got {form!r}")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            "is_causal=True needs as many queries as keys; got "
            f"N = {query.shape[2]} and M = {key.shape[2]}"
        )
    if feature_maps.get(feature_map).is_separable:
        return
    for name, given in (
        ("is_causal=True", is_causal),
        ("initial_state", has_initial_state),
        ("return_state=True", return_state),
    ):
        if given:
            raise ValueError(
                f"{name} cannot be combined with feature_map={feature_map!r}: its keys are "
                "normalised over the whole sequence, so there is no running state"
            )


def check_key_mask(key_mask: Any, key: Tensor) -> None:
    B, M = key.shape[0], key.shape[2]
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a bool tensor of shape (B, M); got {_kind(key_mask)}")
    if key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape != (B, M):
        hint = "" if key_mask.dtype == torch.bool else "; True marks a key that takes part"
        raise ValueError(
            f"key_mask must be bool of shape (B, M) = ({B}, {M}); got {key_mask.dtype} of shape "
            f"{_shape(key_mask)}{hint}"
        )
    if key_mask.device != key.device:
        raise ValueError(f"key_mask must be on query's device, {key.device}; got {key_mask.device}")


def check_cu_seqlens(name: str, cu_seqlens: Any, query: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 tensor; got {_kind(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name} must have shape (number of sequences + 1,), with at least one sequence; "
            f"got {_shape(cu_seqlens)}"
        )
    if cu_seqlens.device != query.device:
        raise ValueError(
            f"{name} must be on query's device, {query.device}; got {cu_seqlens.device}"
        )
    if query.shape[0] != 1:
        raise ValueError(
            f"{name} describes packed sequences, so query must have batch size B = 1; "
            f"got B = {query.shape[0]}"
        )


def check_cu_seqlens_pair(cu_seqlens: Any, cu_seqlens_k: Any, query: Tensor, key: Tensor) -> None:
    if cu_seqlens is None:
        raise ValueError(
            "cu_seqlens_k was given without cu_seqlens; pass both, or cu_seqlens alone"
        )
    check_cu_seqlens("cu_seqlens", cu_seqlens, query)
    if cu_seqlens_k is None:
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "cu_seqlens alone describes queries and keys of the same lengths; got "
                f"N = {query.shape[2]} and M = {key.shape[2]} (pass cu_seqlens_k)"
            )
        return
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query)
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            "cu_seqlens_k must describe as many sequences as cu_seqlens, "
            f"{cu_seqlens.shape[0] - 1}; got {cu_seqlens_k.shape[0] - 1}"
        )


def check_offsets(name: str, offsets: Sequence[int], tokens: int) -> None:
    """The contents of cu_seqlens: wrong ones would send a kernel outside its tensors."""
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(
            f"{name} must start at 0 and end at the number of tokens, {tokens}; "
            f"got {offsets[0]} and {offsets[-1]}"
        )
    if any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"{name} must not decrease; got {list(offsets)}")


def check_state(
    name: str, state: Any, sequences: int, key: Tensor, value: Tensor, feature_map: str
) -> None:
    """A state (S, z) for so many sequences, (Bs, Hk, F, Dv) and (Bs, Hk, F)."""
    features = feature_maps.get(feature_map).num_features(key.shape[3])
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    S_shape = (sequences, key.shape[1], features, value.shape[3])
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{name} must be a LinearAttentionState (S, z); got {_kind(state)}")
    for part, x, shape, letters in (
        ("S", state[0], S_shape, "(B, Hk, F, Dv)"),
        ("z", state[1], S_shape[:-1], "(B, Hk, F)"),
    ):
        check_tensor(f"{name}.{part}", x)
        if x.dtype != dtype:
            raise TypeError(
                f"{name}.{part} must be {dtype} (float64 for float64 inputs, else float32); "
                f"got {x.dtype}"
            )
        if x.dim() != len(shape) or x.shape != shape:
            raise ValueError(f"{name}.{part} must have shape {letters} = {shape}; got {_shape(x)}")
        if x.device != key.device:
            raise ValueError(
                f"{name}.{part} must be on query's device, {key.device}; got {x.device}"
            )


def check_contiguous(S: Tensor, z: Tensor) -> None:
    if not (S.is_contiguous() and z.is_contiguous()):
        raise ValueError("state must be contiguous, because it is updated in place")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {_kind(value)}")


def check_eps(eps: Any) -> None:
    check_number("eps", eps)
    if not eps >= LEAST_EPS:
        raise ValueError(f"eps must be at least {LEAST_EPS}; got {eps}")


def check_bool(name: str, value: Any) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBER):
        raise TypeError(f"{name} must be a number; got {_kind(value)}")
    # torch.compile can trace this, not math.isfinite. (An int may be larger than every float.)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite; got {value}")


def _kind(x: Any) -> str:
    return "None" if x is None else type(x).__name__


def _layout(x: Tensor) -> str:
    return "a nested tensor" if x.is_nested else f"layout {x.layout}"


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
