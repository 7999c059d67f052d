"""The emulator bites: faults planted into the CUDA sources, each of which it must report.

A fault is an edit of one line. It is compiled into the object of one form, and the call that runs
into it must fail with a sentence that names the kernel, the block, the thread and what went wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fastattn.backends import Inputs
from fastattn.ops.attention import op_arguments
from fastattn.ops.library import problem_of, split_arguments
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


CAUSAL = Case(1, 1, 70, 16, is_causal=True)
FULL = Case(1, 1, 70, 16)

FAULTS = {
    "missing barrier": Fault(
        "causal.cu",
        "multiply_lower<T>(active, t.phi_q, t.phi, n.feature_width, t.scores);\n"
        "    __syncthreads();",
        "multiply_lower<T>(active, t.phi_q, t.phi, n.feature_width, t.scores);",
        r"kernel causal_forward .*(a race: thread .* no barrier|which nobody has written)",
        CAUSAL,
    ),
    "barrier that some threads skip": Fault(
        "causal.cu",
        "    wait_for_copies();\n    __syncthreads();\n"
        "    keys_to_features<T>(c, phi, s, token, valid, active, t.stage_k, {}, t.phi,",
        "    wait_for_copies();\n    if (threadIdx.x < 64) __syncthreads();\n"
        "    keys_to_features<T>(c, phi, s, token, valid, active, t.stage_k, {}, t.phi,",
        r"kernel causal_forward .*(barrier divergence|a race)",
        CAUSAL,
    ),
    "copy not waited for": Fault(
        "causal.cu",
        "    wait_for_copies();\n    __syncthreads();\n"
        "    keys_to_features<T>(c, phi, s, token, valid, active, t.stage_k, {}, t.phi,",
        "    __syncthreads();\n"
        "    keys_to_features<T>(c, phi, s, token, valid, active, t.stage_k, {}, t.phi,",
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
    ),
    "padding that nobody clears": Fault(
        "features.cuh",
        "for (int i = features + lane_index(); i < width; i += 32) out[i] = from_float<E>(0.0f);",
        "",
        r"kernel noncausal_forward .*shared memory .*which nobody has written",
        replace(FULL, D=20),
        "noncausal",
    ),
}
REPORT = r"block \(\d+, \d+, \d+\), thread \(\d+, \d+, \d+\)"


def faulty_backend(form: str, file: str, text: str, replacement: str) -> EmulatedBackend:
    class Faulty(EmulatedBackend):
        def _emulated_library(self) -> Any:
            return build.library(form, "float", ((file, text, replacement),))

    return Faulty()


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
    faulty = faulty_backend(fault.form, fault.file, fault.text, fault.replacement)
    with pytest.raises(RuntimeError, match=fault.report) as raised:
        forward(faulty, fault.case)
    assert raised.match(REPORT)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("split(b.at(col + g, k + t), f.high[0]", "split(b.at(col + t, k + g), f.high[0]"),
        ("split(a.at(row + g + 8, k + t), f.high[1]", "split(a.at(row + g + 8, k + t), f.high[2]"),
    ],
    ids=["row and column", "registers"],
)
def test_a_swapped_fragment_gives_wrong_numbers(backend: str, text: str, replacement: str) -> None:
    """A layout is no fault that can be seen from outside: the emulated instruction computes with
    it, by the manual, and the numbers are wrong."""
    edits = [(text, replacement)]
    if "high[2]" in replacement:  # the other half of the exchange
        edits = [
            (
                "split(a.at(row + g + 8, k + t), f.high[1], f.low[1]);\n"
                "    split(a.at(row + g, k + t + 4), f.high[2], f.low[2]);",
                "split(a.at(row + g + 8, k + t), f.high[2], f.low[2]);\n"
                "    split(a.at(row + g, k + t + 4), f.high[1], f.low[1]);",
            )
        ]
    out, right = forward(faulty_backend("noncausal", "tile.cuh", *edits[0]), FULL)
    assert error(out, right) > 1e-2


def test_the_sound_kernels_pass_the_same_calls(backend: str) -> None:
    sound = EmulatedBackend()
    for case in (CAUSAL, FULL, replace(FULL, D=20)):
        assert error(*forward(sound, case)) < 1e-5
