"""MLE-guided parameter search: exact where theory is exact, and it leaves no trace."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from fastattn.theseus.mgs import MGSCallback, SearchStep, mgs_step, search

few = pytest.mark.filterwarnings("ignore:fewer than 1.5 of:RuntimeWarning")

H = torch.tensor(
    [[1.6, 0.2, 0.0, 0.1], [0.2, 1.2, 0.2, 0.0], [0.0, 0.2, 0.9, 0.1], [0.1, 0.0, 0.1, 1.4]],
    dtype=torch.float64,
)
G = torch.tensor([0.9, -0.7, 0.6, 0.8], dtype=torch.float64)


class Point(nn.Module):
    """Four parameters at the origin of a quadratic with gradient G and Hessian H."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))


def quadratic(model: Point, batch: Any = None) -> Tensor:
    return G @ model.w + model.w @ H @ model.w / 2


def minus_quadratic(model: Point, batch: Any = None) -> float:
    return -float(quadratic(model))


def quiet(*args: Any, **kwargs: Any) -> SearchStep:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return mgs_step(*args, **kwargs)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def batch_of(rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    return float((model(batch[0]).argmax(1) == batch[1]).double().mean())


def test_a_quadratic_gets_newtons_step() -> None:
    """exp(-C) is a normal around -H^-1 g; with the exact density its mean comes out. The gradient,
    whatever its length, is far from it."""
    model = Point()
    step = mgs_step(
        model, quadratic, minus_quadratic, None, candidates=30_000, beta=1.0, noise=1.0,
        noise_unit="absolute", density="exact", max_norm=None, seed=0,
    )  # fmt: skip
    newton = torch.linalg.solve(H, -G)
    assert (-model.w.grad - newton).abs().max() < 0.02
    assert min((c * G + newton).abs().max() for c in torch.arange(0, 2, 0.05)) > 0.1
    assert step.effective_samples > 10_000


def test_unit_density_gives_a_damped_gradient_step() -> None:
    """With little noise q is the same at both centres, and only the metric weighs them."""
    model = Point()
    mgs_step(
        model, quadratic, minus_quadratic, None, candidates=2000, beta=1.0, noise=0.01,
        noise_unit="absolute", density="unit", max_norm=None, seed=0,
    )  # fmt: skip
    share = torch.sigmoid(G @ G - G @ H @ G / 2)
    assert (model.w.grad - share * G).abs().max() < 2e-3


@few
@pytest.mark.parametrize("density", ["unit", "none", "exact"])
@pytest.mark.parametrize("noise_unit", ["parameter", "gradient", "absolute"])
def test_the_update_is_the_weighted_mean_of_what_was_tried(density: str, noise_unit: str) -> None:
    """Against the changes that the metric itself saw, and q written out with distributions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batch = (batch_of()[0].double(), batch_of()[1])
    start = [p.detach().clone() for p in model.parameters()]
    cross_entropy(model, batch).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    tried: list[list[Tensor]] = []

    def metric(model: nn.Module, batch: Any) -> float:
        tried.append([p.detach() - s for p, s in zip(model.parameters(), start)])
        return accuracy(model, batch)

    noise = 0.3
    step = search(
        model, metric, batch, candidates=5, beta=3.0, noise=noise, noise_unit=noise_unit,
        density=density, seed=1,
    )  # fmt: skip
    assert not any(d.any() for d in tried[0])
    units = {
        "parameter": [w.square().mean().sqrt() for w in start],
        "gradient": [g.abs().mean() for g in gradients],
        "absolute": [torch.ones((), dtype=torch.float64) for _ in gradients],
    }
    scales = [(noise * u).expand_as(g) for u, g in zip(units[noise_unit], gradients)]
    log_weights = []
    for changes, candidate in zip(tried[1:], step.candidate_metrics):
        if density == "none":
            log_q = torch.zeros(())
        else:
            near = [
                sum(
                    torch.distributions.Normal(c * g, s if density == "exact" else 1.0)
                    .log_prob(d)
                    .sum()
                    for d, g, s in zip(changes, gradients, scales)
                )
                for c in (-1, 0)
            ]
            log_q = torch.logaddexp(near[0] + math.log(3 / 5), near[1] + math.log(2 / 5))
        log_weights.append(3.0 * (candidate - step.metric) - log_q)
    weights = torch.stack(log_weights).softmax(0)
    torch.testing.assert_close(step.weights, weights, rtol=1e-8, atol=1e-10)
    for i, parameter in enumerate(model.parameters()):
        mean = sum(w * changes[i] for w, changes in zip(weights, tried[1:]))
        torch.testing.assert_close(-parameter.grad, mean, rtol=1e-8, atol=1e-10)


def test_candidates_alternate_between_the_guided_and_the_free() -> None:
    model = Point()
    seen: list[Tensor] = []

    def metric(model: Point, batch: Any) -> float:
        seen.append(model.w.detach().clone())
        return 0.0

    mgs_step(
        model, quadratic, metric, None, candidates=4, noise=1e-6, noise_unit="absolute",
        max_norm=None, density="none",
    )  # fmt: skip
    for k, centre in enumerate([torch.zeros_like(G), -G, torch.zeros_like(G), -G, 0 * G]):
        assert (seen[k] - centre).abs().max() < 1e-5


def test_weights() -> None:
    gains = iter([0.5, 0.1, 0.9, 0.2, 0.3] * 3)

    def metric(model: Point, batch: Any) -> float:
        return next(gains)

    def step(**options: Any) -> SearchStep:
        return quiet(Point(), quadratic, metric, None, density="none", seed=0, **options)

    assert torch.equal(step(beta=0.0).weights, torch.full((4,), 0.25, dtype=torch.float64))
    sharp = step(beta=1e4)
    assert sharp.weights.tolist() == [0, 1, 0, 0]
    assert sharp.effective_samples == 1
    weights = step(beta=2.0).weights
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(weights, (2 * sharp.candidate_metrics).softmax(0))


@pytest.mark.parametrize("density", ["unit", "none", "exact"])
def test_a_constant_in_the_metric_changes_nothing(density: str) -> None:
    updates = []
    for constant in (0.0, 12.0):
        model = network()
        options = {"density": density, "seed": 3, "noise": 0.2, "noise_unit": "absolute"}

        def metric(model: nn.Module, batch: Any, constant: float = constant) -> float:
            return accuracy(model, batch) + constant

        quiet(model, cross_entropy, metric, batch_of(), **options)
        updates.append(model[0].weight.grad)
    torch.testing.assert_close(*updates)


@few
def test_nothing_but_the_gradients_changes() -> None:
    model = network().train()
    model[3].eval()  # a mode of its own survives as well
    cross_entropy(model, batch_of()).backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    search(model, accuracy, batch_of(), candidates=7, noise=3.0, seed=11)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model] == [True, True, True, False, True]
    assert model.training


def test_parameters_come_back_after_an_error() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    calls = iter([0.5, 0.5])

    def metric(model: nn.Module, batch: Any) -> float:
        return next(calls)  # the third call raises

    with pytest.raises(StopIteration):
        mgs_step(model, cross_entropy, metric, batch_of())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert model.training and torch.is_grad_enabled()


@few
def test_a_seed_repeats_and_torchs_generator_decides_without_one() -> None:
    def update(seed: int | None) -> Tensor:
        model = network(0)
        mgs_step(model, cross_entropy, accuracy, batch_of(), seed=seed)
        return model[0].weight.grad

    assert torch.equal(update(4), update(4))
    assert not torch.equal(update(4), update(5))
    assert torch.equal(update(None), update(None))


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    model = network()
    model[0].requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3))
    seen = []

    def metric(model: nn.Module, batch: Any) -> float:
        seen.append((model[0].weight.clone(), model.unused.clone()))
        return 0.0

    mgs_step(model, lambda m, b: cross_entropy(nn.Sequential(*list(m)[:5]), b), metric, batch_of())
    assert all(torch.equal(w, model[0].weight) and torch.equal(u, model.unused) for w, u in seen)
    assert model.unused.grad is None and model[0].weight.grad is None


def test_exact_density_collapses_in_many_dimensions_and_says_so() -> None:
    model = nn.Linear(100, 100)

    def loss(model: nn.Linear, batch: Any) -> Tensor:
        return model.weight.sum()

    options = {"noise": 1.0, "seed": 0, "candidates": 4}
    with pytest.warns(RuntimeWarning, match=r"fewer than 1.5 of 4 candidates count: lower beta"):
        step = mgs_step(model, loss, lambda m, b: 0.0, None, density="exact", **options)
    assert step.effective_samples < 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = mgs_step(model, loss, lambda m, b: 0.0, None, density="none", **options)
    assert step.effective_samples == 4


def test_it_improves_a_metric_that_has_no_gradient() -> None:
    """A loss that says nothing: only the metric can lead the way."""
    torch.manual_seed(0)
    model, batch = nn.Linear(6, 3), batch_of(256)
    before = accuracy(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for seed in range(60):
        quiet(
            model, lambda m, b: 0 * m(b[0]).sum(), accuracy, batch, candidates=8, beta=100.0,
            noise=0.1, noise_unit="absolute", density="none", seed=seed,
        )  # fmt: skip
        optimizer.step()
    assert accuracy(model, batch) > before + 0.3


def test_the_defaults_beat_cross_entropy_where_it_is_the_wrong_loss() -> None:
    """The cost that a missed 8 has ten times over: at most 0.75 of what as many steps of cross
    entropy reach, on the images trained on and on others."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from examples.mgs_digits import cost, fitted, go_on, load

    costs = []
    for seed in range(3):
        train, test = load(seed)
        ends = [go_on(fitted(train), train, method, seed) for method in (None, {})]
        costs.append([[cost(model, half) for model in ends] for half in (train, test)])
    (mle_train, mgs_train), (mle_test, mgs_test) = torch.tensor(costs).mean(0).tolist()
    assert mgs_train <= 0.75 * mle_train
    assert mgs_test < mle_test


@pytest.mark.parametrize(
    "options, error",
    [
        ({"candidates": 0}, "candidates must be at least 1; got 0"),
        ({"candidates": 2.0}, "candidates must be an int; got 2.0"),
        ({"beta": -1.0}, "beta must be finite and not negative; got -1.0"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"noise": 0.0}, "noise must be finite and positive; got 0.0"),
        (
            {"noise_unit": "weight"},
            "noise_unit must be one of parameter, gradient, absolute; got 'weight'",
        ),
        ({"density": "true"}, "density must be one of unit, none, exact; got 'true'"),
        ({"max_norm": 0.0}, "max_norm must be positive or None; got 0.0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        mgs_step(network(), cross_entropy, accuracy, batch_of(), **options)


def test_what_cannot_be_searched() -> None:
    model = network()
    with pytest.raises(ValueError, match="no parameter of model has a gradient"):
        search(model, accuracy, batch_of())
    with pytest.raises(ValueError, match="metric gave NaN"):
        mgs_step(model, cross_entropy, lambda m, b: math.nan, batch_of())
    model[0].weight.grad[0, 0] = math.inf
    with pytest.raises(ValueError, match="gradients are not finite"):
        search(model, accuracy, batch_of())
    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of 0\.weight is sparse"):
        search(sparse, accuracy, batch_of())


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        x, y = batch_of()
        return {"x": x[row], "labels": y[row]}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def classifier_accuracy(model: Classifier, batch: dict[str, Tensor]) -> float:
    return float((model(**batch)["logits"].argmax(1) == batch["labels"]).double().mean())


def train(folder: Path, stop_after: int | None = None, resume: bool = False) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop_after

    x, y = batch_of()
    batches = [{"x": x[:32], "labels": y[:32]}, {"x": x[32:], "labels": y[32:]}]
    callback = MGSCallback(classifier_accuracy, batches, candidates=3, beta=10.0)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, max_steps=8, save_steps=4,
        logging_steps=2, learning_rate=0.01, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(Classifier(), arguments, train_dataset=Rows(), callbacks=[callback, Stop()])
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_in_a_trainer_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(tmp_path / "whole")
    out = capsys.readouterr().out
    assert "mgs_metric" in out and "mgs_effective_samples" in out
    train(tmp_path / "cut", stop_after=4)
    resumed = train(tmp_path / "cut", resume=True)
    for one, two in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, two)


def test_the_callback_replaces_the_trainers_gradient(tmp_path: Path) -> None:
    model = Classifier()
    x, y = batch_of()
    batch = {"x": x, "labels": y}
    model(**batch)["loss"].backward()
    plain = model.layers[0].weight.grad.clone()
    callback = MGSCallback(classifier_accuracy, [batch], beta=10.0)
    args = type("Args", (), {"seed": 3, "fp16": False})
    callback.on_pre_optimizer_step(args, type("State", (), {"global_step": 0}), None, model=model)
    assert not torch.equal(model.layers[0].weight.grad, plain)
    logs: dict[str, float] = {}
    state = type("State", (), {"log_history": [{"loss": 1.0}]})
    callback.on_log(args, state, None, logs=logs)
    assert state.log_history == [{"loss": 1.0, **logs}]
    assert 1 <= logs["mgs_effective_samples"] <= 4 and 0 <= logs["mgs_metric"] <= 1


def test_what_the_callback_refuses() -> None:
    with pytest.raises(ValueError, match="batches must have at least one batch"):
        MGSCallback(classifier_accuracy, [])
    with pytest.raises(TypeError, match="seed from the Trainer's arguments"):
        MGSCallback(classifier_accuracy, [{}], seed=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'densty'"):
        MGSCallback(classifier_accuracy, [{}], densty="unit")
    with pytest.raises(ValueError, match="candidates must be at least 1; got 0"):
        MGSCallback(classifier_accuracy, [{}], candidates=0)
    with pytest.raises(ValueError, match="not fp16; use bf16"):
        MGSCallback(classifier_accuracy, [{}]).on_train_begin(
            type("Args", (), {"fp16": True}), None, None
        )
