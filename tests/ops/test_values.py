"""Numbers that break careless kernels: tiny and huge inputs, clamped denominators, long drift."""

from __future__ import annotations

import pytest
import torch

from fastattn import LinearAttentionState, feature_maps, linear_attention
from tests.ops import plain
from tests.ops.problems import Case, assert_accurate, draw, error, run, truth

causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
EPS = 1e-6


@causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_elu_of_minus_8_is_not_zero(backend: str, dtype: torch.dtype, is_causal: bool) -> None:
    """elu(x) + 1 written as expm1(x) + 1 is 0 in bfloat16 at -8: the row would lose its keys."""
    call = draw(Case(1, 2, 70, 16, is_causal=is_causal)).to(dtype)
    call.key, call.query = torch.full_like(call.key, -8), torch.full_like(call.query, -8)
    reference = truth(call)
    assert reference["out"].any()
    assert error(run(call, backend)["out"], reference["out"]) < 16 * torch.finfo(dtype).eps


@causal
@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax", "exp", "cosine", "efficient"])
def test_values_of_ten_thousand(backend: str, feature_map: str, is_causal: bool) -> None:
    if is_causal and not feature_maps.get(feature_map).is_separable:
        pytest.skip("non-causal by nature")
    call = draw(Case(2, 2, 100, 16, feature_map=feature_map, is_causal=is_causal))
    call.query, call.key, call.value = (x * 1e4 for x in (call.query, call.key, call.value))
    results = run(call, backend)
    for name, result in results.items():
        assert result.isfinite().all(), name
    assert_accurate({"out": results["out"]}, {"out": truth(call)["out"]}, forward=2e-5)


@causal
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_float16_gradients_do_not_overflow(backend: str, size: float, is_causal: bool) -> None:
    """Small denominators make g = do / den large: too large for float16 operands."""
    call = draw(Case(1, 2, 100, 32, feature_map="relu", is_causal=is_causal))
    call.query, call.key = call.query * 1e-2, call.key * 1e-2
    call.value = call.value * size
    call = call.to(torch.float16)
    reference, results = truth(call), run(call, backend)
    for name, right in reference.items():
        if right.abs().max() > 6e4:
            continue  # the gradient itself is no float16 number
        assert results[name].isfinite().all(), name
        assert error(results[name], right, floor=0.1 * size) < 2e-2, name


