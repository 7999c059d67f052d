"""What says that a model is linear: one name, one field of its configuration, one attribute of each
attention module, and in decoders hooks. They stand here so that all parts of this package can ask
without a circle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

NAME = "fastattn_linear"  # the attn_implementation
FIELD = "fastattn"  # of the configuration: what linearize was asked for
MARK = "fastattn_feature_map"  # of an attention module: its map's name; None: it keeps softmax
HOOK = "fastattn_hook"  # of a module with a hook of ours: its handle


def is_linear(config: Any) -> bool:
    """Whether a model with this configuration was linearised."""
    return getattr(config, FIELD, None) is not None


def add_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Have ``hook(module, args, kwargs)`` run before ``module``."""
    if not hasattr(module, HOOK):
        setattr(module, HOOK, module.register_forward_pre_hook(hook, with_kwargs=True))


def remove_hook(module: nn.Module) -> None:
    if hasattr(module, HOOK):
        getattr(module, HOOK).remove()
        delattr(module, HOOK)
