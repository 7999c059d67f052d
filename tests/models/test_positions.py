"""``extend_positions``: the old positions stay, new ones are what the formula says."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastattn
from fastattn.models.positions import METHODS, position_limit
from tests.models.encoders import ABSOLUTE, NUMBERED_FROM_PADDING, inputs, make


def table(model) -> torch.nn.Embedding:
    return next(
        m.position_embeddings
        for m in model.modules()
        if isinstance(getattr(m, "position_embeddings", None), torch.nn.Embedding)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ABSOLUTE)
def test_long_inputs_are_read_and_short_ones_unchanged(family: str, method: str) -> None:
    model = make(family, pad_token_id=1) if family in NUMBERED_FROM_PADDING else make(family)
    limit = position_limit(model.config)
    assert limit == (62 if family in NUMBERED_FROM_PADDING else 64)
    with torch.no_grad():
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))
        before = model(**inputs()).last_hidden_state
        assert fastattn.extend_positions(model, 200, method) is model
        after = model(**inputs()).last_hidden_state
        assert torch.equal(before, after) == (method != "interpolate")
        assert position_limit(model.config) == 200
        assert model(input_ids=torch.full((1, 200), 5)).last_hidden_state.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 201), 5))
    assert table(model).weight.requires_grad
    assert table(model).padding_idx == (1 if family in NUMBERED_FROM_PADDING else None)
    model(input_ids=torch.full((1, 200), 5)).last_hidden_state.sum().backward()
    assert table(model).weight.grad[-1].count_nonzero() > 0


def test_hierarchical_formula() -> None:
    model = make("Bert")
    old = table(model).weight.detach().clone()
    fastattn.extend_positions(model, 64 * 64, alpha=0.3)
    new = table(model).weight
    base = (old - 0.3 * old[0]) / 0.7
    for i, j in ((0, 5), (1, 0), (7, 63), (63, 63)):
        torch.testing.assert_close(new[64 * i + j], 0.3 * base[i] + 0.7 * base[j])
    with pytest.raises(ValueError, match=r"at least the model's 4096 positions"):
        fastattn.extend_positions(model, 64)


def test_repeated_positions() -> None:
    model = make("Roberta", pad_token_id=1)
    old = table(model).weight.detach().clone()
    fastattn.extend_positions(model, 62**2 + 5, "repeat")
    new = table(model).weight
    for position in (0, 61, 62, 63, 130, 62**2 + 4):
        assert torch.equal(new[2 + position], old[2 + position % 62])


def test_interpolation_keeps_the_ends_and_the_order() -> None:
    model = make("Bert")
    old = table(model).weight.detach().clone()
    fastattn.extend_positions(model, 127, "interpolate")  # every second one is an old one
    torch.testing.assert_close(table(model).weight[::2], old)
    torch.testing.assert_close(table(model).weight[1::2], (old[1:] + old[:-1]) / 2)


def test_type_and_training_flag_are_kept() -> None:
    model = make("Bert").to(torch.bfloat16)
    table(model).weight.requires_grad_(False)
    fastattn.extend_positions(model, 100)
    assert table(model).weight.dtype == torch.bfloat16 and not table(model).weight.requires_grad


@pytest.mark.parametrize("method", ["hierarchical", "repeat"])
def test_positions_that_are_no_float32_numbers_stay(method: str) -> None:
    model = make("Bert").double()
    old = torch.rand_like(table(model).weight)
    table(model).weight.data = old.clone()
    fastattn.extend_positions(model, 100, method)
    assert torch.equal(table(model).weight[: len(old)], old)


@pytest.mark.parametrize("method", METHODS)
def test_gpt2_reads_longer_inputs_too(method: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ids = torch.randint(50, (1, 16))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        fastattn.linearize(fastattn.extend_positions(model, 100, method))
        assert model.generate(ids, max_new_tokens=84, do_sample=False).shape == (1, 100)
        after = fastattn.restore(model)(input_ids=ids).logits
    assert torch.equal(before, after) == (method != "interpolate")
    assert model.config.n_positions == position_limit(model.config) == 100


def test_padding_row_of_roberta_stays() -> None:
    model = make("Roberta", pad_token_id=1)
    old = table(model).weight.detach().clone()
    for method in METHODS:
        changed = fastattn.extend_positions(make("Roberta", pad_token_id=1), 150, method)
        assert torch.equal(table(changed).weight[:2], old[:2])
        assert len(table(changed).weight) == changed.config.max_position_embeddings == 152


def test_rotary_positions_have_no_limit() -> None:
    assert position_limit(make("ModernBert").config) is None
    assert position_limit(make("Bert").config) == 64


def test_bad_arguments() -> None:
    model = make("Bert")
    for arguments, message in (
        ((200, "magic"), "method must be one of hierarchical, repeat, interpolate; got 'magic'"),
        ((63,), "at least the model's 64 positions and at most 4096 .*; got 63"),
        ((4097,), "at most 4096 .their square.; got 4097"),
        ((100, "hierarchical", 0.5), "alpha must be between 0 and 1, and not 0.5"),
        ((100, "hierarchical", 1.0), "alpha must be"),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.extend_positions(model, *arguments)
    for length in (100.0, "100", True):
        with pytest.raises(TypeError, match=f"length: only integers are allowed; got {length!r}"):
            fastattn.extend_positions(model, length)
    with pytest.raises(NotImplementedError, match="rotary positions: it takes longer inputs"):
        fastattn.extend_positions(make("ModernBert"), 100)
    with pytest.raises(NotImplementedError, match="no learned absolute positions"):
        fastattn.extend_positions(torch.nn.Linear(2, 2), 100)
