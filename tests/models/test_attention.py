"""``attn_implementation="fastattn_linear"`` in every family: what it computes and refuses."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import transformers
from transformers import AttentionInterface

import fastattn
from fastattn.models import NAME
from fastattn.models import attention as attention_module
from fastattn.models.families import attention_modules
from tests.models.encoders import ABSOLUTE, DISTINCT, FAMILIES, NUMBERED_FROM_PADDING, inputs, make


def patched(family: str, head: str = "Model", **changes):
    model = make(family, head, **changes)
    model.set_attn_implementation(NAME)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_formula(family: str) -> None:
    """In every layer that is not local: phi(q) phi(k)^T v over its sum, by hand."""
    model = patched(family)
    seen = []

    def by_hand(module, query, key, value, attention_mask, **kwargs):
        out, weights = attention_module.linear_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        if getattr(module, "sliding_window", None) is None:
            q, k = (torch.where(x > 0, x + 1, x.exp()).double() for x in (query, key))
            scores = (q @ k.mT) * attention_mask[:, None, None, :]
            expected = (scores / scores.sum(-1, keepdim=True)) @ value.double()
            torch.testing.assert_close(out.transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)
            seen.append(module)
        return out, weights

    try:
        AttentionInterface.register(NAME, by_hand)
        model(**inputs())
    finally:
        AttentionInterface.register(NAME, attention_module.linear_forward)
    assert len(seen) == (1 if family == "ModernBert" else 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_for_training_is_the_model_s_own(family: str) -> None:
    model, given = make(family, "Model"), inputs()
    model.set_attn_implementation("sdpa")
    real = given["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**given).last_hidden_state[real]
        model.set_attn_implementation(attention_module.SOFTMAX)
        got = model(**given).last_hidden_state[real]
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def test_softmax_for_training_gives_no_weights() -> None:
    model = make("Bert")
    model.set_attn_implementation(attention_module.SOFTMAX)
    with pytest.raises(NotImplementedError, match='gives no weights: take "eager"'):
        model(**inputs(), output_attentions=True)
    with pytest.raises(NotImplementedError, match="is not causal, as BertSelfAttention must be"):
        model(**inputs(), is_causal=True)


def test_an_encoder_is_not_made_causal_in_silence() -> None:
    model = patched("Bert")
    with pytest.raises(NotImplementedError, match="is_causal=True: BertSelfAttention is not"):
        model(**inputs(), is_causal=True)
    model.config.is_causal = True
    with pytest.raises(NotImplementedError, match="is_causal=True: BertSelfAttention"):
        model(**inputs())


@pytest.mark.parametrize("tokens", [1, 17, attention_module.SHORT, attention_module.SHORT + 1])
def test_softmax_in_bfloat16_is_as_exact_as_that_of_torch(tokens: int) -> None:
    """Output and gradients, against float64: the plain products for short texts, too."""
    shape = (3, 2, tokens, 24)
    given = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    mask = torch.rand(3, tokens) < 0.7
    mask[:, 0] = True

    def run(attention, dtype: torch.dtype) -> list[torch.Tensor]:
        query, key, value = (x.to(dtype).requires_grad_() for x in given[:3])
        out = attention(query, key, value)
        grads = torch.autograd.grad(out, (query, key, value), given[3].to(dtype))
        return [x.double() for x in (out, *grads)]

    def ours(query, key, value):
        return attention_module.softmax(query, key, value, mask, 0.3)

    def plain(query, key, value):
        scores = ((query @ key.mT) * 0.3).masked_fill(~mask[:, None, None, :], -torch.inf)
        return scores.softmax(-1) @ value

    truth = run(plain, torch.float64)
    for got, theirs, true in zip(
        run(ours, torch.bfloat16), run(plain, torch.bfloat16), truth, strict=True
    ):
        assert (got - true).norm() <= 2 * (theirs - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, side: str) -> None:
    model = patched(family)
    padded = inputs(side=side)
    real = padded["attention_mask"][0].bool()
    if side == "left" and family not in NUMBERED_FROM_PADDING:  # those number positions so
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**padded).last_hidden_state[0, real]
        alone = model(input_ids=padded["input_ids"][:1, real]).last_hidden_state[0]
        softmax = make(family)(**padded).last_hidden_state[0, real]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together - softmax).abs().max() > 1e-2  # or nothing was swapped


@pytest.mark.parametrize("family", DISTINCT)
def test_compiles_whole_forward_and_backward(family: str) -> None:
    model = patched(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = inputs()
    expected = model(**batch).last_hidden_state
    expected.square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = compiled(**batch).last_hidden_state
    got.square().mean().backward()
    torch.testing.assert_close(got, expected)
    assert len(wanted) >= 20
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss(family: str) -> None:
    model = patched(family, "ForSequenceClassification").train()
    batch = {**inputs(8), "labels": torch.arange(8) % 2}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_captured(family: str) -> None:
    """Hooks are placed at the first capture and by class: neither must miss a layer."""
    for captured_first in (False, True):
        model = make(family)
        if captured_first:
            model(**inputs(), output_hidden_states=True)
        model.set_attn_implementation(NAME)
        output = model(**inputs(), output_hidden_states=True)
        assert len(output.hidden_states) == 4
        torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state)
        for one, other in itertools.combinations(output.hidden_states, 2):
            assert not torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_and_arbitrary_masks_raise(family: str) -> None:
    model, batch = patched(family), inputs()
    with pytest.raises(NotImplementedError, match="output_attentions.*fastattn.restore"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    for shape in ((2, 1, 11, 11), (2, 11, 11)):
        with pytest.raises((NotImplementedError, ValueError), match="mask"):
            model(input_ids=batch["input_ids"], attention_mask=torch.ones(shape))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_decoders_and_cross_attention_raise(family: str) -> None:
    with pytest.raises(NotImplementedError, match="cross-attention"):
        fastattn.linearize(make(family, is_decoder=True, add_cross_attention=True))
    for changes in ({"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}):
        model = make(family, **changes)
        model.set_attn_implementation(NAME)
        with pytest.raises(NotImplementedError, match="decoder|causal"):
            model(**inputs(padding=0))
        config = getattr(transformers, family + "Config")(**FAMILIES[family], **changes)
        with pytest.raises(NotImplementedError, match="decoder"):
            getattr(transformers, family + "Model")._from_config(config, attn_implementation=NAME)


def test_a_mask_function_of_the_models_own_raises() -> None:
    """transformers says so by use_vmap; a mask of its own would not be seen by the kernels."""
    mask = torch.ones(1, 4)
    assert attention_module.keep_2d_mask(attention_mask=mask) is mask
    with pytest.raises(NotImplementedError, match="takes a padding mask, no other mask function"):
        attention_module.keep_2d_mask(attention_mask=mask, use_vmap=True)


def test_other_models_raise_and_are_never_left_with_softmax() -> None:
    sizes = {k: v for k, v in FAMILIES["Bert"].items() if k != "pad_token_id"}
    mpnet = transformers.MPNetConfig(**sizes)
    with pytest.raises(NotImplementedError, match="not supported in MPNetModel.*supported: albert"):
        transformers.AutoModel.from_config(mpnet, attn_implementation=NAME)
    llama = transformers.LlamaConfig(**sizes)
    with pytest.raises(NotImplementedError, match="not supported in LlamaModel"):
        transformers.AutoModel.from_config(llama, attn_implementation=NAME)
    # The config keeps the name that was asked for above.
    model = transformers.AutoModel.from_config(transformers.MPNetConfig(**sizes))
    for name in (NAME, attention_module.SOFTMAX):
        for asked in (name, {"": name}):
            with pytest.raises(NotImplementedError, match=f"MPNetModel does not .*{name}.*albert"):
                model.set_attn_implementation(asked)
        assert model.config._attn_implementation != name
    model = transformers.AutoModel.from_config(llama, attn_implementation="sdpa")
    model.set_attn_implementation(NAME)
    with pytest.raises(NotImplementedError, match="LlamaAttention has no linear attention"):
        model(**inputs(padding=0))
    for stranger, error in ((torch.nn.Linear(2, 2), TypeError), (model, NotImplementedError)):
        with pytest.raises(error, match="model must be a transformers model|not supported"):
            fastattn.linearize(stranger)


def test_relative_positions_raise() -> None:
    model = make("Bert")
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(NotImplementedError, match="relative positions"):
        fastattn.linearize(model)


def test_attention_dropout_is_said_once() -> None:
    attention_module._say_no_dropout.cache_clear()
    model = patched("Bert").train()
    with pytest.warns(UserWarning, match="dropout has no effect"):
        model(**inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs())
        attention_module._say_no_dropout.cache_clear()
        patched("Bert", attention_probs_dropout_prob=0.0).train()(**inputs())
        patched("Bert")(**inputs())  # evaluation drops nothing


@pytest.mark.parametrize("reach", [0, 1, 2, 3])
def test_the_narrowest_windows_are_those_of_transformers(reach: int) -> None:
    """``local_attention`` 0 and 1 leave a token itself alone."""
    batch = inputs()
    real = batch["attention_mask"].bool()
    model = make("ModernBert", local_attention=reach)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        got = fastattn.linearize(model, layers=[])(**batch).last_hidden_state
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


def test_exports_with_any_length() -> None:
    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fastattn.linearize(make("Bert"), "hedgehog")

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    module, example = Hidden(), tuple(inputs().values())
    free = {i: torch.export.Dim(name, min=2, max=60) for i, name in enumerate(("rows", "tokens"))}
    exported = torch.export.export(module, example, dynamic_shapes=(free, free)).module()
    for rows, tokens in ((2, 5), (5, 29), (3, 32)):
        batch = tuple(inputs(rows, tokens).values())
        torch.testing.assert_close(exported(*batch), module(*batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9, 11, 30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_local_layers_are_the_softmax_of_transformers(tokens: int, side: str) -> None:
    """ModernBERT with no layer made linear: local layers in blocks, the others plain softmax."""
    batch = inputs(tokens=tokens, padding=min(4, tokens - 1), side=side)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = make("ModernBert")(**batch).last_hidden_state
        model = fastattn.linearize(make("ModernBert"), layers=[])
        got = model(**batch).last_hidden_state
        unmasked = model(input_ids=batch["input_ids"]).last_hidden_state
        plain = make("ModernBert")(input_ids=batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unmasked, plain, atol=1e-5, rtol=1e-5)


def test_local_layers_have_finite_gradients_beside_padding() -> None:
    model = fastattn.linearize(make("ModernBert"))
    batch = inputs(tokens=30, padding=25)
    model(**batch).last_hidden_state[batch["attention_mask"].bool()].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_bfloat16_and_autocast(family: str) -> None:
    batch = inputs()
    exact = patched(family)(**batch).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        mixed = patched(family)(**batch).last_hidden_state
    half = patched(family).to(torch.bfloat16)(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    for got in (mixed, half):
        assert (got.float() - exact)[real].norm() < 0.1 * exact[real].norm()


@pytest.mark.parametrize("family", ABSOLUTE)
def test_undone_by_name(family: str) -> None:
    model = make(family)
    with torch.no_grad():
        before = model(**inputs()).last_hidden_state
        model.set_attn_implementation(NAME)
        assert not torch.allclose(model(**inputs()).last_hidden_state, before, atol=1e-2)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(**inputs()).last_hidden_state, before)
    assert len(attention_modules(model)) == (1 if family == "Albert" else 3)
