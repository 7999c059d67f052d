"""The network, the bound and the training: small, quick, and for both ways of mixing pixels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastattn
from examples.nvae.__main__ import (
    LEAST_STEPS,
    MOST_STEPS,
    affordable_steps,
    parse,
    steps_within,
)
from examples.nvae.baselines import PlainVAE, factorised_nats
from examples.nvae.cells import MIXERS, LinearAttention2d, make_mixer
from examples.nvae.data import Images, binarise
from examples.nvae.evaluate import evaluate
from examples.nvae.exact import Bernoulli
from examples.nvae.model import NVAE, Shape, reestimate_batch_norm
from examples.nvae.training import (
    Settings,
    balance,
    batches,
    fit,
    kl_coefficient,
    learning_rate,
    matrices,
    others,
)

SMALL = Shape(size=8, channels=8, max_channels=8, latent_channels=4, groups=(1, 2))


def stripes(count: int = 60, levels: int = 2) -> Images:
    """Images of one bright row: four bits of information at most."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[torch.arange(count), 0, torch.randint(8, (count,), generator=generator)] = levels - 1
    return Images("stripes", images[:-12], images[-12:], levels)


def small(**changes: object) -> NVAE:
    torch.manual_seed(0)
    return NVAE(replace(SMALL, **changes))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("levels, image_channels", [(2, 1), (256, 3)])
def test_shapes_and_gradients(mixer: str, flow: bool, levels: int, image_channels: int) -> None:
    model = small(mixer=mixer, flow=flow, levels=levels, image_channels=image_channels)
    x = torch.randint(levels, (5, image_channels, 8, 8)).float()
    said = model.encode(x)
    assert said.kl.shape == said.log_ratio.shape == (3, 5)
    if not flow:
        assert (said.kl >= 0).all()
    (said.kl.sum(0) - said.likelihood.log_prob(x)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith("bias"), name
    samples = model.decode(4).sample()
    assert samples.shape == (4, image_channels, 8, 8)
    assert samples.min() >= 0 and samples.max() <= levels - 1


def test_the_mean_log_ratio_is_the_kl() -> None:
    model = small().eval()
    x = torch.bernoulli(torch.full((1, 1, 8, 8), 0.3)).expand(4000, -1, -1, -1)
    with torch.no_grad():
        said = model.encode(x)
    # Later groups have another KL for each draw of the earlier: compare sums of means.
    error = (said.log_ratio - said.kl).std() / math.sqrt(4000)
    torch.testing.assert_close(
        said.log_ratio.mean(1), said.kl.mean(1), rtol=0, atol=float(5 * error)
    )


def test_posteriors_see_the_image_and_the_first_prior_is_standard() -> None:
    model = small().eval()
    first = model.groups[0]
    prior = first.prior_of(torch.randn(2, 8, 2, 2))
    assert not prior.mean.any() and not prior.log_std.any()
    one, two = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    with torch.no_grad():
        torch.manual_seed(0)
        a = model.encode(one)
        torch.manual_seed(0)
        b = model.encode(two)
    assert not torch.allclose(a.kl, b.kl)


def test_attention_sees_the_whole_image_and_where_things_are() -> None:
    torch.manual_seed(0)
    mixer = LinearAttention2d(16, 8)
    x = torch.randn(1, 16, 8, 8, requires_grad=True)
    mixer(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()  # of one corner, every pixel
    shifted = torch.roll(x.detach(), (2, 3), (2, 3))
    attention_only = LinearAttention2d(16, 8)
    nn.init.zeros_(attention_only.conv.weight)
    with torch.no_grad():
        moved = torch.roll(attention_only(x.detach()), (2, 3), (2, 3))
        assert not torch.allclose(attention_only(shifted), moved, atol=1e-4)


def test_attention_equals_plain_matrix_products() -> None:
    """Over pixels in row order."""
    torch.manual_seed(0)
    mixer = LinearAttention2d(128, 4).double()
    x = torch.randn(3, 128, 4, 4, dtype=torch.float64)
    query, key, value = mixer.query_key_value(x).chunk(3, 1)
    place = (mixer.rows + mixer.columns).chunk(2)

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(3, mixer.heads, -1, 16).mT

    q, k = (nn.functional.elu(heads(t)) + 1 for t in (query + place[0], key + place[1]))
    scores = q @ k.mT
    seen = (scores / scores.sum(-1, keepdim=True)) @ heads(value)
    right = mixer.conv(x) + mixer.out(seen.mT.reshape(3, -1, 4, 4))
    torch.testing.assert_close(mixer(x), right)
    assert mixer.heads == 2


def test_unknown_mixer_and_wrong_size() -> None:
    with pytest.raises(ValueError, match="mixer must be one of attention, conv; got 'mlp'"):
        make_mixer("mlp", 8, 8)
    with pytest.raises(
        ValueError, match="size must be a multiple of 4 for 1 halvings and 2 scales"
    ):
        replace(SMALL, size=10)


def test_reestimating_batch_norm_changes_the_writers_buffers_only() -> None:
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.manual_seed(0)
    reestimate_batch_norm(model, 0.7, count=20, batches=3)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed
    assert all(name.startswith(("groups", "ups", "after")) for name in changed)
    assert all(
        name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed
    )
    assert [m.training for m in model.modules()] == modes
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    first = next(m for m in model.groups.modules() if isinstance(m, nn.BatchNorm2d))
    assert int(first.num_batches_tracked) == 3


def test_warm_up() -> None:
    assert kl_coefficient(0, 1000) == 1e-4
    assert kl_coefficient(150, 1000) == pytest.approx(0.5)
    assert kl_coefficient(300, 1000) == kl_coefficient(999, 1000) == 1
    settings = Settings(steps=100, warm_up_steps=10)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3) and max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-4, rel=0.1)


