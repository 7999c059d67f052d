"""explain(): which backend and kernel a call takes, and why not the others."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from fastattn import backends, explain, linear_attention
from fastattn.ops.problem import Problem
from tests.conftest import require_backend


def test_names_the_choice_and_everybody_elses_reason() -> None:
    require_backend("cpu")
    x = torch.randn(2, 4, 100, 64, requires_grad=True)
    explanation = explain(x, x, x, is_causal=True)
    assert explanation.backend == "cpu"
    assert explanation.kernel
    assert [candidate.backend for candidate in explanation.candidates] == backends.names()
    text = str(explanation)
    assert "causal, elu, float32 on cpu: batch 2, heads 4, tokens 100, sizes 64 and 64" in text
    assert "gradients" in text
    lines = text.splitlines()
    assert any(line.startswith("cpu") and line.endswith("<- chosen") for line in lines)
    assert any(line.startswith("reference") and "quadratic" in line for line in lines)


def test_a_named_backend() -> None:
    x = torch.randn(1, 1, 4, 4)
    assert explain(x, x, x, backend="reference", form="recurrent").kernel == "recurrent"


def test_a_backend_that_cannot_gives_its_reason() -> None:
    x = torch.randn(1, 1, 4, 4, device="meta")
    explanation = explain(x, x, x, backend="cpu")
    assert explanation.backend is None
    assert explanation.kernel is None
    assert "'meta'" in (explanation.candidates[0].why_not or "")
    assert "chosen" not in str(explanation)


def test_takes_a_problem() -> None:
    x = torch.randn(1, 2, 30, 8)
    problem = explain(x, x, x).problem
    assert explain(problem) == explain(x, x, x)
    on_gpu = explain(dataclasses.replace(problem, device_type="cuda"))
    assert on_gpu.backend != "cpu"


def test_refuses_what_the_call_refuses() -> None:
    x = torch.randn(1, 2, 30, 8)
    with pytest.raises(ValueError, match="eps must be at least 1e-30"):
        explain(x, x, x, eps=-1)
    with pytest.raises(
        ValueError, match="cu_seqlens must start at 0 and end at .* 30; got 0 and 99"
    ):
        explain(x[:1], x[:1], x[:1], cu_seqlens=torch.tensor([0, 99], dtype=torch.int32))
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*; got 'fpga'"):
        explain(explain(x, x, x).problem, backend="fpga")
    for wrong in (lambda: explain(), lambda: explain(x, x, x, foo=1)):
        with pytest.raises(TypeError, match="explain takes what linear_attention takes"):
            wrong()


def test_computes_nothing() -> None:
    x = torch.full((1, 2, 30, 8), torch.nan)
    assert isinstance(explain(x, x, x).problem, Problem)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native library had not been built."""
    load = backends.load
    missing = "the native library is not built: No module named 'fastattn._native'"
    monkeypatch.setattr(backends, "load", lambda name: missing if name == "cpu" else load(name))
    backends._choose.cache_clear()
    backends._warn_once.cache_clear()
    yield
    backends._choose.cache_clear()


def test_falling_back_to_the_reference_warns_once(without_native: None) -> None:
    x = torch.randn(1, 2, 31, 8)
    with pytest.warns(UserWarning, match=r"slow reference backend.*native library is not built"):
        linear_attention(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_attention(x, x, x)
        linear_attention(x[:, :, 1:], x, x)
    assert "not built" in str(explain(x, x, x))
    with pytest.raises(ValueError, match=r"backend='cpu' cannot .*not built"):
        linear_attention(x, x, x, backend="cpu")


class Pretended:
    """A backend of a machine that this one is not."""

    def __init__(self, name: str, largest: int) -> None:
        self.name, self.largest = name, largest

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":
            return "its kernels run on GPUs"
        return None if problem.head_dim <= self.largest else f"head sizes go up to {self.largest}"

    def kernel(self, problem: Problem) -> str:
        return "a kernel"


@pytest.mark.parametrize(
    ("triton", "cuda", "chosen"),
    [
        (256, 128, "triton"),
        (256, None, "triton"),
        (None, 128, "cuda"),
        (32, 128, "cuda"),
        (32, 32, "reference"),
        (None, None, "reference"),
    ],
)
def test_what_auto_takes_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, triton: int | None, cuda: int | None, chosen: str
) -> None:
    """Triton first, CUDA where it is missing (None) or refuses the head size, never in silence the
    reference."""
    load = backends.load
    found = {
        name: f"{name} is missing" if largest is None else Pretended(name, largest)
        for name, largest in (("triton", triton), ("cuda", cuda))
    }
    monkeypatch.setattr(backends, "load", lambda name: found.get(name) or load(name))
    x = torch.randn(1, 2, 30, 64)
    problem = dataclasses.replace(explain(x, x, x).problem, device_type="cuda")
    explanation = explain(problem)
    assert explanation.backend == chosen
    lines = str(explanation).splitlines()
    assert next(line for line in lines if line.endswith("<- chosen")).startswith(chosen)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        backends._warn_once.cache_clear()
        taken = backends._choose.__wrapped__(problem, "auto")
    assert taken.name == chosen
    assert len(told) == (chosen == "reference")


def test_a_cpu_never_takes_the_cuda_kernels() -> None:
    x = torch.randn(1, 2, 30, 64)
    cuda = next(c for c in explain(x, x, x).candidates if c.backend == "cuda")
    assert cuda.why_not
