"""Completeness on the real encoder: a test of every backward kernel, through a whole model.

Attributions add up to the change of the output only if each gradient on the path is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.diagnose import Attribution, attribute, similarity_to
from fastattn.diagnose.attribution import _path_ends, integrated_gradients
from fastattn.diagnose.texts import encode, forward
from fastattn.models import attention
from fastattn.ops import linear_attention

TEXT = "The film was a warm and funny surprise."
SMOOTH = [
    "exp",
    "softmax",
    "cosine",
    "efficient",
    "hedgehog",
]  # elu and relu have kinks in F, F' or F''
ATTENTION = ["softmax attention", "elu", *SMOOTH]


def gradients(
    make: Callable[..., Any], tokenizer: Any, name: str, dtype: torch.dtype, points: int = 100,
    baseline: str = "pad", text: str = TEXT,
) -> Attribution:  # fmt: skip
    model = make(name, dtype)
    reference = make("softmax attention", dtype)
    with torch.no_grad():
        fixed = reference(**tokenizer("A comedy that made everybody laugh.", return_tensors="pt"))
    objective = similarity_to(fixed.last_hidden_state[0].mean(0))
    options: dict[str, Any] = {"objective": objective, "points": points, "baseline": baseline}
    return attribute(model, tokenizer, [text], **options)[0]


@pytest.mark.parametrize(
    ("name", "baseline"), [*((name, "pad") for name in ATTENTION), ("elu", "mask"), ("elu", "zero")]
)
def test_float32(
    real_encoder: Callable[..., Any], real_tokenizer: Any, name: str, baseline: str
) -> None:
    found = gradients(real_encoder, real_tokenizer, name, torch.float32, baseline=baseline)
    assert abs(found.change) > 0.1
    assert found.gap <= 1e-5


@pytest.mark.parametrize(
    "text",
    [
        "Stocks fell sharply on Monday after the bank reported a loss.",  # 1.1e-5 with 100 points
        "How do I reset the password of my account?",
    ],
)
def test_elu_takes_twice_the_points(
    real_encoder: Callable[..., Any], real_tokenizer: Any, text: str
) -> None:
    """Its second derivative jumps at 0, so its error falls with the square of the points: on some
    texts, in float64 as in float32, it is just above 1e-5 with a hundred of them."""
    found = gradients(real_encoder, real_tokenizer, "elu", torch.float32, points=200, text=text)
    assert found.gap <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax attention", *SMOOTH])
def test_float64(real_encoder: Callable[..., Any], real_tokenizer: Any, name: str) -> None:
    found = gradients(real_encoder, real_tokenizer, name, torch.float64, points=300)
    assert found.gap <= 1e-12


@pytest.mark.parametrize("name", ["softmax attention", "elu", "relu", "exp"])
def test_float64_between_kinks(
    real_encoder: Callable[..., Any], real_tokenizer: Any, name: str
) -> None:
    """A hundred-thousandth of the path seldom has a kink in it, and without one two points are
    enough for any map: the kernels' gradients of elu and relu are exact where they exist."""
    model = real_encoder(name, torch.float64)
    inputs, special = encode(model, real_tokenizer, TEXT, None)
    end, start = _path_ends(model, real_tokenizer, inputs, special, "pad")
    objective = similarity_to(torch.linspace(-1, 1, 384, dtype=torch.float64))

    def at(embedded: torch.Tensor) -> torch.Tensor:
        return objective(*forward(model, inputs, embedded))

    gaps = []
    for place in torch.linspace(0.02, 0.98, 20, dtype=torch.float64):
        near, far = (start + (place + step) * (end - start) for step in (0, 1e-5))
        with torch.no_grad():
            change = float(at(far) - at(near))
        total = float(integrated_gradients(at, far, near, points=2).sum())
        gaps.append(abs(total - change) / abs(change))
    assert sorted(gaps)[len(gaps) // 2] <= 1e-8


def test_relu_agrees_with_the_reference(
    real_encoder: Callable[..., Any], real_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient jumps along the path, which no smooth rule integrates to 1e-5. The gap is the
    rule's then; that the kernel is right shows in equal attributions from the reference."""
    found = gradients(real_encoder, real_tokenizer, "relu", torch.float32)
    assert found.gap <= 2e-3
    reference = functools.partial(linear_attention, backend="reference")
    monkeypatch.setattr(attention, "linear_attention", reference)
    truth = gradients(real_encoder, real_tokenizer, "relu", torch.float32)
    assert torch.linalg.vector_norm(found.scores - truth.scores) <= 1e-3 * truth.scores.norm()


@pytest.mark.parametrize("broken", ["query", "key", "value"])
def test_a_missing_gradient_shows(
    real_encoder: Callable[..., Any], real_tokenizer: Any, monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:  # fmt: skip
    """The gate has teeth: without one of the three gradients the gap is a thousand times wider."""

    def detached(query: Any, key: Any, value: Any, **options: Any) -> Any:
        tensors = {"query": query, "key": key, "value": value}
        tensors[broken] = tensors[broken].detach()
        return linear_attention(**tensors, **options)

    monkeypatch.setattr(attention, "linear_attention", detached)
    assert gradients(real_encoder, real_tokenizer, "elu", torch.float32).gap > 1e-2
