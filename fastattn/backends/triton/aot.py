"""Compiles the kernels ahead of time, for GPUs that need not be here, and reads what they cost.

``SHIPPED`` lists calls that stand for what users run; a call's plans say which kernels it takes and
with which constants, so what is compiled here is what a launch on that GPU would compile. Registers
and spills come from the binary: cuobjdump, which Triton's package brings, or AMD's metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastattn.backends.triton import plan as plans
from fastattn.backends.triton.launch import ALIGNMENT, INTERPRETED, Step
from fastattn.backends.triton.sizes import Target
from fastattn.ops.problem import Problem

KIB = 1024


@dataclass(frozen=True)
class Arch:
    """A GPU to compile for. ``shared``: bytes of shared memory that one program may have."""

    target: GPUTarget
    shared: int


ARCHS = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": Arch(GPUTarget("cuda", 86, 32), 99 * KIB),  # as sm_89 and sm_120
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


@dataclass(frozen=True)
class Call:
    """A call to compile for, forward and backward, or one step."""

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    feature_map: str = "elu"
    is_causal: bool = False
    passes: tuple[str, ...] = ("forward", "backward")

    @property
    def title(self) -> str:
        kind = "causal" if self.is_causal else "non-causal"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kind} {self.feature_map} {dtype} {self.head_dim}"

    def problem(self, length: int) -> Problem:
        is_step = self.passes == ("step",)
        return Problem(
            batch=1, num_heads=12, num_kv_heads=12, query_length=length, key_length=length,
            head_dim=self.head_dim, value_dim=self.head_dim, dtype=self.dtype, device_type="cuda",
            feature_map=self.feature_map, is_causal=self.is_causal, normalize=True, scale=1.0,
            eps=1e-6, has_key_mask=not self.is_causal, has_initial_state=is_step,
            return_state=is_step, needs_grad=not is_step,
        )  # fmt: skip


# Every head size in the type that models train in, both other types at the commonest sizes, and the
# maps whose derivatives need reductions.
SHIPPED = (
    *(Call(d, is_causal=c) for d in (32, 64, 128, 256) for c in (False, True)),
    *(Call(d, torch.float32, is_causal=c) for d in (64, 128) for c in (False, True)),
    *(Call(d, torch.float16, is_causal=c) for d in (64, 128) for c in (False, True)),
    *(Call(64, feature_map="softmax", is_causal=c) for c in (False, True)),
    Call(64, feature_map="cosine"),
    Call(64, feature_map="efficient"),
    *(Call(d, is_causal=True, passes=("step",)) for d in (64, 128)),
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one GPU. ``spilled``: bytes of stack per thread."""

    arch: str
    call: str
    kernel: str
    num_warps: int
    registers: int
    spilled: int
    shared: int


def steps_of(call: Call) -> Iterator[Step]:
    """Every kernel that a call can take: short, with few heads, with many."""
    seen = set()
    for length, multiprocessors in ((512, 1), (8192, 10**6), (8192, 1)):
        problem, target = call.problem(length), Target(multiprocessors, 8, "ieee")
        for name in call.passes:
            if name == "step":
                plan = plans.step(replace(problem, query_length=1, key_length=1), target)
            elif name == "forward":
                plan = plans.forward(problem, target)
            else:
                plan = plans.backward(problem, target, False)
            for step in plan.steps:
                key = (step.kernel.__name__, tuple(step.constants.items()))
                if key not in seen:
                    seen.add(key)
                    yield step


def compile_step(step: Step, dtype: torch.dtype, arch: str) -> Any:
    """The compiled kernel, for usual pointers (see launch.py), as a launch would compile it."""
    if INTERPRETED:
        raise RuntimeError("kernels can't be compiled while TRITON_INTERPRET is set")
    target = ARCHS[arch].target
    usual = [["tt.divisibility", ALIGNMENT]]
    if target.backend == "hip":
        usual.append(["tt.pointer_range", 32])  # bits
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(step.kernel.params):
        name = parameter.name
        if name in step.constants:
            signature[name] = "constexpr"
            constants[index,] = step.constants[name]
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        else:
            signature[name] = "*" + _element(name, dtype)
            attributes[index,] = usual
    source = ASTSource(step.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=step.options(target.warp_size))


def _element(name: str, dtype: torch.dtype) -> str:
    if name == "mask":
        return "i1"
    if name in ("cu", "cu_k"):
        return "i32"
    if name in ("query", "key", "value", "out") or name in (
        "grad_out",
        "grad_query",
        "grad_key",
        "grad_value",
    ):
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return "fp32"


def measure(call: Call, step: Step, arch: str) -> Compiled:
    compiled = compile_step(step, call.dtype, arch)
    usage = _amd_usage if ARCHS[arch].target.backend == "hip" else _nvidia_usage
    registers, spilled = usage(compiled)
    metadata = compiled.metadata
    return Compiled(
        arch, call.title, step.kernel.__name__, int(metadata.num_warps), registers, spilled,
        int(metadata.shared),
    )  # fmt: skip


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {done.stdout}{done.stderr}")
    return int(found[1]), int(found[2])


def _amd_usage(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    registers, scratch = (
        re.search(rf"\.{field}:\s+(\d+)", text)
        for field in ("vgpr_count", "private_segment_fixed_size")
    )
    if registers is None or scratch is None:
        raise RuntimeError("the assembly has no metadata of registers")
    return int(registers[1]), int(scratch[1])


def table(archs: tuple[str, ...] = tuple(ARCHS)) -> Iterator[Compiled]:
    """Every shipped kernel on every GPU, one after the other: seconds each, unless Triton's cache
    has it."""
    for call in SHIPPED:
        for step in steps_of(call):
            for arch in archs:
                yield measure(call, step, arch)
