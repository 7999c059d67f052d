"""Memory as callers have it: any strides in, no copies, outputs where the next layer wants them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn import linear_attention
from tests.ops.problems import LAYOUTS, Case, assert_accurate, draw, lay_out, run, truth

causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
# Where features don't lie side by side Triton shares them out between threads in another way, and
# a GPU adds them in another order (the interpreter doesn't).
OTHER_SUMS = ("feature_strided", "reversed_axes")


@causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(
    backend: str, layout: str, dtype: torch.dtype, is_causal: bool
) -> None:
    call = draw(Case(2, 3, 75, 20, dtype=dtype, layout=layout, is_causal=is_causal))
    results = run(call, backend)
    call.query, call.key, call.value = (x.contiguous() for x in (call.query, call.key, call.value))
    right = run(call, backend)
    if layout in OTHER_SUMS and backend == "triton":
        eps = torch.finfo(dtype).eps
        assert_accurate(results, right, forward=max(eps, 1e-5), backward=max(eps, 1e-4))
        return
    for name in right:
        assert torch.equal(results[name], right[name]), name


@causal
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded_inputs(backend: str, dim: int, is_causal: bool) -> None:
    """A stride of 0: one row, head, token or feature seen many times."""
    call = draw(Case(2, 2, 40, 16, is_causal=is_causal))
    call.query, call.key, call.value = (
        x.narrow(dim, 0, 1).expand(2, 2, 40, 16) for x in (call.query, call.key, call.value)
    )
    assert_accurate(run(call, backend), truth(call))


@causal
def test_incoming_gradient_of_any_strides(backend: str, is_causal: bool) -> None:
    call = draw(Case(2, 2, 40, 16, is_causal=is_causal))
    for layout in LAYOUTS:
        call.grads["out"] = lay_out(layout, ((2, 2, 40, 16),) * 3, torch.float32)[0]
        assert_accurate(run(call, backend), truth(call))
    call.grads["out"] = torch.ones(()).expand(2, 2, 40, 16)  # what out.sum() sends back
    assert_accurate(run(call, backend), truth(call))


@causal
@pytest.mark.parametrize("layout", ["contiguous", "bnhd", "fused"])
def test_out_is_laid_out_for_the_next_layer(backend: str, layout: str, is_causal: bool) -> None:
    call = draw(Case(2, 3, 40, 16, layout=layout, is_causal=is_causal))
    out = run(call, backend)["out"]
    assert out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).reshape(2, 40, 48).data_ptr() == out.data_ptr()


@causal
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_laid_out_as_empty_like(backend: str, layout: str, is_causal: bool) -> None:
    call = draw(Case(2, 3, 40, 16, layout=layout, is_causal=is_causal))
    results = run(call, backend)
    for name in ("query", "key", "value"):
        expected = torch.empty_like(getattr(call, name)).stride()
        assert results[f"d {name}"].stride() == expected


def test_inputs_are_not_written(backend: str) -> None:
    call = draw(Case(2, 3, 40, 16, is_causal=True, masked=True))
    tensors = (call.query, call.key, call.value, call.key_mask, call.grads["out"])
    before = [x.clone() for x in tensors]
    run(call, backend)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@causal
def test_offsets_beyond_32_bits(backend: str, tmp_path: Path, is_causal: bool) -> None:
    """A head stride of 2^31 elements: address arithmetic in 32 bits would wrap around. The memory
    is a file with a hole: only the pages of two rows ever exist."""
    stride = 2**31 + 64
    size = 2 * (stride + 8 * 16)
    with (tmp_path / "memory").open("wb") as file:
        file.truncate(size)
    memory = torch.UntypedStorage.from_file(str(tmp_path / "memory"), False, size)
    flat = torch.tensor([], dtype=torch.bfloat16).set_(memory)
    far = flat.as_strided((1, 2, 8, 16), (0, stride, 16, 1))
    far.copy_(torch.randn(far.shape))

    def results(x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (x.detach().requires_grad_() for _ in range(3))
        out = linear_attention(query, key, value, is_causal=is_causal, backend=backend)
        return out.detach(), *torch.autograd.grad(out, (query, key, value), grad_outputs=x)

    for got, expected in zip(results(far), results(far.contiguous()), strict=True):
        assert torch.equal(got, expected)
