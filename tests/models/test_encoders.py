"""Every supported family: masks, training, saving, restoring; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import fastattn
from fastattn.models import NAME
from fastattn.models.transfer import attention_transfer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # with the usual 0.02 all attention is nearly uniform
}
FAMILIES = {
    "Albert": {**SIZES, "embedding_size": 16},
    "Bert": SIZES,
    "Camembert": SIZES,
    "DistilBert": {
        "vocab_size": 50, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64,
        "max_position_embeddings": 64,
    },
    "Electra": SIZES,
    "Roberta": SIZES,
}  # fmt: skip


def make(family: str, head: str = "Model"):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**FAMILIES[family])
    return getattr(transformers, f"{family}{head}")(config).eval()


def inputs(rows: int = 2, tokens: int = 11, padding: int = 4):
    ids = torch.randint(5, 50, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, tokens - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "t2r"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, feature_map: str) -> None:
    model = fastattn.linearize(make(family), feature_map)
    padded = inputs()
    with torch.no_grad():
        together = model(**padded).last_hidden_state[0, :7]
        alone = model(input_ids=padded["input_ids"][:1, :7]).last_hidden_state[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    layers = None if family == "Albert" else [0, 2]  # Albert's layers are one
    model = make(family, "ForSequenceClassification")
    fastattn.linearize(model, "hedgehog", layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = fastattn.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, loaded(**inputs()).logits)


def test_restore_gives_the_softmax_model_back() -> None:
    model = make("Bert")
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(**inputs()).last_hidden_state
        changed = fastattn.linearize(model, "hedgehog")(**inputs()).last_hidden_state
        after = fastattn.restore(model)(**inputs()).last_hidden_state
    assert not torch.allclose(before, changed, atol=1e-2)
    torch.testing.assert_close(before, after)
    assert list(model.state_dict()) == names and not hasattr(model.config, "fastattn")


def test_layers_that_are_left_out_keep_softmax() -> None:
    model = make("Bert")
    with torch.no_grad():
        softmax = model(**inputs()).last_hidden_state
        none = fastattn.linearize(model, layers=[])(**inputs()).last_hidden_state
    mask = inputs()["attention_mask"].bool()
    torch.testing.assert_close(softmax[mask], none[mask])


def test_registered_name_and_hidden_states() -> None:
    model = make("Bert")
    model.set_attn_implementation(NAME)
    output = model(**inputs(), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    output.last_hidden_state.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_linear_attention_cannot_do_raises() -> None:
    model = fastattn.linearize(make("Bert"))
    with pytest.raises(NotImplementedError, match="padding mask"):
        model(input_ids=inputs()["input_ids"], attention_mask=torch.ones(2, 1, 11, 11))
    with pytest.raises(ValueError, match="feature_map must be one of hedgehog"):
        fastattn.linearize(model, "magic")
    with pytest.raises(ValueError, match="layers must be within 0..2"):
        fastattn.linearize(model, layers=[3])
    mpnet = transformers.MPNetModel(transformers.MPNetConfig(**SIZES))
    with pytest.raises(NotImplementedError, match="not supported in MPNetModel"):
        fastattn.linearize(mpnet)


@pytest.mark.parametrize("method", ["hierarchical", "interpolate"])
def test_extended_positions(method: str) -> None:
    model = make("Bert")
    with torch.no_grad():
        before = model(**inputs()).last_hidden_state
        fastattn.extend_positions(model, 200, method)
        after = model(**inputs()).last_hidden_state
        assert (
            model(input_ids=torch.ones(1, 200, dtype=torch.long)).last_hidden_state.isfinite().all()
        )
    if method == "hierarchical":
        assert torch.equal(before, after)
    with pytest.raises(ValueError, match="method"):
        fastattn.extend_positions(model, 300, "magic")
    with pytest.raises(ValueError, match="length"):
        fastattn.extend_positions(model, 100)


def test_attention_transfer_trains_the_maps_alone() -> None:
    model = fastattn.linearize(make("Bert"), "hedgehog")
    with torch.no_grad():
        swapped = model(**inputs()).last_hidden_state
    frozen = {n: p.clone() for n, p in model.named_parameters() if "feature_map" not in n}
    losses = []
    with attention_transfer(model) as loss:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 6  # a query and a key map in each of three layers
        optimizer = torch.optim.Adam(trained, lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            value = loss(model, inputs(rows=8))
            value.backward()
            optimizer.step()
            losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.requires_grad for p in model.parameters())
    named = dict(model.named_parameters())
    assert all(torch.equal(value, named[name]) for name, value in frozen.items())
    with torch.no_grad():
        assert not torch.equal(model(**inputs()).last_hidden_state, swapped)