def test_steps_that_a_machine_can_do() -> None:
    assert steps_within(200, 0.15) == 1300
    assert steps_within(200, 0.01) == MOST_STEPS and steps_within(200, 3.0) == LEAST_STEPS


def test_timing_uses_up_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert LEAST_STEPS <= affordable_steps(SMALL, stripes(), parse([])) <= MOST_STEPS
    assert torch.equal(torch.rand(3), expected)


def test_every_weight_is_trained_once() -> None:
    model = small(mixer="attention")
    shares = [others(model), matrices(model)]
    assert sorted(id(p) for share in shares for p in share) == sorted(map(id, model.parameters()))
    assert all(p.dim() > 1 and min(p.shape[:2]) > 1 for p in shares[1]) and len(shares[1]) > 10

    def loss(x: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
        said = model.encode(x)
        bound = (said.kl.sum(0) - said.likelihood.log_prob(x)).mean()
        return bound, float(bound.detach())

    before = [p.detach().clone() for p in model.parameters()]
    fit(model, loss, stripes(), Settings(steps=3, batch_size=24, orthogonal=True), True, "test")
    for old, new in zip(before, model.parameters()):
        assert new.grad is not None
        # What batch statistics take out again has a gradient of rounding alone.
        assert new.grad.abs().max() < 1e-6 or not torch.equal(old, new)
    assert sum(bool(p.grad.any()) for p in model.parameters()) > 0.8 * len(before)


def test_balancing() -> None:
    kl = torch.tensor([[4.0, 4.0], [1.0, 3.0], [2.0, 0.0]], requires_grad=True)
    sizes = [(2, 1), (4, 2), (4, 2)]
    assert torch.equal(balance(kl, sizes, 1.0), kl.sum(0))
    # Means 4, 2, 1 (+ 0.01); latents per group 4, 8, 8: so 4.01, 2.01 / 2, 1.01 / 2.
    factors = torch.tensor([4.01, 1.005, 0.505])
    factors = factors / factors.mean()
    total = balance(kl, sizes, 0.5)
    torch.testing.assert_close(total, 0.5 * (factors[:, None] * kl).sum(0))
    (gradient,) = torch.autograd.grad(total.sum(), kl)
    torch.testing.assert_close(gradient, 0.5 * factors[:, None].expand_as(kl))


def test_batches_cover_an_epoch_without_repeating() -> None:
    images = stripes(60)
    images = replace(images, train=torch.arange(48, dtype=torch.uint8).reshape(48, 1, 1, 1))
    epoch = torch.cat(list(batches(images, 20, 2))).flatten().tolist()
    assert len(set(epoch)) == 40
    assert sum(1 for _ in batches(images, 100, 7)) == 7  # a set smaller than a batch


def test_binarisation_has_the_grey_value_as_its_mean(seed: int) -> None:
    grey = torch.full((100, 1, 20, 20), 4, dtype=torch.uint8)
    assert float(binarise(grey, 17).mean()) == pytest.approx(0.25, abs=0.01)


def test_factorised_nats_of_coins() -> None:
    images = Images("coins", torch.ones(98, 1, 2, 2), torch.ones(3, 1, 2, 2), 3)  # all half grey
    assert factorised_nats(images) == pytest.approx(4 * math.log(2))


def test_evaluation_of_a_model_whose_likelihood_is_known() -> None:
    """One latent group that is ignored: bound, importance-weighted value and truth are one."""

    class Coins(nn.Module):
        def encode(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
            from examples.nvae.model import Encoded

            zeros = torch.zeros(1, len(x))
            return Encoded(Bernoulli(torch.zeros_like(x)), zeros, zeros)

    nats = evaluate(Coins().encode, stripes(), True, samples=4)
    assert nats.bound == pytest.approx(64 * math.log(2))
    assert nats.likelihood == pytest.approx(nats.bound) and nats.kl == (0.0,)


@pytest.mark.parametrize("kind", ["attention", "conv", "plain"])
def test_training_learns_and_the_tighter_bound_is_tighter(kind: str) -> None:
    images = stripes()
    torch.manual_seed(0)
    plain = kind == "plain"
    model = PlainVAE(1, 8, hidden=64, latents=4) if plain else small(mixer=kind)

    def loss(x: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
        said = model.encode(x)
        bound = (said.kl.sum(0) - said.likelihood.log_prob(x)).mean()
        return bound, float(bound.detach())

    before = evaluate(model.eval().encode, images, True, samples=8)
    settings = Settings(steps=60, batch_size=24, orthogonal=not plain)
    trained = fit(model, loss, images, settings, True, "test")
    after = evaluate(trained.encode, images, True, samples=8)
    assert not trained.training
    assert after.bound < 0.6 * before.bound
    assert after.likelihood <= after.bound
    assert after.likelihood > 0


def test_training_stops_where_the_loss_is_no_longer_finite() -> None:
    def loss(x: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
        return torch.zeros((), requires_grad=True), math.nan if step == 2 else 1.0

    with pytest.raises(FloatingPointError, match="nan at step 2"):
        fit(nn.Linear(1, 1), loss, stripes(), Settings(steps=5), True, "test")


def test_linear_attention_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = fastattn.linear_attention

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(fastattn, "linear_attention", counted)
    small(mixer="attention").encode(torch.zeros(2, 1, 8, 8))
    assert [tuple(shape) for shape in calls] == [(2, 1, 16, 16)] * 2 + [(2, 1, 64, 16)]
    calls.clear()
    small(mixer="conv").encode(torch.zeros(2, 1, 8, 8))
    assert not calls
