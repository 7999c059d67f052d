"""The ops: the public functions, the Problem they pose, and torch's view of them."""

from fastattn.ops import feature_maps
from fastattn.ops.attention import linear_attention, linear_attention_step
from fastattn.ops.explain import explain
from fastattn.ops.problem import Problem
from fastattn.ops.state import LinearAttentionState

__all__ = [
    "LinearAttentionState",
    "Problem",
    "explain",
    "feature_maps",
    "linear_attention",
    "linear_attention_step",
]
