"""Bad input of every argument: the error names the argument, what was given, what is allowed."""

# One bad call a line reads better than six lines each.
# ruff: noqa: E501

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastattn import LinearAttentionState, linear_attention, linear_attention_step

B, H, N, D, DV = 2, 4, 6, 8, 5


def good() -> dict[str, Any]:
    return {
        "query": torch.randn(B, H, N, D),
        "key": torch.randn(B, H, N, D),
        "value": torch.randn(B, H, N, DV),
    }


def state(*shape: int, dtype: torch.dtype = torch.float32) -> LinearAttentionState:
    return LinearAttentionState(
        torch.zeros(shape, dtype=dtype), torch.zeros(shape[:3], dtype=dtype)
    )


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


PACKED = {name: torch.randn(1, H, N, D) for name in ("query", "key", "value")}

# What replaces a good argument, the error's type, and what its message says.
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query must be a torch.Tensor; got list"),
    ({"value": None}, TypeError, "value must be a torch.Tensor; got None"),
    ({"query": torch.randn(B, N, D)}, ValueError, "query must have shape (B, Hq, N, D); got (2, 6, 8)"),
    ({"key": torch.randn(D)}, ValueError, "key must have shape (B, Hk, M, D); got (8,)"),
    ({"value": torch.randn(1, B, H, N, D)}, ValueError, "value must have shape (B, Hk, M, Dv)"),
    ({"key": torch.randn(B, H, N, D).to_sparse()}, TypeError, "key must be a dense tensor"),
    ({"query": torch.ones(B, H, N, D, dtype=torch.int64)}, TypeError, "got torch.int64"),
    ({"query": torch.ones(B, H, N, D, dtype=torch.complex64)}, TypeError, "query must be float32"),
    ({"key": torch.randn(B, H, N, D).half()}, TypeError, "key must have query's dtype, torch.float32"),
    ({"value": torch.randn(B, H, N, D).bfloat16()}, TypeError, "value must have query's dtype"),
    ({"key": torch.randn(B, H, N, D, device="meta")}, ValueError, "query's device, cpu; got meta"),
    ({"key": torch.randn(3, H, N, D)}, ValueError, "key must have query's batch size B = 2"),
    ({"value": torch.randn(1, H, N, D)}, ValueError, "value must have query's batch size"),
    ({"key": torch.randn(B, H, N, 7)}, ValueError, "key must have query's head size D = 8"),
    ({"value": torch.randn(B, H, 5, D)}, ValueError, "value must have key's heads and tokens"),
    ({"value": torch.randn(B, 2, N, D)}, ValueError, "value must have key's heads and tokens"),
    (
        {"query": torch.randn(B, H, N, 257), "key": torch.randn(B, H, N, 257)},
        ValueError,
        "query's D (the last size) must be between 1 and 256; got 257",
    ),
    ({"value": torch.randn(B, H, N, 300)}, ValueError, "must be between 1 and 256; got 300"),
    ({"value": torch.randn(B, H, N, 0)}, ValueError, "must be between 1 and 256; got 0"),
    (
        {"key": torch.randn(B, 2, N, D), "value": torch.randn(B, 2, N, D)},
        ValueError,
        "must have query's 4 heads; got 2 (with enable_gqa=True",
    ),
    (
        {"key": torch.randn(B, 3, N, D), "value": torch.randn(B, 3, N, D), "enable_gqa": True},
        ValueError,
        "must be a multiple of key's, both at least 1; got 4 and 3",
    ),
    ({"enable_gqa": "yes"}, TypeError, "enable_gqa must be True or False; got 'yes'"),
    ({"feature_map": "elo"}, ValueError, "got 'elo' (did you mean 'elu'?)"),
    ({"feature_map": "Softmax"}, ValueError, "did you mean 'softmax'?"),
    ({"feature_map": "zzz"}, ValueError, "feature_map must be one of 'elu', 'relu'"),
    ({"feature_map": 3}, ValueError, "got 3"),
    ({"feature_map": "identity"}, ValueError, "normalize=True needs non-negative features"),
    ({"feature_map": "efficient", "is_causal": True}, ValueError, "is_causal=True cannot be combined"),
    (
        {"feature_map": "efficient", "return_state": True},
        ValueError,
        "return_state=True cannot be combined with feature_map='efficient'",
    ),
    (
        {"feature_map": "efficient", "initial_state": state(B, H, D, DV)},
        ValueError,
        "initial_state cannot be combined with feature_map='efficient'",
    ),
    ({"feature_map": lambda x: x[..., 0]}, ValueError, "query must have shape"),
    ({"is_causal": 1}, TypeError, "is_causal must be True or False; got 1"),
    (
        {"is_causal": True, "query": torch.randn(B, H, 3, D)},
        ValueError,
        "is_causal=True needs as many queries as keys; got N = 3 and M = 6",
    ),
    ({"normalize": None}, TypeError, "normalize must be True or False; got None"),
    ({"scale": "1"}, TypeError, "scale must be a number; got str"),
    ({"scale": torch.ones(1)}, TypeError, "scale must be a number; got Tensor"),
    ({"scale": float("nan")}, ValueError, "scale must be finite; got nan"),
    ({"scale": 10**400}, ValueError, "scale must be finite; got 1000"),
    ({"scale": float("inf")}, ValueError, "scale must be finite; got inf"),
    ({"key_mask": [True]}, TypeError, "key_mask must be a bool tensor of shape (B, M); got list"),
    (
        {"key_mask": torch.ones(B, 1, 1, N)},
        ValueError,
        "key_mask must be bool of shape (B, M) = (2, 6); got torch.float32 of shape (2, 1, 1, 6)",
    ),
    ({"key_mask": torch.ones(B, N)}, ValueError, "True marks a key that takes part"),
    ({"key_mask": torch.ones(B, 5, dtype=torch.bool)}, ValueError, "got torch.bool of shape (2, 5)"),
    (
        {"key_mask": torch.ones(B, N, dtype=torch.bool, device="meta")},
        ValueError,
        "key_mask must be on query's device, cpu; got meta",
    ),
    ({"cu_seqlens": [0, N]}, TypeError, "cu_seqlens must be an int32 tensor; got list"),
    ({"cu_seqlens": torch.tensor([0, N])}, TypeError, "cu_seqlens must be int32; got torch.int64"),
    ({"cu_seqlens": offsets(0)}, ValueError, "with at least one sequence; got (1,)"),
    ({"cu_seqlens": offsets(0, N)[None]}, ValueError, "cu_seqlens must have shape"),
    ({"cu_seqlens": offsets(0, N).to("meta")}, ValueError, "cu_seqlens must be on query's device"),
    ({"cu_seqlens": offsets(0, N)}, ValueError, "query must have batch size B = 1; got B = 2"),
    ({"cu_seqlens_k": offsets(0, N)}, ValueError, "cu_seqlens_k was given without cu_seqlens"),
    ({**PACKED, "cu_seqlens": offsets(1, N)}, ValueError, "cu_seqlens must start at 0"),
    ({**PACKED, "cu_seqlens": offsets(0, 5)}, ValueError, "tokens, 6; got 0 and 5"),
    ({**PACKED, "cu_seqlens": offsets(0, 9)}, ValueError, "tokens, 6; got 0 and 9"),
    ({**PACKED, "cu_seqlens": offsets(0, 4, 2, N)}, ValueError, "must not decrease; got [0, 4, 2, 6]"),
    (
        {**PACKED, "cu_seqlens": offsets(0, N), "cu_seqlens_k": offsets(0, 2, N)},
        ValueError,
        "cu_seqlens_k must describe as many sequences as cu_seqlens, 1; got 2",
    ),
    (
        {**PACKED, "cu_seqlens": offsets(0, N), "cu_seqlens_k": offsets(0, 7)},
        ValueError,
        "cu_seqlens_k must start at 0 and end at the number of tokens, 6",
    ),
    (
        {
            **PACKED,
            "cu_seqlens": offsets(0, 1, N),
            "cu_seqlens_k": offsets(0, 2, N),
            "is_causal": True,
        },
        ValueError,
        "cu_seqlens_k must equal cu_seqlens, [0, 1, 6]; got [0, 2, 6]",
    ),
    (
        {**PACKED, "query": torch.randn(1, H, 3, D), "cu_seqlens": offsets(0, 3)},
        ValueError,
        "got N = 3 and M = 6 (pass cu_seqlens_k)",
    ),
    ({"initial_state": torch.zeros(2)}, TypeError, "must be a LinearAttentionState (S, z); got Tensor"),
    ({"initial_state": (None, None)}, TypeError, "initial_state.S must be a torch.Tensor; got None"),
    (
        {"initial_state": state(B, H, D, DV, dtype=torch.float16)},
        TypeError,
        "initial_state.S must be torch.float32 (float64 for float64 inputs, else float32)",
    ),
    (
        {"initial_state": state(B, H, D, 6)},
        ValueError,
        "initial_state.S must have shape (B, Hk, F, Dv) = (2, 4, 8, 5); got (2, 4, 8, 6)",
    ),
    (
        {"initial_state": state(B, H, D, DV), "feature_map": "cosine"},
        ValueError,
        "initial_state.S must have shape (B, Hk, F, Dv) = (2, 4, 9, 5)",
    ),
    (
        {"initial_state": (torch.zeros(B, H, D, DV), torch.zeros(B, H, 3))},
        ValueError,
        "initial_state.z must have shape (B, Hk, F) = (2, 4, 8); got (2, 4, 3)",
    ),
    (
        {"initial_state": state(B, H, D, DV).to("meta")},
        ValueError,
        "initial_state.S must be on query's device, cpu; got meta",
    ),
    ({"return_state": "yes"}, TypeError, "return_state must be True or False; got 'yes'"),
    ({"eps": 0}, ValueError, "eps must be at least 1e-30; got 0"),
    ({"eps": 1e-39}, ValueError, "eps must be at least 1e-30; got 1e-39"),
    ({"eps": -1e-6}, ValueError, "eps must be at least 1e-30; got -1e-06"),
    ({"eps": float("nan")}, ValueError, "eps must be finite; got nan"),
    ({"eps": None}, TypeError, "eps must be a number; got None"),
    ({"backend": "gpu"}, ValueError, "backend must be 'auto' or one of 'cpu', "),
    ({"form": "parallel"}, ValueError, "form must be one of 'auto', 'chunked', 'recurrent'"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: " ".join(bad[0])[:40] + ": " + bad[2][:40])
