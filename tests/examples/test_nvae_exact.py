"""The exact pieces against what they claim to be: torch.distributions, sums to 1, an SVD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal

from examples.nvae.exact import (
    Bernoulli,
    LogisticMixture,
    Normal,
    SpectralRegulariser,
    residual_kl,
    soft_clamp,
)
from examples.nvae.flow import Flow, MaskedConv2d


def normals(seed: int, scale: float = 1.0) -> tuple[Normal, Normal]:
    """A prior and a difference to it, in float64."""
    generator = torch.Generator().manual_seed(seed)
    raw = scale * torch.randn(4, 3, 8, 4, 4, generator=generator, dtype=torch.float64)
    return Normal(raw[0], raw[1]), Normal(raw[2], raw[3])


def as_torch(normal: Normal) -> Independent:
    return Independent(TorchNormal(normal.mean, normal.log_std.exp()), 3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_residual_kl_is_that_of_the_two_normals(seed: int, scale: float) -> None:
    prior, delta = normals(seed, scale)
    right = kl_divergence(as_torch(prior.shifted(delta)), as_torch(prior))
    torch.testing.assert_close(residual_kl(prior, delta), right, rtol=1e-9, atol=1e-9)
    single = [Normal(n.mean.float(), n.log_std.float()) for n in (prior, delta)]
    torch.testing.assert_close(residual_kl(*single).double(), right, rtol=1e-5, atol=1e-6)


def test_residual_kl_of_no_difference_is_zero_and_of_a_tiny_one_is_not() -> None:
    prior, _ = normals(0)
    prior = Normal(prior.mean.float(), prior.log_std.float())
    zeros = torch.zeros_like(prior.mean)
    assert not residual_kl(prior, Normal(zeros, zeros)).any()
    tiny = residual_kl(prior, Normal(zeros, zeros + 1e-3))
    assert tiny == pytest.approx(128 * 1e-6, rel=2e-3)  # 1/2 ((2e-3)^2 / 2) each


def test_normal_density_and_samples(seed: int) -> None:
    prior, _ = normals(seed)
    z = prior.sample()
    torch.testing.assert_close(prior.log_prob(z), as_torch(prior).log_prob(z))
    wide = Normal(torch.full((1, 1, 300, 300), 2.0), torch.full((1, 1, 300, 300), math.log(3.0)))
    assert float(wide.sample(0.5).std()) == pytest.approx(1.5, rel=0.02)
    assert float(wide.sample(0.0).std()) == 0


def test_a_network_cannot_ask_for_more_than_the_clamp() -> None:
    normal = Normal.from_network(torch.full((1, 4, 1, 1), 1e6))
    assert normal.mean.max() <= 5 and normal.log_std.max() <= 5
    x = torch.tensor([0.01, -0.01])
    torch.testing.assert_close(soft_clamp(x), x, rtol=1e-5, atol=0)


def test_bernoulli_is_the_binary_cross_entropy(seed: int) -> None:
    logits = 4 * torch.randn(3, 1, 5, 5)
    x = torch.bernoulli(torch.full_like(logits, 0.5))
    right = torch.distributions.Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Bernoulli(logits).log_prob(x), right)
    assert (Bernoulli(torch.full((1, 1, 99, 99), -1.0)).sample(0.1)).mean() < 0.01


@pytest.mark.parametrize("levels", [256, 32, 2])
@pytest.mark.parametrize("scale", [0.5, 5.0, 40.0])
def test_logistic_mixture_adds_up_to_one(seed: int, levels: int, scale: float) -> None:
    """Every value of one pixel, also with parameters so far out that single bins hold nothing."""
    raw = scale * torch.randn(6, LogisticMixture.parameters_per_pixel(1), 1, 1)
    total = torch.stack(
        [
            LogisticMixture(raw, 1, levels).log_prob(torch.full((6, 1, 1, 1), float(value)))
            for value in range(levels)
        ]
    )
    torch.testing.assert_close(total.logsumexp(0).exp(), torch.ones(6), rtol=0, atol=1e-4)


def test_logistic_mixture_of_three_channels_adds_up_to_one(seed: int) -> None:
    """All 4 x 4 x 4 colours, with channels that depend on those before."""
    levels = 4
    values = torch.arange(levels).float()
    colours = torch.cartesian_prod(values, values, values)[:, :, None, None]
    raw = torch.randn(1, LogisticMixture.parameters_per_pixel(3, 5), 1, 1)
    mixture = LogisticMixture(raw.expand(len(colours), -1, -1, -1), 3, levels)
    log_prob = mixture.log_prob(colours)
    assert float(log_prob.logsumexp(0)) == pytest.approx(0, abs=1e-4)


def test_logistic_mixture_is_what_it_samples(seed: int) -> None:
    """Frequencies of a pixel's values against their probabilities; means in between."""
    raw = torch.randn(1, LogisticMixture.parameters_per_pixel(1, 3), 1, 1)
    levels, draws = 8, 40_000
    mixture = LogisticMixture(raw.expand(draws, -1, -1, -1), 1, levels)
    found = torch.bincount(mixture.sample().flatten().long(), minlength=levels) / draws
    one = LogisticMixture(raw, 1, levels)
    right = torch.cat([one.log_prob(torch.full((1, 1, 1, 1), float(v))) for v in range(levels)])
    assert (found - right.exp()).abs().max() < 0.02
    cold = mixture.sample(1e-6)
    assert (cold == cold[0]).all()
    assert ((mixture.mean() >= 0) & (mixture.mean() <= 1)).all()


