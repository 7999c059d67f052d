"""The Triton backend: fused kernels for any GPU that Triton compiles for.

``backend.py`` answers the backend protocol, ``plan.py`` turns a Problem into launches with the
numbers of ``table.py``, ``launch.py`` starts them. The kernels: ``noncausal.py``, ``causal.py``,
``recurrent.py`` (forward and backward of each form side by side) over ``states.py`` (the state and
its sums), ``segments.py`` (how a call is cut) and ``tiles.py`` (loads, phi and its derivative,
stores). ``aot.py`` compiles all of it without a GPU. docs/triton.md explains the kernels.
"""

from __future__ import annotations

import triton

OLDEST = (3, 6)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"this is Triton {triton.__version__}")
try:
    from fastattn.backends.triton.backend import TritonBackend
except AttributeError as error:  # something of Triton's that has another name by now
    raise ImportError(f"this is Triton {triton.__version__}: {error}") from error

__all__ = ["TritonBackend"]
