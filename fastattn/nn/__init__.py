"""Modules: attention in place of ``torch.nn.MultiheadAttention``; learned feature maps."""

from fastattn.nn.attention import LinearAttention
from fastattn.nn.feature_maps import T2R, Cosformer, Hedgehog, Performer

__all__ = ["Cosformer", "Hedgehog", "LinearAttention", "Performer", "T2R"]
