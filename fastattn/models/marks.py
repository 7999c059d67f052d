"""What says that a model is linear: one name, one field of its configuration, one attribute of each
attention module. They stand here so that all parts of this package can ask without a circle."""

from __future__ import annotations

from typing import Any

NAME = "fastattn_linear"  # the attn_implementation
FIELD = "fastattn"  # of the configuration: what linearize was asked for
MARK = "fastattn_feature_map"  # of an attention module: its map's name; None: it keeps softmax


def is_linear(config: Any) -> bool:
    """Whether a model with this configuration was linearised."""
    return getattr(config, FIELD, None) is not None
