"""Decoders: generation with a state of constant size gives what recomputing the prefix gives."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

import fastattn
from fastattn.models.cache import StateLayer
from fastattn.models.transfer import attention_transfer

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 512, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "is_decoder": True,
}  # fmt: skip
GPT2 = {
    "vocab_size": 60, "n_embd": 32, "n_head": 4, "n_positions": 512,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "GPT2": ("GPT2LMHeadModel", GPT2),
    "Bert": ("BertLMHeadModel", SIZES),
    "Roberta": ("RobertaForCausalLM", SIZES),
    "Electra": ("ElectraForCausalLM", {**SIZES, "embedding_size": 16}),
}


def make(family: str, feature_map: str | None = "elu", layers: int = 3):
    torch.manual_seed(0)
    name, sizes = MODELS[family]
    config = getattr(transformers, f"{family}Config")(**sizes, num_hidden_layers=layers)
    model = getattr(transformers, name)(config).eval()
    return model if feature_map is None else fastattn.linearize(model, feature_map)


def tokens(rows: int = 2, count: int = 7) -> torch.Tensor:
    return torch.randint(5, 60, (rows, count), generator=torch.Generator().manual_seed(1))


def logits_of(model, ids: torch.Tensor, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "cosine"])
@pytest.mark.parametrize("family", MODELS)
def test_generate_equals_recomputing_the_whole_prefix(family: str, feature_map: str) -> None:
    model = make(family, feature_map)
    options = {"max_new_tokens": 24, "do_sample": False}
    generated = model.generate(tokens(), **options)
    assert torch.equal(generated, model.generate(tokens(), use_cache=False, **options))
    if family == "Roberta":
        return  # generate numbers its positions otherwise than forward does, softmax or not
    ids = tokens()
    for _ in range(24):
        following = logits_of(model, ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    assert torch.equal(generated, ids)
    assert len(set(generated[0].tolist())) > 4  # not one token for ever


@pytest.mark.parametrize("family", MODELS)
def test_a_token_sees_no_later_one(family: str) -> None:
    model, ids = make(family), tokens()
    changed = ids.clone()
    changed[:, 5] = 59
    before, after = logits_of(model, ids), logits_of(model, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("family", MODELS)
def test_any_split_of_the_input_gives_the_same_logits(family: str) -> None:
    model, ids = make(family), tokens(count=12)
    whole = logits_of(model, ids)
    for cuts in ([5, 7], [1] * 12, [11, 1], [1, 11]):
        cache, parts = transformers.DynamicCache(config=model.config), []
        with torch.no_grad():
            for piece in ids.split(cuts, 1):
                name = _cache_argument(model)
                parts.append(model(input_ids=piece, use_cache=True, **{name: cache}).logits)
        assert all(type(layer) is StateLayer for layer in cache.layers)
        assert cache.get_seq_length() == 12
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_state_stays_the_same_memory_however_many_tokens() -> None:
    model = make("GPT2")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=True, **{_cache_argument(model): cache})
        states = [layer.state for layer in cache.layers]
        places = [(s.S.data_ptr(), s.z.data_ptr(), s.S.shape) for s in states]
        for _ in range(50):
            step = tokens(count=1)
            model(input_ids=step, use_cache=True, **{_cache_argument(model): cache})
    assert places == [
        (layer.state.S.data_ptr(), layer.state.z.data_ptr(), layer.state.S.shape)
        for layer in cache.layers
    ]
    assert all(layer.keys is None and layer.values is None for layer in cache.layers)


@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_left_padding_changes_nothing(family: str) -> None:
    model, ids = make(family), tokens(rows=1)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    positions = {} if family == "GPT2" else None
    if positions is None:  # BERT numbers padding too; give the positions
        positions = {"position_ids": (torch.arange(11) - 4).clamp_min(0)[None]}
        alone = logits_of(model, ids)
        together = logits_of(model, padded, attention_mask=mask, **positions)[:, 4:]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        return
    alone = model.generate(ids, max_new_tokens=12, do_sample=False)
    together = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(together[:, 4:], alone)


def test_beam_search_reorders_the_states() -> None:
    model = make("GPT2")
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    cached = model.generate(tokens(), use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **options))


def test_threads_that_share_a_model_do_not_share_its_states() -> None:
    model = make("GPT2")
    prompts = [tokens(rows=1, count=3 + i % 5) for i in range(16)]

    def generate(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=12, do_sample=False)

    expected = [generate(ids) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(generate, prompts), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("feature_map", ["elu", "hedgehog"])
def test_copies_and_pickles_decode_and_are_models_of_their_own(feature_map: str) -> None:
    model = make("GPT2", feature_map)
    expected = model.generate(tokens(), max_new_tokens=8, do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(tokens(), max_new_tokens=8, do_sample=False), expected)
        fastattn.restore(other).generate(tokens(), max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(tokens(), max_new_tokens=8, do_sample=False), expected)


def test_softmax_by_name_keeps_its_keys() -> None:
    """Of a linearised decoder, as to compare the two."""
    softmax = make("GPT2", None)
    model = fastattn.linearize(copy.deepcopy(softmax))
    model.set_attn_implementation("sdpa")
    generated = model.generate(tokens(), max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, softmax.generate(tokens(), max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_decoder_compiles_whole(family: str) -> None:
    model = make(family, "hedgehog", layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for count in (7, 12):
        expected = model(input_ids=tokens(count=count), use_cache=False).logits
        mask = torch.ones_like(tokens(count=count))
        got = compiled(input_ids=tokens(count=count), attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got, expected)
        got.sum().backward()
    torch.compiler.reset()


def test_saved_decoder_comes_back(tmp_path: Path) -> None:
    model = make("GPT2", "hedgehog")
    model.save_pretrained(tmp_path)
    loaded = fastattn.load(tmp_path)
    assert torch.equal(logits_of(model, tokens()), logits_of(loaded, tokens()))
    generated = loaded.generate(tokens(), max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, model.generate(tokens(), max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("family", MODELS)
def test_restored_decoder_is_the_softmax_one(family: str) -> None:
    softmax = make(family, None)
    model = fastattn.restore(fastattn.linearize(copy.deepcopy(softmax)))
    assert torch.equal(logits_of(softmax, tokens()), logits_of(model, tokens()))
    generated = model.generate(tokens(), max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, softmax.generate(tokens(), max_new_tokens=8, do_sample=False))


def test_decoder_trains() -> None:
    model = make("GPT2", "hedgehog").train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_attention_weights_and_other_masks_raise(family: str) -> None:
    model, ids = make(family), tokens(count=7)
    with pytest.raises(NotImplementedError, match="never forms its weights"):
        model(input_ids=ids, output_attentions=True)
    for shape in ((2, 6), (2, 8), (2, 1)):
        with pytest.raises(ValueError, match=rf"shape \(batch, 7\); got \(2, {shape[1]}\)"):
            model(input_ids=ids, attention_mask=torch.ones(shape))
    message = "GPT-2 flattens a mask of 3" if family == "GPT2" else r"got shape \(2, 7, 7\)"
    with pytest.raises((ValueError, NotImplementedError), match=message):
        model(input_ids=ids, attention_mask=torch.ones(2, 7, 7))
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, **{_cache_argument(model): cache})
    with pytest.raises(ValueError, match=r"those in the cache included: shape \(batch, 8\)"):
        model(
            input_ids=tokens(count=1),
            attention_mask=torch.ones(2, 1),
            use_cache=True,
            **{_cache_argument(model): cache},
        )


def test_packed_texts_raise_also_when_compiled() -> None:
    """Softmax keeps them apart where position_ids start again."""
    model, ids = make("GPT2", layers=1), tokens(count=13)
    packed = torch.tensor([[*range(6), *range(7)]])
    with pytest.raises(NotImplementedError, match="texts in one row apart; give each a row"):
        model(input_ids=ids, position_ids=packed, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = torch.arange(13)[None]
    expected = logits_of(model, ids)
    got = compiled(input_ids=ids, position_ids=plain, use_cache=False).logits
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="texts in one row apart"):
        compiled(input_ids=ids, position_ids=packed, use_cache=False)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_decoder_is_traced_with_positions() -> None:
    model, ids = make("GPT2").requires_grad_(False), tokens(count=13)

    def run(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    plain = torch.arange(13).expand(2, -1)
    traced = torch.jit.trace(run, (ids, plain), check_trace=False)
    torch.testing.assert_close(traced(ids, plain), run(ids, plain))


def test_a_decoder_is_not_made_bidirectional_in_silence() -> None:
    model = make("GPT2")
    with pytest.raises(NotImplementedError, match="is_causal=False: GPT2Attention is causal"):
        model(input_ids=tokens(), is_causal=False)
    model.config.is_causal = False
    with pytest.raises(NotImplementedError, match="is_causal=False: GPT2Attention"):
        model(input_ids=tokens())


def test_softmax_for_training_is_refused_in_decoders() -> None:
    model = make("GPT2", None)
    model.set_attn_implementation("fastattn_softmax")
    with pytest.raises(NotImplementedError, match='"fastattn_softmax" is not causal'):
        model(input_ids=tokens())


def test_what_a_decoder_cannot_do_raises() -> None:
    softmax = make("GPT2", None)
    with pytest.raises(NotImplementedError, match="all layers are made linear"):
        fastattn.linearize(copy.deepcopy(softmax), layers=[0])
    cache = transformers.DynamicCache(config=softmax.config)
    softmax(input_ids=tokens(), use_cache=True, **{_cache_argument(softmax): cache})
    linear = make("GPT2")
    with pytest.raises(ValueError, match="holds keys and values of softmax"):
        linear(input_ids=tokens(), use_cache=True, **{_cache_argument(linear): cache})
    with (
        pytest.raises(NotImplementedError, match="supported in encoders only"),
        attention_transfer(linear),
    ):
        pass
    with pytest.raises(NotImplementedError, match="supported in encoders only"):
        fastattn.Theseus(softmax, 1)


def _cache_argument(model) -> str:
    """transformers renamed it during 5.x."""
    import inspect

    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"
