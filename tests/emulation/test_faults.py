"""The emulator bites: faults planted into the CUDA sources, each of which it must report.

A fault is an edit of a line or two. It is compiled into one object, and the call that runs into it
must fail with a sentence that names the kernel, the block, the thread and what went wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fastattn.backends import Inputs
from fastattn.ops.attention import op_arguments
from fastattn.ops.pose import problem_of, split_arguments
from tests.emulation import build
from tests.emulation.backend import EmulatedBackend
from tests.ops.problems import Case, arguments, draw, error, truth


@dataclass(frozen=True)
class Fault:
    file: str
    text: str
    replacement: str
    report: str
    case: Case
    form: str = "causal"
    width: int = 0  # of the kernels that the case takes


CAUSAL = Case(1, 1, 70, 16, is_causal=True)
FULL = Case(1, 1, 70, 16)
FEW = Case(1, 1, 3, 16, is_causal=True)  # the recurrent form
SUM = "x += __shfl_xor_sync(0xffffffffu, x, lanes);\n  return x;"
LOAD_A = (
    "load(a, row + g + 8, k + t, f.high[1], f.low[1]);\n"
    "    load(a, row + g, k + t + 4, f.high[2], f.low[2]);"
)
LOAD_CHUNK = (
    "    wait_for_copies();\n    __syncthreads();\n"
    "    keys_to_features(c, phi, s, token, valid, active, t.stage_k, {}, t.phi, t.inverse_norm);"
)

FAULTS = {
    "missing barrier": Fault(
        "causal.cu",
        "multiply_lower<C>(active, t.phi_q, t.phi, n.feature_width, t.scores);\n"
        "    __syncthreads();",
        "multiply_lower<C>(active, t.phi_q, t.phi, n.feature_width, t.scores);",
        r"kernel causal_forward .*(a race: thread .* no barrier|which nobody has written)",
        CAUSAL,
    ),
    "barrier that some threads skip": Fault(
        "causal.cu",
        LOAD_CHUNK,
        LOAD_CHUNK.replace("__syncthreads", "if (threadIdx.x < 64) __syncthreads"),
        r"kernel causal_forward .*(barrier divergence|a race)",
        CAUSAL,
    ),
    "copy not waited for": Fault(
        "causal.cu",
        LOAD_CHUNK,
        LOAD_CHUNK.replace("wait_for_copies();", ""),
        r"kernel causal_forward .*asynchronous copy into it has not been waited for",
        CAUSAL,
    ),
    "one row too many": Fault(
        "noncausal.cu",
        "for (int r = warp_index(); r < valid; r += warp_count()) {\n      float inverse = 1;",
        "for (int r = warp_index(); r <= valid; r += warp_count()) {\n      float inverse = 1;",
        r"kernel noncausal_forward .*write of 4 bytes of global memory .*out of bounds",
        replace(FULL, N=60),
        "noncausal",
    ),
    "16-byte copies of rows that are not aligned": Fault(
        "tile.cuh",
        " && reinterpret_cast<uintptr_t>(s.data) % 16 == 0;",
        ";",
        r"kernel noncausal_forward .*asynchronous copy .*misaligned",
        replace(FULL, D=20),
        "noncausal",
        32,
    ),
    "padding that nobody clears": Fault(
        "features.cuh",
        "for (int i = n.features + lane_index(); i < n.feature_width; i += 32) "
        "out[i] = from_float<E>(0.0f);",
        "",
        r"kernel noncausal_forward .*shared memory .*which nobody has written",
        replace(FULL, D=20),
        "noncausal",
        32,
    ),
    "fragment of B with row and column swapped": Fault(
        "tile.cuh",
        "load(b, col + g, k + t, f.high[0], f.low[0]);",
        "load(b, col + t, k + g, f.high[0], f.low[0]);",
        r"kernel noncausal_forward .*thread \(1, 0, 0\): a wrong fragment: register 0 of B must "
        r"hold element \(0, 1\) of its tile, and holds \(1, 0\)",
        FULL,
        "noncausal",
    ),
    "fragment of A with registers swapped": Fault(
        "tile.cuh",
        LOAD_A,
        LOAD_A.translate(str.maketrans("12", "21")),
        r"kernel noncausal_forward .*thread \(0, 0, 0\): a wrong fragment: register 1 of A must "
        r"hold element \(8, 0\) of its tile, and holds \(0, 4\)",
        FULL,
        "noncausal",
    ),
    "matrices of bf16 loaded in another order": Fault(
        "tile.cuh",
        "const int right = Count == 4 ? block % 2 * 8 : 0, down = block / (Count / 2) * 8;\n"
        "      if constexpr (AlongRows)",
        "const int right = Count == 4 ? block / 2 * 8 : 0, down = block % 2 * 8;\n"
        "      if constexpr (AlongRows)",
        r"kernel noncausal_forward .*thread \(0, 0, 0\): a wrong fragment: register 1 of A must "
        r"hold element \(8, 0\) of its tile, and holds \(0, 8\)",
        replace(FULL, dtype=torch.bfloat16),
        "noncausal",
    ),
    "rows of matrices that are not turned": Fault(
        "tile.cuh",
        "load_at<true>(x, i + right, k + down + row);",
        "load_at<false>(x, i + right, k + down + row);",
        r"kernel noncausal_forward .*: a wrong fragment: register \d of A must hold element",
        replace(FULL, dtype=torch.bfloat16),
        "noncausal",
    ),
    "rows of matrices that are not aligned": Fault(
        "tile.cuh",
        "load_matrices<Transposed>(x, data + (",
        "load_matrices<Transposed>(x, data + 4 + (",
        r"kernel noncausal_forward .*ldmatrix: a misaligned row",
        replace(FULL, dtype=torch.bfloat16),
        "noncausal",
    ),
    "sums stored in another lane's column": Fault(
        "tile.cuh",
        "c = col + 2 * (lane_index() & 3);",
        "c = col + (lane_index() & 3);",
        r"kernel noncausal_forward .*: a wrong fragment: element \(\d+, \d+\) of a product is "
        r"taken for \(\d+, \d+\)",
        FULL,
        "noncausal",
    ),
    "shuffle that half a warp skips": Fault(
        "tile.cuh",
        SUM,
        "if (lane_index() < 16) " + SUM,
        r"kernel recurrent_forward .*warp divergence: it (waits in __shfl_xor_sync, where lane|"
        r"is in __shfl_xor_sync, and lane) \d+, which its mask names",
        FEW,
        "step",
    ),
    "shuffle whose mask leaves out a lane that takes part": Fault(
        "tile.cuh",
        SUM,
        SUM.replace("0xffffffffu", "0xffff0000u"),
        r"kernel recurrent_forward .*warp divergence: it is in __shfl_xor_sync with a mask that "
        r"does not name its lane",
        FEW,
        "step",
    ),
    "shuffle from a lane that the mask leaves out": Fault(
        "tile.cuh",
        SUM,
        "if (lane_index() < 16) " + SUM.replace("0xffffffffu", "0x0000ffffu"),
        r"kernel recurrent_forward .*thread \(\d+, 0, 0\): a shuffle from a lane that its mask "
        r"does not name",
        FEW,
        "step",
    ),
}
REPORT = r"block \(\d+, \d+, \d+\), thread \(\d+, \d+, \d+\)"


def edited_backend(
    form: str, width: int, *edits: build.Edit, dtype: torch.dtype = torch.float32
) -> EmulatedBackend:
    name = {torch.float32: "float", torch.bfloat16: "bf16"}[dtype]

    class Edited(EmulatedBackend):
        def _emulated_library(self) -> Any:
            return build.library(build.object_name(form, name, width), edits)

    return Edited()


def forward(backend: EmulatedBackend, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of one call, and what it should be."""
    call = draw(case)
    if case.D == 20:  # rows of whole 16-byte pieces that start 4 bytes later
        memory = torch.randn(call.query.numel() + 1)
        call.query = memory[1:].view_as(call.query)
    given = op_arguments(call.query, call.key, call.value, **arguments(call))
    inputs, options, _ = split_arguments(given)
    out = backend.forward(problem_of(Inputs(*inputs), *options), inputs).out
    return out, truth(call)["out"]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_reported(backend: str, fault: Fault) -> None:
    edit = (fault.file, fault.text, fault.replacement)
    with pytest.raises(RuntimeError, match=fault.report) as raised:
        forward(edited_backend(fault.form, fault.width, edit, dtype=fault.case.dtype), fault.case)
    assert raised.match(REPORT)


def test_the_sound_kernels_pass_the_same_calls(backend: str) -> None:
    sound = EmulatedBackend()
    for case in (CAUSAL, FULL, FEW, replace(FULL, D=20)):
        assert error(*forward(sound, case)) < 1e-5


def test_halves_of_a_warp_may_shuffle_apart(backend: str) -> None:
    """A sum over each half, under a mask of its own, then over both."""
    halves = (
        "if (lanes < 16)\n"
        "    x += __shfl_xor_sync(lane_index() < 16 ? 0x0000ffffu : 0xffff0000u, x, lanes);\n"
        "  x += __shfl_xor_sync(0xffffffffu, x, 16);\n  return x;"
    )
    assert error(*forward(edited_backend("step", 0, ("tile.cuh", SUM, halves)), FEW)) < 1e-5
