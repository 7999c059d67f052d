"""fastattn: linear attention for the Transformer you have, near the limit of the machine.

Importing this costs little more than importing torch: what needs transformers is looked up when
it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastattn.ops import (
    LinearAttentionState,
    explain,
    feature_maps,
    linear_attention,
    linear_attention_step,
)

if TYPE_CHECKING:
    from fastattn.models import extend_positions, linearize, load, restore
    from fastattn.nn import LinearAttention
    from fastattn.theseus import Theseus

__version__ = "0.1.0"

__all__ = [
    "LinearAttention",
    "LinearAttentionState",
    "Theseus",
    "__version__",
    "explain",
    "extend_positions",
    "feature_maps",
    "linear_attention",
    "linear_attention_step",
    "linearize",
    "load",
    "restore",
]

_LAZY = {
    "LinearAttention": "fastattn.nn",
    "Theseus": "fastattn.theseus",
    "extend_positions": "fastattn.models",
    "linearize": "fastattn.models",
    "load": "fastattn.models",
    "restore": "fastattn.models",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
