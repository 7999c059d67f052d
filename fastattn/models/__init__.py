"""Hugging Face encoders with linear attention.

Importing this registers ``attn_implementation="fastattn_linear"`` with transformers, and lets its
``from_pretrained`` load linearised checkpoints.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    message = "fastattn.models needs transformers: pip install 'fastattn[models]'"
    raise ModuleNotFoundError(message, name="transformers") from error

from fastattn.models.checkpoint import load
from fastattn.models.conversion import linearize, restore
from fastattn.models.marks import NAME
from fastattn.models.positions import extend_positions

__all__ = ["NAME", "extend_positions", "linearize", "load", "restore"]
