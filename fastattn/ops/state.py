"""The state (S, z): everything that linear attention remembers of the tokens it has read.

Adding two states merges two stretches of sequence. That one fact is how calls, segments, threads
and, later, ranks combine, so the state is a type with a name and its merge is ``+``.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from fastattn.ops import feature_maps

_NO_PRODUCT = "a LinearAttentionState can't be multiplied; its S and z can"


class LinearAttentionState(NamedTuple):
    """Running sums over the keys and values read so far, in float32 (float64 for float64 calls).

    S: (B, Hk, F, Dv), the sum of phi(k) v^T.  z: (B, Hk, F), the sum of phi(k).
    F is the number of features: head_dim, or head_dim + 1 for the "cosine" map. With packed
    sequences the leading size is the number of sequences. It is a tuple, so ``S, z = state``
    works and torch.compile, export and checkpointing carry it without help.
    """

    S: Tensor
    z: Tensor

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        feature_map: str = "elu",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LinearAttentionState:
        """The state before the first token. ``dtype`` is float64 only for float64 calls."""
        features = feature_maps.get(feature_map).num_features(head_dim)
        leading = (batch, num_kv_heads, features)
        return cls(
            torch.zeros(*leading, value_dim, dtype=dtype, device=device),
            torch.zeros(leading, dtype=dtype, device=device),
        )

    def __add__(self, other: object) -> LinearAttentionState:
        """The state of two stretches of sequence read one after the other (in any order).

        Raises ValueError for states of other shapes or types, TypeError for what is no state.
        """
        if not isinstance(other, LinearAttentionState):
            return NotImplemented
        for name, mine, its in zip(("S", "z"), self, other, strict=True):
            if (mine.shape, mine.dtype) != (its.shape, its.dtype):
                raise ValueError(
                    f"states that are added must have the same shapes and types; got {name} "
                    f"{tuple(mine.shape)}, {mine.dtype} and {tuple(its.shape)}, {its.dtype}"
                )
        return LinearAttentionState(self.S + other.S, self.z + other.z)

    # A tuple would be joined to one, or repeated.
    def __radd__(self, other: object) -> NoReturn:
        kind = type(other).__name__
        raise TypeError(f"only a LinearAttentionState can be added to one; got {kind}")

    def __mul__(self, other: object) -> NoReturn:
        raise TypeError(_NO_PRODUCT)

    def __rmul__(self, other: object) -> NoReturn:
        raise TypeError(_NO_PRODUCT)

    def clone(self) -> LinearAttentionState:
        """A copy: ``linear_attention_step`` updates states in place."""
        return LinearAttentionState(self.S.clone(), self.z.clone())

    def detach(self) -> LinearAttentionState:
        """The same memory, cut from the autograd graph (truncated backpropagation)."""
        return LinearAttentionState(self.S.detach(), self.z.detach())

    def to(self, device: torch.device | str) -> LinearAttentionState:
        """The state on another device."""
        return LinearAttentionState(self.S.to(device), self.z.to(device))


torch.serialization.add_safe_globals([LinearAttentionState])  # so that torch.load reads saved ones
