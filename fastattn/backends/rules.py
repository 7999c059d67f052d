"""Which backend ``backend="auto"`` tries first: a static table, from measurements alone.

A rule for a kind of call is a line in ``RULES``; the first that fits counts. No GPU timed the CUDA
kernels yet, so Triton stands before them, and they stand in where Triton is missing or refuses.
A rule that looks at a call's length makes torch.compile compile once for each of its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastattn.ops.problem import Problem


class Rule(NamedTuple):
    """For the calls that it fits: the backends in the order in which they are tried."""

    fits: Callable[[Problem], bool]
    order: tuple[str, ...]


RULES = (
    Rule(lambda p: p.device_type == "cpu", ("cpu", "triton", "reference")),
    # On GPUs of any kind.
    Rule(lambda p: True, ("triton", "cuda", "reference")),
)


def order(problem: Problem) -> tuple[str, ...]:
    """The backends that "auto" tries for a problem, best first."""
    return next(rule.order for rule in RULES if rule.fits(problem))