def test_linear_attention_refuses(bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    changes, kind, message = bad
    call = good() | changes
    with pytest.raises(kind, match=re.escape(message)):
        linear_attention(call.pop("query"), call.pop("key"), call.pop("value"), **call)


def test_a_named_backend_that_cannot_says_why() -> None:
    x = torch.randn(1, 1, 4, 4, device="meta")
    with pytest.raises(ValueError, match=r"backend='cpu' cannot compute this call: .*'meta'"):
        linear_attention(x, x, x, backend="cpu")


def step() -> dict[str, Any]:
    return {
        "query": torch.randn(B, H, 1, D),
        "key": torch.randn(B, H, 1, D),
        "value": torch.randn(B, H, 1, DV),
        "state": state(B, H, D, DV),
    }


BAD_STEPS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": 1}, TypeError, "query must be a torch.Tensor; got int"),
    ({"query": torch.randn(B, H, 2, D)}, ValueError, "linear_attention_step takes one token"),
    (
        {"key": torch.randn(B, H, 3, D), "value": torch.randn(B, H, 3, DV)},
        ValueError,
        "linear_attention_step takes one token",
    ),
    ({"state": None}, TypeError, "state must be a LinearAttentionState (S, z); got None"),
    ({"state": state(B, H, D, 9)}, ValueError, "state.S must have shape"),
    ({"state": state(B, H, D, DV, dtype=torch.float64)}, TypeError, "state.S must be torch.float32"),
    (
        {"state": (torch.zeros(B, H, DV, D).mT, torch.zeros(B, H, D))},
        ValueError,
        "state must be contiguous, because it is updated in place",
    ),
    ({"feature_map": "efficient"}, ValueError, "feature_map='efficient' has no running state"),
    ({"feature_map": "identity"}, ValueError, "normalize=True needs non-negative features"),
    ({"key_mask": torch.ones(B, 2, dtype=torch.bool)}, ValueError, "(B, M) = (2, 1)"),
    ({"query": torch.randn(B, H, 1, D, requires_grad=True)}, ValueError, "has no gradient"),
    ({"normalize": 1}, TypeError, "normalize must be True or False; got 1"),
    ({"enable_gqa": 0}, TypeError, "enable_gqa must be True or False; got 0"),
    ({"scale": None, "eps": 0.0}, ValueError, "eps must be at least 1e-30"),
    ({"backend": "gpu"}, ValueError, "backend must be 'auto' or one of"),
]  # fmt: skip


@pytest.mark.parametrize(
    "bad", BAD_STEPS, ids=lambda bad: " ".join(bad[0])[:40] + ": " + bad[2][:40]
)
def test_linear_attention_step_refuses(bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    changes, kind, message = bad
    good_step = step()
    linear_attention_step(*good_step.values())  # recognising what has passed must not let this in
    call = step() | changes
    arguments = [call.pop(name) for name in ("query", "key", "value", "state")]
    with pytest.raises(kind, match=re.escape(message)):
        linear_attention_step(*arguments, **call)


def test_refused_steps_leave_the_state_alone() -> None:
    call = step()
    with pytest.raises(ValueError, match="eps"):
        linear_attention_step(*call.values(), eps=-1.0)
    assert not call["state"].S.any()
