"""The draw that decides which modules are replaced in one forward pass."""

from __future__ import annotations

import random


def draw(seed: int, forward: int, modules: int, rate: float) -> tuple[bool, ...]:
    """One Bernoulli(rate) gate a module; True runs the successor.

    A function of its arguments alone: the same on every rank, after a resume, and whatever else
    draws random numbers. (The string is hashed, so neighbouring passes have unrelated draws; a
    module's gate at a lower rate opens only where it does at a higher one.)
    """
    stream = random.Random(f"theseus {seed} {forward}")
    return tuple(stream.random() < rate for _ in range(modules))
