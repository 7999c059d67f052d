"""Ahead of time, for GPUs that are not here: shipped kernels compile, fit and hardly spill."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("kernels can't be compiled while they are interpreted", allow_module_level=True)

from fastattn.backends.triton import aot, launch, plan, sizes

# Bytes of stack per thread by head size: what a kernel may spill. Triton 3.6 spills more.
MOST_SPILLED = {32: 0, 64: 0, 128: 232, 256: 256}
if version("triton").startswith("3.6."):
    MOST_SPILLED = {32: 0, 64: 24, 128: 304, 256: 416}


# All of it takes eight minutes of one core where nothing is cached. Every call for the GPU with the
# least shared memory of NVIDIA's, and the commonest calls for all others, take a third of that.
COMMON = (aot.Call(64), aot.Call(64, is_causal=True))
WHOLE = "FASTATTN_TEST_KERNELS" in os.environ
ROWS = [
    (call, arch)
    for call in aot.SHIPPED
    for arch in aot.ARCHS
    if WHOLE or arch == "sm_86" or call in COMMON
]


@pytest.mark.parametrize(
    "call, arch", ROWS, ids=[f"{call.title} {call.passes[0]}-{arch}" for call, arch in ROWS]
)
def test_every_shipped_kernel(call: aot.Call, arch: str) -> None:
    wrong = []
    for step in aot.steps_of(call):
        measured = aot.measure(call, step, arch)
        assert measured.registers > 0
        if measured.shared > aot.ARCHS[arch].shared:
            wrong.append(f"{measured.kernel}: {measured.shared} bytes of shared memory")
        if measured.spilled > MOST_SPILLED[call.head_dim]:
            wrong.append(f"{measured.kernel}: {measured.spilled} bytes spilled")
    assert not wrong


def test_every_kernel_is_shipped() -> None:
    """No kernel that a plan can start is missing from what is compiled."""
    from fastattn.backends.triton import causal, noncausal, recurrent, states

    modules = (causal, noncausal, recurrent, states)
    declared = {
        name
        for module in modules
        for name, value in vars(module).items()
        if getattr(value, "do_not_specialize", None) and value.fn.__module__ == module.__name__
    }
    assert declared == {step.kernel.__name__ for call in aot.SHIPPED for step in aot.steps_of(call)}


def test_a_new_length_compiles_nothing() -> None:
    """Constants of a kernel hold no length: two lengths of a kind take the very same kernels."""
    one, other = (
        [(step.kernel, step.constants) for step in made.steps]
        for length in (5000, 7777)
        for made in [plan.forward(aot.Call(64).problem(length), aot.Target(132, 8, "ieee"))]
    )
    assert one == other


def test_amd_takes_half_as_many_warps_of_twice_as_many_threads() -> None:
    step = next(aot.steps_of(aot.Call(64)))
    assert step.options(64)["num_warps"] * 64 == step.options(32)["num_warps"] * 32
    if torch.version.hip is None:
        assert launch.warp_size() == 32


def test_float16_is_not_multiplied_in_float16() -> None:
    """Its sums and do / den leave its range."""
    assert sizes.operand_dtype(torch.float16) == sizes.operand_dtype(torch.float32)
