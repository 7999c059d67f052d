"""Same input, same bits: run after run, alone or in a batch, on however many threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.problems import Call, Case, Results, draw, run

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16]
# Few heads and long (the sequence is shared out over threads), more heads (a thread takes several,
# segment by segment), many heads and short.
SHAPES = [(1, 1, 5000, 64), (1, 3, 2100, 32), (1, 6, 2100, 32), (3, 4, 150, 40)]

causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def assert_same_bits(a: Results, b: Results) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def long_call(
    shape: tuple[int, ...], dtype: torch.dtype, is_causal: bool, feature_map: str
) -> Call:
    return draw(
        Case(
            *shape,
            dtype=dtype,
            is_causal=is_causal,
            feature_map=feature_map,
            masked=True,
            initial_state=feature_map != "efficient",
            return_state=feature_map != "efficient",
        )
    )


@causal
@each_dtype
@each_shape
def test_run_after_run(shape: tuple[int, ...], dtype: torch.dtype, is_causal: bool) -> None:
    call = long_call(shape, dtype, is_causal, "elu")
    first = run(call, "cpu")
    for _ in range(3):
        assert_same_bits(run(call, "cpu"), first)


@pytest.mark.parametrize("kind", ["full", "causal", "efficient"])
@each_dtype
@each_shape
def test_threads(threads: None, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    feature_map = "efficient" if kind == "efficient" else "elu"
    call = long_call(shape, dtype, kind == "causal", feature_map)
    torch.set_num_threads(1)
    alone = run(call, "cpu")
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert_same_bits(run(call, "cpu"), alone)


WITHOUT_OPENMP = """
import torch
from fastattn.backends import cpu
cpu._join_torch_threads = lambda: None
from tests.ops.test_repeatability import SHAPES, assert_same_bits, long_call, run
for shape in SHAPES:
    for is_causal in (False, True):
        call = long_call(shape, torch.float32, is_causal, "elu")
        torch.set_num_threads(1)
        alone = run(call, "cpu")
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert_same_bits(run(call, "cpu"), alone)
assert cpu._native.openmp_path() == ""
"""


def test_threads_of_our_own() -> None:
    """Where torch has no OpenMP runtime that can be joined: in a process that has joined none."""
    command = [sys.executable, "-c", WITHOUT_OPENMP]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@causal
@each_dtype
def test_a_row_alone_and_in_a_batch(threads: None, dtype: torch.dtype, is_causal: bool) -> None:
    torch.set_num_threads(2)
    call = draw(Case(5, 3, 1300, 32, dtype=dtype, is_causal=is_causal, masked=True))
    together = run(call, "cpu")
    for row in (0, 3):
        rows = slice(row, row + 1)
        alone = draw(Case(1, 3, 1300, 32, dtype=dtype, is_causal=is_causal, masked=True))
        alone.query, alone.key, alone.value = call.query[rows], call.key[rows], call.value[rows]
        alone.key_mask, alone.grads = call.key_mask[rows], {"out": call.grads["out"][rows]}
        for name, result in run(alone, "cpu").items():
            assert torch.equal(result, together[name][rows]), name


@each_dtype
def test_short_sequences_alone_and_packed(threads: None, dtype: torch.dtype) -> None:
    lengths = (3, 700, 1, 0, 4, 5)
    packed = draw(Case(1, 2, 0, 32, dtype=dtype, is_causal=True, lengths=lengths))
    together = run(packed, "cpu")
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = draw(Case(1, 2, length, 32, dtype=dtype, is_causal=True))
        alone.query, alone.key, alone.value = (
            x[:, :, rows] for x in (packed.query, packed.key, packed.value)
        )
        alone.grads = {"out": packed.grads["out"][:, :, rows]}
        for name, result in run(alone, "cpu").items():
            assert torch.equal(result, together[name][:, :, rows]), (name, length)
        begin += length
