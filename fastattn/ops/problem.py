"""What is asked of a backend: one call of linear attention as plain data.

Everything that decides *which* kernel runs and *how* is here and nothing else is; a backend
receives a ``Problem`` and tensors, and computes. ``csrc/problem.h`` mirrors it for the native
kernels. A ``Problem`` is hashable, so plans can be cached on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes, types and switches of one call; no tensors.

    The shapes are those of ``torch.nn.functional.scaled_dot_product_attention``: query
    (B, Hq, N, D), key (B, Hk, M, D), value (B, Hk, M, Dv). With packed sequences
    (``num_sequences`` set) B is 1, and states have ``num_sequences`` in place of B.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device_type: str
    feature_map: str
    is_causal: bool
    normalize: bool
    scale: float
    eps: float
    form: str = "auto"  # "auto" | "chunked" | "recurrent"
    has_key_mask: bool = False
    num_sequences: int | None = None  # set when cu_seqlens was given
    has_initial_state: bool = False
    return_state: bool = False
    needs_grad: bool = False
    device_index: int | None = None  # which GPU; None: the current one

    @property
    def feature_dim(self) -> int:
        """Number of features F of phi: the rows of the state S (F, Dv)."""
        return self.head_dim + 1 if self.feature_map == "cosine" else self.head_dim

    @property
    def state_batch(self) -> int:
        """Number of independent sequences: the leading size of the states."""
        return self.batch if self.num_sequences is None else self.num_sequences

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """Type of S, z and every sum: float64 for float64 inputs, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32
