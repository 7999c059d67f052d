"""Who takes part: ourselves, the alternatives a user has, and a yardstick.

A peer says whether it takes part in a case and, if so, gives a function of (query, key, value),
or for STEP of nothing. Peers that need a package not installed here say so and stay out.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import plain
from bench.cases import STEP, TRAIN, Case, Inputs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
CHUNKS = (64, 128)


@dataclass(frozen=True)
class Settings:
    """What a run may use."""

    device: torch.device
    backend: str = "auto"
    compile: bool = True


@dataclass(frozen=True)
class Peer:
    """``family``: what has to come out, "linear" or "softmax" attention, or "nothing" to check.

    ``why_not`` is None for a case that the peer takes part in, else the reason (an empty one where
    the case is simply not meant for it).
    """

    name: str
    title: str
    family: str
    why_not: Callable[[Case, Settings], str | None]
    attend: Callable[[Case, Inputs, Settings], Attend] | None = None
    step: Callable[[Case, Settings], Step] | None = None


# --- ourselves --------------------------------------------------------------------------------


def _ours(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    return partial(fastattn.linear_attention, is_causal=case.causal, backend=settings.backend)


def _our_step(case: Case, settings: Settings) -> Step:
    def step(query: Tensor, key: Tensor, value: Tensor, S: Tensor, z: Tensor) -> Tensor:
        return fastattn.linear_attention_step(query, key, value, (S, z), backend=settings.backend)

    return step


def _always(case: Case, settings: Settings) -> str | None:
    return None


def _only_16_bit(case: Case, settings: Settings) -> str | None:
    return "" if case.dtype == "float32" or case.pass_ == STEP else None


# --- plain PyTorch ----------------------------------------------------------------------------


def _plain(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    if not case.causal:
        return plain.noncausal
    candidates: list[Attend] = [partial(plain.causal, chunk=chunk) for chunk in CHUNKS]
    if case.length <= CHUNKS[0]:
        return candidates[0]
    return min(candidates, key=lambda attend: _try_out(attend, case, inputs))


def _try_out(attend: Attend, case: Case, inputs: Inputs) -> float:
    """Best of three calls of the pass that will be timed: the chunk is tuned for each case."""
    run = runner_of(attend, case, inputs)
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _compiled(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    # Compiled for these very sizes, which is faster than one graph for all lengths.
    torch._dynamo.reset()
    return torch.compile(_plain(case, inputs, settings), dynamic=False)


def _compiled_step(case: Case, settings: Settings) -> Step:
    torch._dynamo.reset()
    return torch.compile(plain.step, dynamic=False)


def _plain_step(case: Case, settings: Settings) -> Step:
    return plain.step


def _why_not_compiled(case: Case, settings: Settings) -> str | None:
    if not settings.compile:
        return "left out (--no-compile)"
    selected = case.group == "decode" or case.length in (128, 1024, 4096, 16384, 65536)
    return None if selected else ""


# --- softmax ----------------------------------------------------------------------------------


def _sdpa(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    return partial(F.scaled_dot_product_attention, is_causal=case.causal)


def _not_for_steps(case: Case, settings: Settings) -> str | None:
    return "" if case.pass_ == STEP else None


# --- fast-transformers (Katharopoulos et al.), C++ and float32 only ------------------------------


def _fast_transformers(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    from fast_transformers.causal_product import causal_dot_product

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = plain.phi(query), plain.phi(key)
        denominator = (query * key.cumsum(2)).sum(-1, keepdim=True).clamp_min(plain.EPS)
        out: Tensor = causal_dot_product(query, key, value.contiguous()) / denominator
        return out

    return attend


def _why_not_fast_transformers(case: Case, settings: Settings) -> str | None:
    if not case.causal or case.pass_ == STEP or case.dtype != "float32":
        return ""
    missing = importlib.util.find_spec("fast_transformers") is None
    return "pytorch-fast-transformers is not installed" if missing else None


# --- the yardstick of a step ---------------------------------------------------------------------


@torch.library.custom_op("fastattn_bench::empty", mutates_args=())
def _empty(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The least that an op written the documented way does: dispatch, and allocate its output."""
    return torch.empty_like(query)


def _empty_step(case: Case, settings: Settings) -> Step:
    return lambda query, key, value, S, z: _empty(query, key, value)


def _only_steps(case: Case, settings: Settings) -> str | None:
    return None if case.pass_ == STEP else ""


OURS = "fastattn"
OURS_FLOAT32 = "fastattn-float32"
PYTORCH, COMPILED, SDPA, EMPTY = "pytorch", "pytorch-compiled", "sdpa", "empty-op"

PEERS = (
    Peer(OURS, "fastattn", "linear", _always, _ours, _our_step),
    Peer(OURS_FLOAT32, "fastattn, float32", "linear", _only_16_bit, _ours),
    Peer(PYTORCH, "PyTorch", "linear", _always, _plain, _plain_step),
    Peer(COMPILED, "torch.compile", "linear", _why_not_compiled, _compiled, _compiled_step),
    Peer(
        "fast-transformers",
        "fast-transformers",
        "linear",
        _why_not_fast_transformers,
        _fast_transformers,
    ),
    Peer(SDPA, "SDPA (softmax)", "softmax", _not_for_steps, _sdpa),
    Peer(EMPTY, "empty custom op", "nothing", _only_steps, step=_empty_step),
)


# --- a pass ------------------------------------------------------------------------------------


def inputs_of(peer: Peer, inputs: Inputs) -> Inputs:
    """The tensors that a peer gets: those of the case, or the same numbers in float32."""
    if peer.name != OURS_FLOAT32:
        return inputs
    grad_out = None if inputs.grad_out is None else inputs.grad_out.float()
    return Inputs(inputs.query.float(), inputs.key.float(), inputs.value.float(), grad_out)


def runner_of(attend: Attend, case: Case, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """One pass as a function of nothing: out, or out and the three gradients."""
    if case.pass_ != TRAIN:
        query, key, value = inputs.query, inputs.key, inputs.value
        return lambda: (attend(query, key, value),)
    leaves = inputs.leaves()

    def train() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))

    return train


def step_runner_of(step: Step, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """One step onto a state of its own as a function of nothing."""
    assert inputs.S is not None and inputs.z is not None
    query, key, value, S, z = inputs.query, inputs.key, inputs.value, inputs.S, inputs.z
    S, z = S.clone(), z.clone()

    def run() -> tuple[Tensor, ...]:
        return step(query, key, value, S, z), S, z

    return run
