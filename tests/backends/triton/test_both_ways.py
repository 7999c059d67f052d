"""Whole sequences a program, or segments shared out: the same bits, and both right."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastattn.backends.triton import backend, launch
from tests.ops.problems import Case, assert_accurate, draw, run, truth

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_few_and_many_heads(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    call = draw(Case(1, 2, 1030, 16, is_causal=is_causal, initial_state=True, return_state=True))
    results = []
    for multiprocessors in (1, 10**6):
        monkeypatch.setattr(backend, "_multiprocessors", lambda *_, n=multiprocessors: n)
        results.append(run(call, "triton"))
    assert_accurate(results[0], truth(call))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
