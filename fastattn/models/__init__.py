"""Hugging Face encoders with linear attention.

Importing this registers ``attn_implementation="fastattn_linear"`` with transformers.
"""

from fastattn.models.attention import NAME
from fastattn.models.conversion import linearize, load, restore
from fastattn.models.positions import extend_positions

__all__ = ["NAME", "extend_positions", "linearize", "load", "restore"]
