"""A place in a model where one module stands in for one or several others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Replaceable(nn.Module):
    """Runs the predecessor, the successor, or a blend of both, as ``share`` says; in evaluation
    mode always the successor.

    The predecessor is frozen and has no dropout. All modules are called as transformers calls a
    layer or an attention module: hidden states first, in and out; what else is given goes to each
    of them, what else they return is taken from the last that ran.

    Attributes:
        share: of the successor, 0 to 1; only what it needs is run.
        matching: also compare: both run on the same input, and ``errors`` gets the successor's
            squared error relative to the variance of the predecessor's output.
        mask: (B, N), non-zero at tokens that count in ``errors``; None counts all.
    """

    def __init__(self, predecessor: Sequence[nn.Module], successor: nn.Module) -> None:
        super().__init__()
        self.predecessor = nn.ModuleList(predecessor).requires_grad_(False)
        self.successor = successor
        self.share = 1.0
        self.matching = False
        self.mask: Tensor | None = None
        self.errors: list[Tensor] = []
        self.train(self.training)

    def train(self, mode: bool = True) -> Replaceable:
        super().train(mode)
        self.predecessor.eval()
        return self

    # The choice is Python's: compiled, it would be a graph for each combination of gates.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.successor(hidden_states, *args, **kwargs)
        if self.matching:
            return self._match(hidden_states, *args, **kwargs)
        if self.share == 1.0:
            return self.successor(hidden_states, *args, **kwargs)
        old = self._predecessor(hidden_states, *args, **kwargs)
        if self.share == 0.0:
            return old
        return _blend(old, self.successor(hidden_states, *args, **kwargs), self.share)

    # As ``forward``, which only sees to itself: called from there it would be compiled on its own.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, unused-ignore]
    def _match(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.share < 1.0):
            old = self._predecessor(hidden_states, *args, **kwargs)
        # Where only the predecessor's output goes on, the comparison teaches this module alone.
        given = hidden_states.detach() if self.share == 0.0 else hidden_states
        new = self.successor(given, *args, **kwargs)
        target = _first(old).detach().float()
        self.errors.append(relative_error(_first(new).float(), target, self.mask))
        if self.share == 0.0:
            return old
        return new if self.share == 1.0 else _blend(old, new, self.share)

    def _predecessor(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output: Any = hidden_states
        for module in self.predecessor:
            output = module(_first(output), *args, **kwargs)
        return output


def relative_error(got: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over the target's variance across tokens, both (B, N, features)."""
    if mask is None:
        weight = torch.ones_like(target[..., :1])
    else:
        weight = (mask != 0).to(target.dtype)[..., None]
    mean = (target * weight).sum((0, 1)) / weight.sum().clamp_min(1)
    variance = ((target - mean).square() * weight).sum()
    return ((got - target).square() * weight).sum() / variance.clamp_min(1e-6)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _blend(old: Any, new: Any, share: float) -> Any:
    mixed = torch.lerp(_first(old), _first(new), share)
    return (mixed, *new[1:]) if isinstance(new, tuple) else mixed
