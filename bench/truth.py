"""What has to come out, in float64, and how far off a contestant may be.

The truth is the plain PyTorch formula, not fastattn's own reference, so that a mistake of ours
can't agree with itself. Only results that pass are timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench import plain
from bench.cases import STEP, Case, Inputs
from bench.peers import Peer, runner_of

# Relative error ||x - truth|| / ||truth|| of the worst tensor: the output and each gradient. Loose
# enough for every honest implementation, far too tight for a wrong one.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
SOFTMAX_TOKENS = 1024  # softmax is checked on so many tokens: its truth costs N^2 memory
_CHUNK = 64


def tokens_to_check(peer: Peer, case: Case) -> int:
    """The whole case, except for softmax."""
    return min(case.length, SOFTMAX_TOKENS) if peer.family == "softmax" else case.length


def truth(family: str, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results of one pass in float64, in the order in which ``runner_of`` gives them."""
    query, key, value = inputs.query.double(), inputs.key.double(), inputs.value.double()
    if case.pass_ == STEP:
        assert inputs.S is not None and inputs.z is not None
        return _step(query, key, value, inputs.S.double(), inputs.z.double())
    grad_out = None if inputs.grad_out is None else inputs.grad_out.double()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if family == "softmax":
            return plain.softmax(query, key, value, case.causal)
        if case.causal:
            return plain.causal(query, key, value, _CHUNK)
        return plain.noncausal(query, key, value)

    return runner_of(attend, case, Inputs(query, key, value, grad_out))()


def _step(query: Tensor, key: Tensor, value: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    query, key = plain.phi(query), plain.phi(key)
    S = S + key.transpose(-1, -2) @ value
    z = z + key.squeeze(2)
    return (query @ S) / (query @ z.unsqueeze(-1)), S, z


def error(results: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The worst relative error of any tensor; NaN counts as infinitely wrong."""
    worst = 0.0
    for result, reference in zip(results, wanted, strict=True):
        difference = torch.linalg.vector_norm(result.double() - reference)
        relative = float(difference / torch.linalg.vector_norm(reference))
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst
