"""Attention transfer: maps alone learn, softmax flows, and everything is put back."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.models import NAME
from fastattn.models.transfer import attention_transfer, relative_error
from tests.models.encoders import inputs, make


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_maps_alone_are_trained(family: str) -> None:
    model = fastattn.linearize(make(family), "hedgehog")
    with torch.no_grad():
        swapped = model(**inputs()).last_hidden_state
    frozen = {n: p.clone() for n, p in model.named_parameters() if "feature_map" not in n}
    losses = []
    with attention_transfer(model) as loss:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == (6 if family == "Bert" else 2)  # query and key, linear layers
        optimizer = torch.optim.Adam(trained, lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            value = loss(model, inputs(rows=8))
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.requires_grad for p in model.parameters())
    named = dict(model.named_parameters())
    assert all(torch.equal(value, named[name]) for name, value in frozen.items())
    assert model.config._attn_implementation == NAME
    with torch.no_grad():
        assert not torch.equal(model(**inputs()).last_hidden_state, swapped)


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_the_model_inside_is_the_softmax_one(family: str) -> None:
    """Local layers too: 30 tokens, of which they see nine."""
    model, batch = make(family), inputs(tokens=30)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        with attention_transfer(fastattn.linearize(model, "hedgehog")):
            got = model(**batch).last_hidden_state
    torch.testing.assert_close(got[real], expected[real], atol=2e-5, rtol=1e-5)


def test_position_ids_and_embeddings_are_handed_on() -> None:
    model, batch = fastattn.linearize(make("Bert"), "hedgehog"), inputs()
    flipped = torch.arange(11).flip(0)[None]
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    with attention_transfer(model) as loss:
        plain = loss(model, batch)
        assert abs(loss(model, {**batch, "position_ids": flipped}) - plain) > 1e-4
        torch.testing.assert_close(loss(model, embedded), plain)


def test_misuse_is_said_and_leaves_the_model_as_it_was() -> None:
    model = make("Bert")
    with pytest.raises(ValueError, match="call fastattn.linearize"), attention_transfer(model):
        pass
    assert model.config._attn_implementation == "sdpa"
    fastattn.linearize(model, "hedgehog", layers=[])
    with (
        pytest.raises(ValueError, match="no layer of the model is linear"),
        attention_transfer(model) as loss,
    ):
        loss(model, inputs())
    model.set_attn_implementation("sdpa")
    with attention_transfer(model):
        pass
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_two_at_once_keep_apart() -> None:
    one, two = (fastattn.linearize(make(family), "hedgehog") for family in ("Bert", "Roberta"))
    with attention_transfer(one) as loss_of_one:
        alone = loss_of_one(one, inputs()).item()
        with attention_transfer(two) as loss_of_two:
            assert loss_of_one(one, inputs()).item() == alone
            assert loss_of_two(two, inputs()).item() > 0


def test_padding_does_not_count() -> None:
    target, got = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    loss = relative_error(got, target, mask)
    got[0, :, 3:], target[0, :, 3:] = 100.0, -100.0
    torch.testing.assert_close(relative_error(got, target, mask), loss)
    assert relative_error(target, target, mask) == 0
