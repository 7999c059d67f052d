"""What fastattn promises on a CPU, checked against the numbers of the very same run.

Each floor is a ratio that has to be reached. Beside it stands what would be reached by a kernel
that ran at this machine's measured limit: where that is below the floor, no kernel can pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench import peers
from bench.cases import FORWARD, STEP, TRAIN, Case

N = 4096
_MEMORY_SLACK = 1.10


@dataclass(frozen=True)
class Floor:
    """One promise. ``value`` is None where it couldn't be measured; ``at_limit`` where a limit
    says nothing about it."""

    text: str
    value: float | None
    wanted: float
    at_least: bool = True
    at_limit: float | None = None
    unit: str = "x"

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted


def check(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All floors as plain data for the JSON, from the cases and memory figures of a run."""
    cases = {case["name"]: case for case in result["cases"]}
    floors = [*_speed(cases), *_share(cases, result["limits"]), *_small(cases), *_bf16(cases)]
    floors += [*_step(cases), *_memory(result["memory"])]
    return [{**asdict(floor), "passed": floor.passed} for floor in floors]


def seconds(case: dict[str, Any] | None, peer: str = peers.OURS) -> float | None:
    """A contestant's median in a case of the JSON, if it was timed."""
    if case is None:
        return None
    value = case["contestants"].get(peer, {}).get("seconds")
    return None if value is None else float(value)


def ratio(case: dict[str, Any] | None, peer: str, ours: str = peers.OURS) -> float | None:
    """How many times as long as ours the peer takes."""
    theirs, own = seconds(case, peer), seconds(case, ours)
    return None if theirs is None or own is None else theirs / own


def _kind(causal: bool) -> str:
    return "causal" if causal else "non-causal"


def _against(case: Case, cases: dict[str, Any], peer: str, wanted: float, what: str) -> Floor:
    found = cases.get(case.name)
    theirs = seconds(found, peer)
    at_limit = theirs / found["limit_seconds"] if found and theirs else None
    text = f"{what}, N={case.length}, {_kind(case.causal)}: against {_TITLES[peer]}"
    return Floor(text, ratio(found, peer), wanted, at_limit=at_limit)


_TITLES = {peer.name: peer.title for peer in peers.PEERS}


def _speed(cases: dict[str, Any]) -> list[Floor]:
    floors = []
    for causal in (False, True):
        case = Case("long", 1, N, FORWARD, causal)
        floors.append(_against(case, cases, peers.PYTORCH, 8, "forward"))
    floors.append(_against(Case("long", 1, N), cases, peers.SDPA, 50, "forward"))
    for causal in (False, True):
        case = Case("long", 1, N, TRAIN, causal)
        floors.append(_against(case, cases, peers.PYTORCH, 5, "forward and backward"))
    return floors


def _share(cases: dict[str, Any], limits: dict[str, Any]) -> list[Floor]:
    floors = []
    for causal in (False, True):
        case = Case("long", 1, N, FORWARD, causal)
        own = seconds(cases.get(case.name))
        share = None if own is None else case.flops / own / (limits["gflops"] * 1e9)
        text = f"forward, N={N}, {_kind(causal)}: share of the FMA peak"
        floors.append(Floor(text, share, 0.45, unit="%"))
    return floors


def _small(cases: dict[str, Any]) -> list[Floor]:
    what = {FORWARD: "forward", TRAIN: "forward and backward"}
    return [
        _against(Case("long", 1, 128, pass_, causal), cases, peers.PYTORCH, 1, what[pass_])
        for pass_ in (FORWARD, TRAIN)
        for causal in (False, True)
    ]


def _bf16(cases: dict[str, Any]) -> list[Floor]:
    floors = []
    for causal in (False, True):
        found = cases.get(Case("long", 1, N, FORWARD, causal, "bfloat16").name)
        text = f"forward, N={N}, {_kind(causal)}: bfloat16 against float32"
        floors.append(Floor(text, ratio(found, peers.OURS_FLOAT32), 1.3))
    return floors


def _step(cases: dict[str, Any]) -> list[Floor]:
    found = cases.get(Case("decode", 1, 1, STEP, True).name)
    own, empty = seconds(found), seconds(found, peers.EMPTY)
    times = None if own is None or empty is None else own / empty
    return [Floor("decode step, B=1: times an empty custom op", times, 3, at_least=False)]


def _memory(figures: list[dict[str, Any]]) -> list[Floor]:
    floors = []
    for figure in figures:
        if figure["peer"] != peers.OURS:
            continue
        used = figure.get("peak_bytes")
        times = None if used is None else used / figure["needed_bytes"]
        kind = "non-causal" if "non-causal" in figure["name"] else "causal"
        text = f"forward and backward, N=65536, {kind}: peak memory over inputs, output, gradients"
        floors.append(Floor(text, times, _MEMORY_SLACK, at_least=False))
    return floors