def test_logistic_mixture_has_finite_gradients_far_out() -> None:
    raw = torch.zeros(2, LogisticMixture.parameters_per_pixel(1), 1, 1)
    raw[0] = 60.0
    raw[1] = -60.0
    raw.requires_grad_()
    LogisticMixture(raw, 1, 256).log_prob(torch.full((2, 1, 1, 1), 100.0)).sum().backward()
    assert raw.grad.isfinite().all()


def test_logistic_mixture_refuses_other_numbers_of_channels() -> None:
    with pytest.raises(ValueError, match="multiple of 3 channels for images of 1; got 31"):
        LogisticMixture(torch.zeros(1, 31, 2, 2), 1, 256)


def spectral_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(16, 16, 5, groups=16),
        nn.Linear(20, 30),
    )


def test_singular_values_are_those_of_an_svd() -> None:
    network = spectral_network()
    regulariser = SpectralRegulariser(network)
    for _ in range(10):
        found = torch.cat(regulariser.singular_values()).detach()
    weights = [network[i].weight.flatten(1) for i in (0, 2, 3, 4)]
    right = torch.stack([torch.linalg.matrix_norm(w.detach(), 2) for w in weights])
    torch.testing.assert_close(found.sort().values, right.sort().values, rtol=1e-3, atol=0)
    network[1].weight.data[3] = -7.0
    assert float(regulariser().detach()) == pytest.approx(float(right.sum()) + 7, rel=1e-3)


def test_the_regulariser_has_the_gradient_of_the_singular_value() -> None:
    network = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        network[0].weight.mul_(torch.tensor([9.0, 2, 1, 1, 1])[:, None])
    regulariser = SpectralRegulariser(network)
    regulariser().backward()
    u, _, v = torch.linalg.svd(network[0].weight.detach())
    torch.testing.assert_close(
        network[0].weight.grad, torch.outer(u[:, 0], v[0]), atol=1e-3, rtol=0
    )


def test_the_regulariser_outlives_a_weight_of_zeros() -> None:
    network = nn.Sequential(nn.Linear(6, 5))
    nn.init.zeros_(network[0].weight)
    regulariser = SpectralRegulariser(network)
    assert float(regulariser().detach()) == 0
    nn.init.eye_(network[0].weight)
    assert float(regulariser().detach()) == pytest.approx(1, rel=1e-3)


def jacobian(f, z):  # type: ignore[no-untyped-def]
    """(elements, elements) of one image, rows and columns in the flow's order: pixels, channels."""
    full = torch.autograd.functional.jacobian(f, z)[0, :, :, :, 0]
    order = full.permute(1, 2, 0, 4, 5, 3)  # (h, w, c, h', w', c')
    return order.reshape(z.numel(), z.numel())


def random_flow(channels: int) -> Flow:
    torch.manual_seed(1)
    flow = Flow(channels).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.5)
    return flow


def test_each_cell_of_the_flow_is_triangular_with_ones_on_the_diagonal() -> None:
    flow = random_flow(3)
    z = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    forwards, backwards = (jacobian(cell, z) for cell in flow)
    eye = torch.eye(z.numel(), dtype=torch.float64)
    assert torch.equal(forwards.triu(), eye) and forwards.tril(-1).any()
    assert torch.equal(backwards.tril(), eye) and backwards.triu(1).any()


def test_each_element_of_the_flow_reaches_many_others() -> None:
    """No mask hides more than it must: in a 3 x 3 image everything before is seen."""
    flow = random_flow(2)
    matrix = jacobian(flow[0], torch.randn(1, 2, 3, 3, dtype=torch.float64))
    last = matrix[-1, :-1]
    assert (last != 0).all()


def test_the_flow_keeps_volumes_and_can_be_inverted(seed: int) -> None:
    flow = random_flow(4)
    z = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    determinant = torch.linalg.det(jacobian(flow, z[:1]))
    assert float(determinant.abs().log()) == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(flow.inverse(flow(z)), z, rtol=1e-8, atol=1e-8)
    assert (flow(z) - z).abs().max() > 0.1


def test_masked_convolution_sees_earlier_pixels_only() -> None:
    conv = MaskedConv2d(torch.ones(1, 1, dtype=torch.bool), 3)
    x = torch.randn(1, 1, 4, 4)
    matrix = torch.autograd.functional.jacobian(conv, x).reshape(16, 16)
    assert not matrix.triu(1).any() and matrix.diagonal().all()