@causal
@pytest.mark.parametrize("tensor", ["query", "key", "value"])
@pytest.mark.parametrize("feature_map", feature_maps.names())
def test_a_nan_is_not_lost(backend: str, feature_map: str, tensor: str, is_causal: bool) -> None:
    """A comparison that is false of a NaN makes a feature of 0 or 1 of it, and a model that has
    broken down looks sound. (Causal rows before the NaN may be NaN as well: 0 times it is.)"""
    phi = feature_maps.get(feature_map)
    if is_causal and not phi.is_separable:
        pytest.skip("non-causal by nature")
    case = Case(
        *(2, 2, 70, 16),
        feature_map=feature_map,
        is_causal=is_causal,
        normalize=phi.is_nonnegative,
    )
    call = draw(case)
    clean = run(call, backend)["out"]
    poisoned = getattr(call, tensor).clone()
    poisoned[0, 1, 20, 3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # all ones
    setattr(call, tensor, poisoned)
    out = run(call, backend)["out"]
    rows = slice(20, 21) if tensor == "query" else slice(20 if is_causal else 0, None)
    columns = slice(3, 4) if tensor == "value" else slice(None)
    assert out[0, 1, rows, columns].isnan().all()
    for others in (lambda x: x[0, 0], lambda x: x[1]):
        assert torch.equal(others(out), others(clean))
    if tensor == "query":
        assert torch.equal(out[0, 1, :20], clean[0, 1, :20])
        assert torch.equal(out[0, 1, 21:], clean[0, 1, 21:])


def test_exp_is_clamped_and_its_gradient_stops_there(backend: str) -> None:
    for normalize in (True, False):
        call = draw(Case(1, 2, 30, 16, feature_map="exp", normalize=normalize))
        call.key = call.key.clone()
        call.key[:, :, 3, 5] = 41.0
        call.query = call.query.clone()
        call.query[:, :, 7] += 45.0
        results = run(call, backend)
        assert not results["d key"][:, :, 3, 5].any()
        assert results["out"].isfinite().all()
        assert_accurate(results, truth(call))


def test_the_direction_of_a_zero_vector_is_zero(backend: str) -> None:
    call = draw(Case(1, 2, 30, 16, feature_map="cosine"))
    call.query, call.key = call.query.clone(), call.key.clone()
    call.query[:, :, 4], call.key[:, :, 9] = 0, 0
    results = run(call, backend)
    assert not results["d query"][:, :, 4].any()
    assert not results["d key"][:, :, 9].any()
    assert_accurate(results, truth(call))


@causal
def test_gradients_of_clamped_and_empty_denominators(backend: str, is_causal: bool) -> None:
    """den >= eps, 0 < den < eps and den = 0, told apart by the size of the query's features."""
    sizes = torch.tensor([1.0, 1e-9, 0.0])  # one token each
    query = sizes[None, None, :, None].repeat(1, 1, 1, 4).requires_grad_()
    key = torch.zeros(1, 1, 3, 4)
    key[0, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    value, do = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    key, value = key.requires_grad_(), value.requires_grad_()
    out = linear_attention(
        query, key, value, feature_map="features", is_causal=is_causal, eps=EPS, backend=backend
    )
    dq, dk, dv = torch.autograd.grad(out, (query, key, value), do)
    k, v, do = key[0, 0, 0].detach(), value[0, 0, 0].detach(), do[0, 0]
    q = query[0, 0].detach()
    g = torch.stack([do[0], do[1] / EPS, torch.zeros(4)])
    delta = torch.tensor([-(v @ g[0]), 0.0, 0.0])  # the first denominator is k.sum() = 1
    expected_dq = (g @ v)[:, None] * k + delta[:, None] * k
    torch.testing.assert_close(out[0, 0, 0], v)
    torch.testing.assert_close(out[0, 0, 1], 1e-9 / EPS * v)
    assert not out[0, 0, 2].any()
    torch.testing.assert_close(dq[0, 0], expected_dq, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dv[0, 0, 0], q.sum(1)[:2] @ g[:2] / 4, rtol=1e-4, atol=1e-5)
    dk0 = q.T @ (g @ v + delta)
    torch.testing.assert_close(dk[0, 0, 0], dk0, rtol=1e-4, atol=1e-5)


def test_64k_tokens_do_not_drift(backend: str) -> None:
    """float32 sums over 65536 tokens, against float64; the worst token, not only the norm."""
    if backend == "reference":
        pytest.skip("quadratic in the length")
    call = draw(Case(1, 1, 65536, 64, is_causal=True, return_state=True))
    results, right = run(call, backend), plain.run(call.to(torch.float64))
    assert_accurate(results, right)
    late = slice(60000, None)
    for name in ("out", "d query"):
        assert error(results[name][:, :, late], right[name][:, :, late]) < 1e-4
    for name in ("d key", "d value"):
        assert error(results[name][:, :, :4096], right[name][:, :, :4096]) < 1e-4


def test_unnormalised_state_can_be_negative(backend: str) -> None:
    call = draw(
        Case(2, 2, 40, 16, feature_map="identity", normalize=False, is_causal=True, scale=-0.5)
    )
    call.state = LinearAttentionState(
        torch.randn(call.case.state_shape), torch.randn(call.case.state_shape[:-1])
    )
    assert_accurate(run(call, backend), truth(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lone_key_of_efficient_has_no_gradient(backend: str, dtype: torch.dtype) -> None:
    """Its softmax over tokens is 1: two terms cancel, if both are rounded alike."""
    call = draw(Case(1, 1, 15, 2, M=1, feature_map="efficient", normalize=False)).to(dtype)
    gradient = run(call, backend)["d key"]
    assert gradient.abs().max() <= 1e-5
