"""The heads' proofs as tests: parallel = step, sums of one, the bound on greedy decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.generation import SelfTerminatingHead
from fastattn.generation.self_terminating import log1mexp

EOS, VOCABULARY = 2, 11
KINDS = ["nmst", "st"]


def by_the_book(logits: Tensor, epsilon: float, kind: str) -> Tensor:
    """The definitions, in float64, with probabilities instead of logarithms. (N, V)."""
    logits = logits.double()
    rows, before = [], 0.0  # p(eos) of the step before
    for t, row in enumerate(logits, start=1):
        z = row[EOS].sigmoid()
        if kind == "st":
            end = 1 - (1 - epsilon) * z * (1 - before)
        else:
            end = (1 - z) * (1 - (1 - epsilon) ** t) + z
        before = end
        others = row.clone()
        others[EOS] = -torch.inf
        probabilities = (1 - end) * others.softmax(-1)
        probabilities[EOS] = end
        rows.append(probabilities)
    return torch.stack(rows)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_definition_sums_and_lower_bound(kind: str, epsilon: float, seed: int) -> None:
    head = SelfTerminatingHead(EOS, epsilon, kind)
    logits = 3 * torch.randn(4, 40, VOCABULARY)
    probabilities = head.log_probs(logits).exp()
    torch.testing.assert_close(
        probabilities.double(), torch.stack([by_the_book(x, epsilon, kind) for x in logits]),
        atol=1e-6, rtol=1e-5,
    )  # fmt: skip
    assert (probabilities.sum(-1) - 1).abs().max() <= 1e-6
    ends = probabilities[..., EOS].double()
    t = torch.arange(1, 41, dtype=torch.float64)
    assert (ends >= 1 - (1 - epsilon) ** t - 1e-6).all()
    if kind == "st":
        assert (ends.diff(dim=1) >= -1e-6).all(), "st never takes the end back"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 50])
def test_parallel_form_is_the_step_form(kind: str, scale: float, seed: int) -> None:
    head = SelfTerminatingHead(EOS, 1e-3, kind)
    logits = scale * torch.randn(3, 300, VOCABULARY)
    parallel, carry, steps = head.log_probs(logits), None, []
    for t in range(300):
        step, carry = head.step(logits[:, t], carry)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), parallel, atol=1e-5, rtol=1e-5)


def adversaries() -> dict[str, Any]:
    return {
        "z as for never": lambda t, kind: 50.0 if kind == "st" else -50.0,
        "z as for always": lambda t, kind: -50.0 if kind == "st" else 50.0,
        "alternating": lambda t, kind: 50.0 * (-1) ** t,
        "random": lambda t, kind: 50.0 * float(torch.randn(())),
    }


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", adversaries())
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_decoding_ends_in_time(kind: str, name: str, epsilon: float, seed: int) -> None:
    """All other probability on one token, and z as hostile as it gets."""
    head = SelfTerminatingHead(EOS, epsilon, kind)
    bound = math.ceil(-math.log(2) / math.log1p(-epsilon))
    assert head.longest == bound
    carry = None
    for t in range(1, bound + 2):
        logits = torch.full((1, VOCABULARY), -50.0)
        logits[0, 5] = 50.0
        logits[0, EOS] = adversaries()[name](t, kind)
        log_probs, carry = head.step(logits, carry)
        if int(log_probs.argmax()) == EOS:
            break
    else:
        pytest.fail(f"no end after {t} tokens")
    if name == "z as for never":
        assert abs(t - bound) <= 1, "the bound is sharp"


@pytest.mark.parametrize("kind", KINDS)
def test_clock_that_starts_late(kind: str, seed: int) -> None:
    """Positions before the start leave no trace."""
    head = SelfTerminatingHead(EOS, 1e-2, kind)
    logits = torch.randn(2, 30, VOCABULARY)
    started = torch.arange(30).expand(2, -1) >= torch.tensor([[7], [0]])
    got = head.log_probs(logits, started)
    torch.testing.assert_close(got[0, 7:], head.log_probs(logits[:1, 7:])[0])
    torch.testing.assert_close(got[1], head.log_probs(logits[1:])[0])
    if kind == "st":
        assert (got[0, :7, EOS] == -torch.inf).all()
        others = logits[0, :7].clone()
        others[:, EOS] = -torch.inf
        torch.testing.assert_close(got[0, :7], others.log_softmax(-1))
    else:
        torch.testing.assert_close(got[0, :7, EOS].exp(), logits[0, :7, EOS].sigmoid())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str, seed: int) -> None:
    head = SelfTerminatingHead(EOS, 1e-2, kind)
    logits = (2 * torch.randn(2, 6, VOCABULARY, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (2, 6))
    labels[labels == EOS] = EOS + 1  # a single text a row
    labels[0, :3] = -100
    labels[1, -1] = EOS
    want = [by_the_book(logits[0, 3:].detach(), 1e-2, kind),
            by_the_book(logits[1].detach(), 1e-2, kind)]  # fmt: skip
    total = -sum(float(row[label].log()) for rows, tokens in zip(want, (labels[0, 3:], labels[1]))
                 for row, label in zip(rows, tokens))  # fmt: skip
    loss = head.loss(logits, labels)
    assert float(loss) == pytest.approx(total / 9, abs=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad.any()
    assert torch.autograd.gradcheck(head.loss, (logits.detach().requires_grad_(), labels))


def test_low_precision_and_extremes(seed: int) -> None:
    for kind in KINDS:
        head = SelfTerminatingHead(EOS, 1e-5, kind)
        logits = torch.randn(1, 4, VOCABULARY, dtype=torch.bfloat16)
        got = head.log_probs(logits)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, head.log_probs(logits.float()))
        for z in (-1e4, 0.0, 1e4):
            hostile = torch.zeros(1, 4, VOCABULARY)
            hostile[..., EOS] = z
            assert not head.log_probs(hostile).isnan().any()


def test_log1mexp_keeps_its_digits() -> None:
    a = -torch.logspace(-12, 2, 200, dtype=torch.float64)
    import mpmath

    mpmath.mp.dps = 100
    want = [float(mpmath.log(1 - mpmath.exp(mpmath.mpf(float(x))))) for x in a]
    torch.testing.assert_close(
        log1mexp(a), torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=0
    )
    zero = torch.zeros(1, requires_grad=True)
    value = log1mexp(zero)
    assert value == -torch.inf
    value.clamp(min=-5).sum().backward()
    assert zero.grad == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": -1}, "eos_token_id must be one token id; got -1"),
        ({"epsilon": 0}, r"epsilon must be in \(0, 1\); got 0"),
        ({"epsilon": 1.0}, "got 1.0"),
        ({"kind": "softmax"}, "kind must be one of nmst, st; got 'softmax'"),
        ({"clock": "wall"}, "clock must be one of generated, all; got 'wall'"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfTerminatingHead(**{"eos_token_id": EOS, **options})
