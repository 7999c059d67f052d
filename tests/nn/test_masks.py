"""What ``LinearAttention`` takes as masks and as nested tensors, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import LinearAttention


@pytest.fixture
def layer() -> LinearAttention:
    return LinearAttention(8, 2, batch_first=True).eval()


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "mask",
    [CAUSAL, torch.zeros(5, 5).masked_fill(CAUSAL, -torch.inf), CAUSAL.expand(6, 5, 5)],
    ids=["bool", "float", "of every head"],
)
def test_causal_masks(layer: LinearAttention, mask: Tensor) -> None:
    x = torch.randn(3, 5, 8)
    if mask.dim() == 3:
        with pytest.raises(ValueError, match="must be the causal mask"):
            layer(x, x, x, attn_mask=mask)
        return
    found, _ = layer(x, x, x, attn_mask=mask)
    assert torch.equal(found, layer(x, x, x, is_causal=True)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_another_size_are_refused(batch_first: bool) -> None:
    layer = LinearAttention(8, 2, batch_first=batch_first)
    x = torch.randn(3, 7, 8) if batch_first else torch.randn(7, 3, 8)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(7, 7\) or \(6, 7, 7\)"):
        layer(x, x, x, attn_mask=CAUSAL)
    one = torch.randn(7, 8)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(7, 4\) or \(2, 7, 4\)"):
        layer(one, one[:4], one[:4], attn_mask=torch.zeros(7, 7))
    assert layer(one, one[:4], one[:4], attn_mask=torch.zeros(7, 4))[0].shape == one.shape


def test_masks_of_integers_are_refused(layer: LinearAttention) -> None:
    x = torch.randn(3, 5, 8)
    with pytest.raises(TypeError, match="attn_mask must be bool or floating point"):
        layer(x, x, x, attn_mask=CAUSAL.int())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_nested_tensors(layer: LinearAttention, layout: torch.layout) -> None:
    rows = [torch.randn(n, 8) for n in (3, 1, 6)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    out, _ = layer(nested, nested, nested)
    for found, row in zip(out.unbind(), rows, strict=True):
        torch.testing.assert_close(found, layer(row, row, row)[0])
    if layout == torch.jagged:  # a residual needs the very same sizes
        assert (nested + out).unbind()[2].shape == (6, 8)
    with pytest.raises(ValueError, match="nested tensors need self attention"):
        layer(rows[0].unsqueeze(0), nested, nested)


@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "t2r", "performer"])
def test_nothing_at_all(feature_map: str) -> None:
    layer = LinearAttention(8, 2, batch_first=True, feature_map=feature_map)
    x = torch.randn(2, 5, 8)
    assert layer(x[:0], x[:0], x[:0])[0].shape == (0, 5, 8)
    assert layer(x[:, :0], x, x)[0].shape == (2, 0, 8)
    empty, _ = layer(x, x[:, :0], x[:, :0])
    assert torch.equal(empty, layer.out_proj.bias.expand(2, 5, 8))
    state = layer.zero_state(2)
    assert layer.step(x[:, :0], state).shape == (2, 0, 8)
    assert not state.S.any()
