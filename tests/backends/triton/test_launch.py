"""The way from a call to started kernels, as on a GPU and without one: compiled for sm_90, started
on a driver that only writes down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastattn.backends import Inputs, Outputs
from fastattn.backends.triton.backend import TritonBackend
from fastattn.backends.triton.launch import INTERPRETED
from fastattn.ops.problem import Problem
from tests.backends.triton.fake_gpu import FakeGPU, Launch, fake_gpu

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")

BACKEND = TritonBackend()
TRAIN = Problem(
    batch=1, num_heads=2, num_kv_heads=2, query_length=70, key_length=70, head_dim=16, value_dim=16,
    dtype=torch.bfloat16, device_type="cuda", feature_map="elu", is_causal=False, normalize=True,
    scale=1.0, eps=1e-6, needs_grad=True,
)  # fmt: skip
STEP = replace(
    TRAIN, query_length=1, key_length=1, is_causal=True, needs_grad=False, has_initial_state=True,
    return_state=True,
)  # fmt: skip


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with fake_gpu() as gpu:
        yield gpu


def of_length(problem: Problem, length: int) -> Problem:
    return replace(problem, query_length=length, key_length=length)


def draw(problem: Problem, offset: int = 0) -> Inputs:
    """Inputs whose memory starts so many elements after an aligned address."""
    shape = (problem.batch, problem.query_length, problem.num_heads, problem.head_dim)
    size = torch.Size(shape).numel()
    memory = torch.zeros(3, size + 64, dtype=problem.dtype)
    q, k, v = (row[offset : offset + size].view(shape).transpose(1, 2) for row in memory)
    if not problem.has_initial_state:
        return Inputs(q, k, v)
    S = torch.zeros(problem.state_batch, problem.num_kv_heads, 16, 16)
    return Inputs(q, k, v, initial_S=S, initial_z=S[..., 0].contiguous())


def call(gpu: FakeGPU, problem: Problem, inputs: Inputs) -> list[Launch]:
    """What a call starts, forward and backward, or one step."""
    gpu.launches.clear()
    if problem.has_initial_state:
        BACKEND.step(problem, inputs)
    else:
        made: Outputs = BACKEND.forward(problem, inputs)
        BACKEND.backward(problem, inputs, made.saved, torch.ones_like(made.out), None, None)
    return list(gpu.launches)


@pytest.mark.parametrize(
    "problem",
    [TRAIN, replace(of_length(TRAIN, 1100), is_causal=True), STEP],
    ids=["full", "causal", "step"],
)
def test_every_call_starts_the_same(gpu: FakeGPU, problem: Problem) -> None:
    """The first through Triton, the others directly: with the same grids and arguments, but for the
    addresses of what a call allocates."""
    inputs = draw(problem)
    first, second, third = (call(gpu, problem, inputs) for _ in range(3))
    assert first
    for one, *others in zip(first, second, third, strict=True):
        for other in others:
            assert other[:3] == one[:3]
            for a, b in zip(one.arguments, other.arguments, strict=True):
                are_addresses = all(isinstance(x, int) and x > 2**32 for x in (a, b))
                assert are_addresses or a == b
    addresses = {x.data_ptr() for x in inputs if x is not None}
    assert addresses <= {x for launch in third for x in launch.arguments}


def test_a_new_length_compiles_nothing(gpu: FakeGPU) -> None:
    call(gpu, TRAIN, draw(TRAIN))
    loaded = gpu.loaded
    for length in (1, 16, 64, 257, 512):
        problem = of_length(TRAIN, length)
        # Another plan, which asks Triton once; then again, directly.
        for _ in range(2):
            assert call(gpu, problem, draw(problem))
    assert gpu.loaded == loaded


def test_unaligned_memory_takes_a_kernel_of_its_own(gpu: FakeGPU) -> None:
    """Which is not kept for calls on aligned memory, nor the other way round."""
    aligned, shifted = draw(TRAIN), draw(TRAIN, offset=1)
    kernels = [
        [launch.function for launch in call(gpu, TRAIN, inputs)]
        for inputs in (aligned, shifted, aligned, shifted, aligned)
    ]
    assert kernels[0] == kernels[2] == kernels[4]
    assert kernels[1] == kernels[3]
    assert not set(kernels[0]) & set(kernels[1])
