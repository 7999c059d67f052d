"""Every backend against the float64 reference, over the shapes that kernels trip on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastattn import feature_maps
from tests.conftest import require_backend
from tests.ops import plain
from tests.ops.problems import Case, assert_accurate, draw, errors, run, truth

DIMS = [1, 3, 16, 32, 48, 60, 64, 80, 96, 128, 256]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 200]
MAPS = feature_maps.names()
# Flash-linear-attention's published test shapes (B, T, H, D).
FLA_SHAPES = [
    (1, 63, 1, 64),
    (2, 500, 3, 60),
    (2, 1000, 3, 128),
    (3, 1000, 4, 64),
    (2, 2048, 4, 256),
]

causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def fits(case: Case) -> Case:
    """The case with what its feature map forbids left out."""
    phi = feature_maps.get(case.feature_map)
    if not phi.is_nonnegative:
        case = replace(case, normalize=False)
    if not phi.is_separable:
        case = replace(case, is_causal=False, initial_state=False, return_state=False)
    return case


@causal
@pytest.mark.parametrize("dim", DIMS)
def test_head_sizes(backend: str, dim: int, is_causal: bool) -> None:
    call = draw(Case(N=70, D=dim, is_causal=is_causal, return_state=True))
    assert_accurate(run(call, backend), truth(call))


@causal
@pytest.mark.parametrize("dims", [(16, 64), (64, 16), (60, 3), (1, 256), (256, 1), (33, 65)])
def test_value_size_differs_from_head_size(
    backend: str, dims: tuple[int, int], is_causal: bool
) -> None:
    call = draw(Case(D=dims[0], Dv=dims[1], is_causal=is_causal, initial_state=True))
    # With one feature a quotient hardly depends on the query: d query is what is left of Dv terms
    # that cancel, so it is measured against a larger share of the gradients sent back.
    floor = 0.1 if dims[0] == 1 else 0.01
    assert_accurate(run(call, backend), truth(call), floor=floor)


@causal
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(backend: str, length: int, is_causal: bool) -> None:
    call = draw(Case(N=length, D=24, is_causal=is_causal, initial_state=True, return_state=True))
    assert_accurate(run(call, backend), truth(call))


@pytest.mark.parametrize("lengths", [(1, 70), (70, 1), (0, 5), (5, 0), (130, 64), (64, 200)])
def test_cross_attention(backend: str, lengths: tuple[int, int]) -> None:
    call = draw(Case(N=lengths[0], M=lengths[1], D=20, return_state=True))
    assert_accurate(run(call, backend), truth(call))


@causal
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_feature_maps(backend: str, feature_map: str, normalize: bool, is_causal: bool) -> None:
    case = Case(
        *(2, 3, 75, 20),
        feature_map=feature_map,
        normalize=normalize,
        is_causal=is_causal,
        scale=0.7,
        masked=True,
        initial_state=True,
        return_state=True,
    )
    call = draw(fits(case))
    assert_accurate(run(call, backend), truth(call))


@causal
@pytest.mark.parametrize("shape", FLA_SHAPES)
def test_flash_linear_attention_shapes(shape: tuple[int, int, int, int], is_causal: bool) -> None:
    B, N, H, D = shape
    call = draw(Case(B, H, N, D, is_causal=is_causal, layout="bnhd"))
    third = plain.run(call.to(torch.float64))
    assert_accurate(run(call), third)
    if B * H * N * N <= 4_000_000:
        assert_accurate(third, truth(call), 1e-12, 1e-10)


@causal
@pytest.mark.parametrize("group", [2, 4, 12])
def test_grouped_heads(backend: str, group: int, is_causal: bool) -> None:
    call = draw(
        Case(H=12, Hk=12 // group, is_causal=is_causal, initial_state=True, return_state=True)
    )
    assert_accurate(run(call, backend), truth(call))


@causal
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_forms_agree(backend: str, form: str, is_causal: bool) -> None:
    call = draw(Case(N=100, Dv=9, is_causal=is_causal, masked=True, initial_state=True))
    assert_accurate(run(call, backend, form), truth(call))


@causal
def test_float64(backend: str, is_causal: bool) -> None:
    call = draw(Case(N=100, D=40, dtype=torch.float64, is_causal=is_causal, return_state=True))
    assert_accurate(run(call, backend), truth(call), 1e-13, 1e-12)


@causal
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_is_at_most_twice_as_wrong_as_plain_pytorch(
    backend: str, dtype: torch.dtype, feature_map: str, is_causal: bool
) -> None:
    case = Case(
        *(2, 2, 151, 32),  # odd: the last token has no other to be paired with
        dtype=dtype,
        feature_map=feature_map,
        is_causal=is_causal,
        masked=True,
        initial_state=True,
        return_state=True,
    )
    assert_no_worse_than_plain(fits(case), backend)


@causal
@pytest.mark.parametrize("dim", [3, 60, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_head_sizes(backend: str, dtype: torch.dtype, dim: int, is_causal: bool) -> None:
    assert_no_worse_than_plain(Case(1, 2, 199, dim, dtype=dtype, is_causal=is_causal), backend)


@causal
@pytest.mark.parametrize("length", [1, 2, 5, 48, 49, 97])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_lengths(backend: str, dtype: torch.dtype, length: int, is_causal: bool) -> None:
    """With few keys gradients almost cancel: what little is left must not be rounding."""
    assert_no_worse_than_plain(Case(2, 2, length, 64, dtype=dtype, is_causal=is_causal), backend)


@causal
def test_16_bit_packed_sequences(backend: str, is_causal: bool) -> None:
    """Short sequences are computed in another way than long ones, in one call."""
    case = Case(1, 2, 0, 32, lengths=(5, 0, 64, 1, 130, 48), dtype=torch.bfloat16)
    assert_no_worse_than_plain(replace(case, is_causal=is_causal, masked=True), backend)


@causal
@pytest.mark.parametrize("backend", ["cpu"])
def test_16_bit_beyond_a_segment(backend: str, is_causal: bool) -> None:
    """Several heads and segments, whose last tiles are not whole, in one thread's hands."""
    require_backend(backend)
    case = Case(1, 4, 1100, 32, dtype=torch.bfloat16, is_causal=is_causal, layout="bnhd")
    assert_no_worse_than_plain(case, backend)


def assert_no_worse_than_plain(case: Case, backend: str) -> None:
    call = draw(case)
    reference = truth(call)
    ours, theirs = errors(run(call, backend), reference), errors(plain.run(call), reference)
    precision = torch.finfo(case.dtype).eps
    bounds = {
        name: 2 * value + precision / 8 if math.isfinite(value) else 32 * precision
        for name, value in theirs.items()
    }
    wrong = {name: (e, bounds[name]) for name, e in ours.items() if not e <= bounds[name]}
    assert not wrong, f"(error, bound): {wrong}"
