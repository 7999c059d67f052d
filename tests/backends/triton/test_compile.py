"""Ahead of time, for GPUs that are not here: shipped kernels compile, fit and hardly spill."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("kernels can't be compiled while they are interpreted", allow_module_level=True)

from fastattn.backends.triton import aot

# Bytes of stack per thread on NVIDIA's GPUs, by features padded to a power of two. Beyond that
# value tiles are launched one after another, and spills are the smaller cost: no bound.
MOST_SPILLED = {32: 0, 64: 0, 128: 512}

# A full table takes minutes: these are its commonest rows, one GPU each, and `slow` has the rest.
COMMON = [
    aot.Call(64),
    aot.Call(64, is_causal=True),
    aot.Call(64, is_causal=True, passes=("step",)),
]


def check(call: aot.Call, arch: str) -> None:
    wrong = []
    for step in aot.steps_of(call):
        block_f = step.constants.get("BLOCK_F", 64)
        bound = MOST_SPILLED.get(block_f, 2**20)
        measured = aot.measure(call, step, arch)
        assert measured.registers > 0
        if measured.shared > aot.ARCHS[arch].shared:
            wrong.append(f"{measured.kernel}: {measured.shared} bytes of shared memory")
        if aot.ARCHS[arch].target.backend == "cuda" and measured.spilled > bound:
            wrong.append(f"{measured.kernel}: {measured.spilled} bytes spilled")
    assert not wrong


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("call", COMMON, ids=lambda call: call.title)
def test_common_kernels(call: aot.Call, arch: str) -> None:
    check(call, arch)


@pytest.mark.skipif(
    "FASTATTN_TEST_KERNELS" not in os.environ,
    reason="minutes of compiling: set FASTATTN_TEST_KERNELS=1",
)
@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("call", aot.SHIPPED, ids=lambda call: call.title)
def test_every_shipped_kernel(call: aot.Call, arch: str) -> None:
    check(call, arch)


def test_a_new_length_compiles_nothing() -> None:
    """Constants of a kernel hold no length: two lengths of a kind take the very same kernels."""
    one, other = (
        [(step.kernel, step.constants) for step in plan.steps]
        for length in (5000, 7777)
        for plan in [
            aot.plans.forward(aot.Call(64).problem(length), aot.Target(132, 8, "ieee")),
        ]
    )
    assert one == other


def test_float16_is_not_multiplied_in_float16() -> None:
    """Its sums and do / den leave its range."""
    operand = aot.plans.operand_dtype(torch.float16)
    assert operand == aot.plans.operand_dtype(torch.float32)
