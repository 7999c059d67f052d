"""How it is measured: first whether it is right, then, taking turns, how long it takes.

All contestants of a case run in turns (A B C A B C ...), so that whatever else the machine does
hits all of them; each time is the median of many turns. A contestant that computes something else
is reported as wrong and never timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import truth
from bench.cases import STEP, TRAIN, Case, Inputs, make_inputs
from bench.limits import Limits
from bench.peers import PEERS, Peer, Settings, inputs_of, runner_of, step_runner_of

Run = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Effort:
    """How long to measure. Each contestant runs for ``seconds`` of a case, at least ``min_turns``
    and at most ``max_turns`` times; a turn repeats short calls for ``turn_seconds``. One whose
    call would take longer than ``max_call_seconds`` stays out."""

    seconds: float = 1.0
    min_turns: int = 5
    max_turns: int = 60
    turn_seconds: float = 2e-3
    max_call_seconds: float = 4.0


QUICK = Effort(seconds=0.3, min_turns=3, max_turns=30, max_call_seconds=0.8)


@dataclass
class Contestant:
    """One peer in one case: ``status`` is "timed", "wrong", "failed" or "left out"."""

    peer: Peer
    status: str = "timed"
    reason: str = ""
    error: float | None = None
    samples: list[float] = field(default_factory=list)
    run: Run | None = None
    repeats: int = 1
    spent: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        result: dict[str, Any] = {"status": self.status}
        if self.reason:
            result["reason"] = self.reason
        if self.error is not None:
            result["error"] = self.error
        if self.samples:
            ordered = sorted(self.samples)
            result["seconds"] = statistics.median(ordered)
            result["best"] = ordered[0]
            result["quartiles"] = [ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]]
            result["turns"] = len(ordered)
        return result


def measure(case: Case, settings: Settings, effort: Effort, limits: Limits) -> dict[str, Any]:
    """One case with all its contestants, as plain data for the JSON."""
    inputs = make_inputs(case, settings.device)
    contestants = []
    wanted: dict[tuple[str, int], tuple[torch.Tensor, ...]] = {}
    with torch.set_grad_enabled(case.pass_ == TRAIN):
        for peer in PEERS:
            reason = peer.why_not(case, settings)
            if reason is None:
                reason = _too_slow(peer, case, effort, limits)
            if reason is None:
                contestants.append(_prepare(peer, case, inputs, settings, wanted))
            elif reason:
                contestants.append(Contestant(peer, "left out", reason))
        wanted.clear()
        _take_turns([c for c in contestants if c.run is not None], effort)
    return {
        "name": case.name,
        "group": case.group,
        "pass": case.pass_,
        "causal": case.causal,
        "dtype": case.dtype,
        "batch": case.batch,
        "heads": case.heads,
        "length": case.length,
        "head_dim": case.head_dim,
        "flops": case.flops,
        "bytes": case.bytes,
        "limit_seconds": limits.seconds(case),
        "contestants": {c.peer.name: c.as_dict() for c in contestants},
    }


def _too_slow(peer: Peer, case: Case, effort: Effort, limits: Limits) -> str | None:
    if peer.family != "softmax":
        return None
    flops = 4.0 * case.batch * case.heads * case.length**2 * case.head_dim
    flops *= (3.5 if case.pass_ == TRAIN else 1) * (0.5 if case.causal else 1)
    seconds = flops / (0.5 * limits.gflops * 1e9)
    if seconds <= effort.max_call_seconds:
        return None
    return f"one call would take about {seconds:.0f} s"


def _prepare(
    peer: Peer,
    case: Case,
    inputs: Inputs,
    settings: Settings,
    wanted: dict[tuple[str, int], tuple[torch.Tensor, ...]],
) -> Contestant:
    """Checks one contestant and makes it ready. ``wanted`` keeps truths for the others."""
    contestant = Contestant(peer)
    own = inputs_of(peer, inputs)
    try:
        if case.pass_ == STEP:
            assert peer.step is not None
            step = peer.step(case, settings)
            first, contestant.run = step_runner_of(step, own), step_runner_of(step, own)
        else:
            assert peer.attend is not None
            attend = peer.attend(case, own, settings)
            contestant.run = runner_of(attend, case, own)
            tokens = truth.tokens_to_check(peer, case)
            short = case.length > tokens
            first = runner_of(attend, case, own.first(tokens)) if short else contestant.run
        if peer.family != "nothing":
            tokens = truth.tokens_to_check(peer, case)
            key = (peer.family, tokens)
            if key not in wanted:
                of = inputs.first(tokens) if case.pass_ != STEP else inputs
                wanted[key] = truth.truth(peer.family, case, of)
            contestant.error = truth.error(first(), wanted[key])
            if not contestant.error <= truth.TOLERANCE[case.dtype]:
                contestant.status, contestant.run = "wrong", None
                contestant.reason = f"relative error {contestant.error:.1e}"
                return contestant
        _warm_up(contestant)
    except Exception as error:  # a peer that breaks is a result, and must not end the run
        contestant.status, contestant.run = "failed", None
        contestant.reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return contestant


def _warm_up(contestant: Contestant) -> None:
    run = contestant.run
    assert run is not None
    run()
    start = time.perf_counter()
    run()
    contestant.spent = time.perf_counter() - start


def _take_turns(contestants: list[Contestant], effort: Effort) -> None:
    for contestant in contestants:
        contestant.repeats = max(1, round(effort.turn_seconds / max(contestant.spent, 1e-7)))
        contestant.spent = 0.0
    waiting = list(contestants)
    with _no_garbage_collection():
        while waiting:
            for contestant in waiting:
                _turn(contestant)
            waiting = [c for c in waiting if not _done(c, effort)]


def _turn(contestant: Contestant) -> None:
    run, repeats = contestant.run, contestant.repeats
    assert run is not None
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    seconds = time.perf_counter() - start
    contestant.samples.append(seconds / repeats)
    contestant.spent += seconds


def _done(contestant: Contestant, effort: Effort) -> bool:
    turns = len(contestant.samples)
    if turns >= effort.max_turns:
        return True
    return turns >= effort.min_turns and contestant.spent >= effort.seconds


@contextmanager
def _no_garbage_collection():  # type: ignore[no-untyped-def]
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
