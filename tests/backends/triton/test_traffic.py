"""Bytes that the kernels move, counted as Triton's interpreter runs them, against the budgets."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("rich", reason="rich, which bench/ prints with, is not installed")

from bench import traffic
from fastattn.backends.triton import launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("call", traffic.CALLS, ids=lambda call: call.title)
def test_bytes(call: traffic.Call) -> None:
    measured = traffic.measure(call)
    least = (8, 14)  # every input once, every output once
    for counted, budget, minimum in zip(measured, call.budget, least, strict=True):
        tokens = traffic.in_head_sizes(counted.tokens.moved, call)
        assert minimum <= tokens <= budget
        assert tokens <= traffic.in_head_sizes(counted.tokens.asked, call) <= budget + 5
        assert traffic.in_head_sizes(counted.states.moved, call) <= traffic.STATES


def test_launches_of_short_sequences() -> None:
    forward, backward = traffic.measure(traffic.Call(False, 512, 16, traffic.FEW, (8, 14)))
    assert forward.kernels == ["forward_of_head"]
    assert backward.kernels == ["backward_of_head"]


def test_launches_of_long_sequences() -> None:
    for is_causal, multiprocessors, kernels in (
        (False, traffic.MANY, "sum_keys emit_queries | backward_queries fold backward_keys"),
        (False, traffic.FEW, "sum_keys fold emit_queries | backward_queries fold backward_keys"),
        (True, traffic.MANY, "forward | backward"),
        (True, traffic.FEW, "sum_keys fold forward | backward_segments fold backward_keys"),
    ):
        call = traffic.Call(is_causal, 513, 16, multiprocessors, (0, 0))
        passes = traffic.measure(call)
        assert " | ".join(" ".join(counted.kernels) for counted in passes) == kernels


def test_counts_what_is_read_again() -> None:
    """A segment that is larger than the cache comes from memory twice."""
    call = traffic.Call(True, 600, 16, traffic.MANY, (0, 0))
    _, backward = traffic.measure(call)
    assert traffic.in_head_sizes(backward.tokens.asked, call) == 22
    assert traffic.in_head_sizes(backward.tokens.moved, call) == 14
