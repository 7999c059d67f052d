"""Learned and random feature maps: shapes, signs, what they estimate, and reproducibility."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn.nn import T2R, Cosformer, Hedgehog, Performer
from fastattn.nn.feature_maps import NAMES, make_pair, orthogonal_directions

H, D, N = 3, 16, 10


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    pass


def draw(*, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(2, H, N, D)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_finite_and_not_negative(name: str, dtype: torch.dtype) -> None:
    for phi in make_pair(name, H, H, D, max_length=64 if name == "cosformer" else None):
        for size in (0.1, 1.0, 30.0):
            features = phi(draw(dtype=dtype, size=size))
            assert features.dtype == dtype and features.shape[:3] == (2, H, N)
            assert features.isfinite().all() and (features >= 0).all()
            assert features.shape[-1] <= 256


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_reproducible(name: str) -> None:
    """Two processes that build the same map must agree, or a checkpoint without the random
    directions would load as another model."""
    x = draw()
    options = {"max_length": 64 if name == "cosformer" else None}
    first, second = make_pair(name, H, H, D, **options), make_pair(name, H, H, D, **options)
    torch.manual_seed(1)
    for a, b in zip(first, second):
        assert torch.equal(a(x), b(x))


def test_hedgehog_formula_and_start() -> None:
    phi = Hedgehog(H, D, 2 * D)
    x = draw()
    assert torch.equal(phi.weight, torch.eye(D).expand(H, D, D))
    torch.testing.assert_close(phi(x), torch.softmax(torch.cat([x, -x], -1), -1))
    with torch.no_grad():
        phi.weight[1] *= 2  # of one head alone
    other = phi(x)
    torch.testing.assert_close(other[:, 1], torch.softmax(torch.cat([2 * x, -2 * x], -1), -1)[:, 1])
    torch.testing.assert_close(other[:, 0], torch.softmax(torch.cat([x, -x], -1), -1)[:, 0])


def test_t2r_formula() -> None:
    phi = T2R(H, D)
    with torch.no_grad():
        phi.bias.copy_(torch.randn_like(phi.bias))
    x = draw()
    for h in range(H):
        expected = torch.relu(x[:, h] @ phi.weight[h] + phi.bias[h])
        torch.testing.assert_close(phi(x)[:, h], expected)


def test_performer_estimates_the_softmax_kernel() -> None:
    """FAVOR+ is unbiased: over many draws the mean of phi(q).phi(k) is exp(q.k / sqrt(D))."""
    torch.manual_seed(0)  # a statement about frequencies: on fresh numbers it would fail at times
    q, k = draw(size=0.5)[0, 0, :4], draw(size=0.5)[0, 0, 4:8]
    exact = torch.exp(q @ k.T / math.sqrt(D))
    draws = []
    for seed in range(300):
        phi = Performer(1, D, 64, seed=seed)
        draws.append(phi(q) @ phi(k).T)
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0) / math.sqrt(300)
    assert ((mean - exact).abs() <= 5 * spread + 1e-3 * exact).all()
    assert (spread < 0.1 * exact).all()  # or the line above says nothing


def test_performer_queries_and_keys_fit_together() -> None:
    """The division by a token's largest feature cancels in the quotient."""
    query_map, key_map = make_pair("performer", H, H, D)
    assert torch.equal(query_map.directions, key_map.directions)
    torch.manual_seed(0)
    x, v = draw(), draw()
    stable = fastattn.linear_attention(query_map(x), key_map(x), v, feature_map="features")
    plain = fastattn.linear_attention(x, x, v, feature_map=key_map)
    torch.testing.assert_close(stable, plain, atol=2e-3, rtol=2e-2)  # 1e-4 is added to features
    scores = torch.softmax(x @ x.mT / math.sqrt(D), -1)
    assert (stable - scores @ v).norm() < 0.7 * (v.mean(2, keepdim=True) - scores @ v).norm()


def test_directions_are_orthogonal_in_blocks_and_gaussian_in_length() -> None:
    directions = orthogonal_directions(40, D)
    assert directions.shape == (40, D)
    for block in directions.split(D):
        products = block @ block.T
        off = products - products.diagonal().diag()
        assert off.abs().max() < 1e-4
    many = orthogonal_directions(4096, D, seed=3).square().sum(-1)
    assert abs(float(many.mean()) - D) < 0.5 and abs(float(many.var()) - 2 * D) < 4
    assert not torch.equal(orthogonal_directions(8, D, 0), orthogonal_directions(8, D, 1))


def test_cosformer_weighs_by_distance() -> None:
    phi, x = Cosformer(H, D, max_length=50), draw()
    scores = phi(x) @ phi(x).mT
    position = torch.arange(N)
    distance = (position[:, None] - position).abs()
    expected = (x.relu() @ x.relu().mT) * torch.cos(math.pi / 2 * distance / 50)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="10 tokens, more than max_length=9"):
        Cosformer(H, D, max_length=9)(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Hedgehog(H, D, 7), "features must be even.* got 7"),
        (lambda: Hedgehog(H, D, 258), "between 1 and 256; got 258"),
        (lambda: T2R(H, D, 0), "between 1 and 256; got 0"),
        (lambda: Performer(H, D, 300), "between 1 and 256; got 300"),
        (lambda: Cosformer(H, 200, max_length=5), "between 1 and 256; got 400"),
        (lambda: Cosformer(H, D, max_length=0), "max_length must be at least 1"),
        (lambda: make_pair("cosformer", H, H, D), "needs max_length"),
        (lambda: make_pair("magic", H, H, D), "feature_map must be one of 'hedgehog'"),
    ],
)
def test_bad_sizes(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["hedgehog", "t2r"])
def test_learned_maps_learn(name: str) -> None:
    """Attention with them comes closer to softmax attention than it started."""
    torch.manual_seed(0)
    query_map, key_map = make_pair(name, H, H, D)
    q, k, v = draw(), draw(), draw()
    target = torch.softmax(q @ k.mT / math.sqrt(D), -1) @ v
    parameters = [*query_map.parameters(), *key_map.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(60):
        out = fastattn.linear_attention(query_map(q), key_map(k), v, feature_map="features")
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
