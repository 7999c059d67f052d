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


def test_padding_does_not_count() -> None:
    target, got = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    loss = relative_error(got, target, mask)
    got[0, :, 3:], target[0, :, 3:] = 100.0, -100.0
    torch.testing.assert_close(relative_error(got, target, mask), loss)
    assert relative_error(target, target, mask) == 0
