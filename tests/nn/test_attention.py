"""LinearAttention stands where nn.MultiheadAttention stood: same names, same call, no softmax."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastattn
from fastattn.nn import LinearAttention
from fastattn.nn import attention as attention_module

E, H, B, N = 32, 4, 3, 9
MAPS = ["elu", "relu", "exp", "softmax", "cosine", "efficient", "hedgehog", "t2r", "performer"]


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    pass


def make(**options) -> LinearAttention:
    module = LinearAttention(options.pop("embed_dim", E), H, batch_first=True, **options)
    with torch.no_grad():  # a bias that is zero hides a bias that is forgotten
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def by_hand(module: LinearAttention, query, key, value, *, mask=None, causal=False):
    """The quadratic formula in float64, written down without the op. mask: True = takes part."""
    module = copy.deepcopy(module).double()
    heads, groups = module.num_heads, module.num_heads // module.num_kv_heads
    kv = module.num_kv_heads * module.head_dim
    biases = [0, 0, 0] if module.in_proj_bias is None else module.in_proj_bias.split([E, kv, kv])
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.split([E, kv, kv])
    q, k, v = (
        (x.double() @ w.T + b).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases)
    )
    if module.query_feature_map is not None:
        q, k = module.query_feature_map(q), module.key_feature_map(k)
    else:
        q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT
    if causal:
        scores = scores.tril()
    if mask is not None:
        scores = scores * mask[:, None, None, :]
    out = (scores / scores.sum(-1, keepdim=True).clamp(min=1e-6)) @ v
    return module.out_proj(out.transpose(1, 2).reshape(*query.shape[:2], heads * module.head_dim))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def padding() -> torch.Tensor:
    """True = ignore, as nn.MultiheadAttention wants it."""
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0, 5:] = True
    mask[1, :2] = True
    return mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "t2r"])
def test_formula(feature_map: str, causal: bool) -> None:
    module, x = make(feature_map=feature_map, is_causal=causal), torch.randn(B, N, E)
    out, weights = module(x, x, x, padding())
    assert weights is None
    close(out, by_hand(module, x, x, x, mask=~padding(), causal=causal))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (20, 24), (None, 24)])
def test_cross_attention(kdim: int | None, vdim: int | None, bias: bool) -> None:
    module = make(kdim=kdim, vdim=vdim, bias=bias)
    query, key = torch.randn(B, 5, E), torch.randn(B, N, kdim or E)
    value = torch.randn(B, N, vdim or E)
    out, _ = module(query, key, value, key_padding_mask=padding())
    close(out, by_hand(module, query, key, value, mask=~padding()))


def test_grouped_heads() -> None:
    module, x = make(num_kv_heads=2, feature_map="hedgehog"), torch.randn(B, N, E)
    assert module.in_proj_weight.shape == (E + 2 * E // 2, E)
    close(module(x, x, x)[0], by_hand(module, x, x, x))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 20, "vdim": 24}])
def test_checkpoint_of_multihead_attention_loads(options: dict) -> None:
    theirs, ours = nn.MultiheadAttention(E, H, **options), LinearAttention(E, H, **options)
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    ours.load_state_dict(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_layouts_agree() -> None:
    module, x = make(), torch.randn(B, N, E)
    expected = module(x, x, x, padding())[0]
    for row in range(B):
        close(module(x[row], x[row], x[row], padding()[row])[0], expected[row])
    module.batch_first = False
    t = x.transpose(0, 1)
    close(module(t, t, t, padding())[0].transpose(0, 1), expected)
    key = t.clone()  # three products instead of one
    close(module(t, key, key, padding())[0].transpose(0, 1), expected)


@pytest.mark.parametrize("feature_map", MAPS)
def test_padding_changes_nothing(feature_map: str) -> None:
    module, x = make(feature_map=feature_map), torch.randn(B, N, E)
    out, _ = module(x, x, x, padding())
    close(out[0, :5], module(*3 * (x[:1, :5],))[0][0])
    close(out[1, 2:], module(*3 * (x[1:2, 2:],))[0][0])


def test_float_masks_mean_what_bool_masks_mean() -> None:
    module, x = make(), torch.randn(B, N, E)
    floats = torch.zeros(B, N).masked_fill(padding(), float("-inf"))
    assert torch.equal(module(x, x, x, floats)[0], module(x, x, x, padding())[0])
    with pytest.raises(ValueError, match="key_padding_mask must hold 0 .* and -inf"):
        module(x, x, x, floats + 0.5)
    with pytest.raises(TypeError, match="must be bool or floating point; got torch.int64"):
        module(x, x, x, padding().long())
    with pytest.raises(ValueError, match=r"must have shape \(3, 9\); got \(3, 8\)"):
        module(x, x, x, padding()[:, 1:])
    with pytest.raises(ValueError, match=r"must have shape \(9,\)"):
        module(x[0], x[0], x[0], padding())


def test_causal_masks_are_recognised_and_others_refused() -> None:
    module, x = make(), torch.randn(B, N, E)
    expected = module(x, x, x, is_causal=True)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    for given in (mask, mask.bool()):
        for hint in (False, True):
            assert torch.equal(module(x, x, x, attn_mask=given, is_causal=hint)[0], expected)
    nothing = torch.zeros(N, N)
    assert torch.equal(module(x, x, x, attn_mask=nothing)[0], module(x, x, x)[0])
    odd = mask.clone()
    odd[5, 2] = float("-inf")
    for wrong in (odd, mask.expand(B * H, N, N), mask + 1, mask.T):
        for hint in (False, True):
            with pytest.raises(ValueError, match="attn_mask must be the causal mask"):
                module(x, x, x, attn_mask=wrong, is_causal=hint)


def test_what_cannot_be_honoured_raises() -> None:
    module, x = make(), torch.randn(B, N, E)
    with pytest.raises(NotImplementedError, match="need_weights"):
        module(x, x, x, need_weights=True)
    for name in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(NotImplementedError, match=name):
            LinearAttention(E, H, **{name: True})
    for arguments, options, message in (
        ((E, 5), {}, "embed_dim must be a positive multiple of num_heads; got .* num_heads=5"),
        ((1024, 2), {}, "heads of size .* 512 are too large: at most 256"),
        ((E, H), {"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4; got 3"),
        ((E, H), {"feature_map": "magic"}, "feature_map must be a module or one of 'elu'"),
        ((E, H), {"feature_map": "identity"}, "needs normalize=False"),
        ((E, H), {"feature_map": "features"}, "needs normalize=False"),
        ((E, H), {"feature_map": "efficient", "is_causal": True}, "has no causal form"),
        ((E, H), {"feature_map": "cosformer"}, "needs max_length"),
        ((E, H), {"max_length": 7}, "max_length is for feature_map='cosformer'"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearAttention(*arguments, **options)
    for options, message in (
        ({"embed_dim": 32.0}, "embed_dim must be an integer; got 32.0"),
        ({"num_heads": True}, "num_heads must be an integer; got True"),
        ({"normalize": "yes"}, "normalize must be True or False; got 'yes'"),
        ({"is_causal": 1}, "is_causal must be True or False; got 1"),
        ({"eps": "small"}, "eps must be a number; got str"),
    ):
        with pytest.raises(TypeError, match=message):
            LinearAttention(**{"embed_dim": E, "num_heads": H, **options})
    for options, message in (
        ({"eps": -1.0}, "eps must be at least 1e-30; got -1.0"),
        ({"dropout": 2.0}, "dropout must be within 0..1; got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearAttention(E, H, **options)
    for arguments, options, message in (
        ((x, None, x), {}, "key must be a torch.Tensor; got None"),
        (([x], x, x), {}, "query must be a torch.Tensor; got list"),
        ((x, x, x, [True]), {}, "key_padding_mask must be a torch.Tensor; got list"),
        ((x, x, x), {"attn_mask": [True]}, "attn_mask must be a torch.Tensor; got list"),
        ((x.half(), x, x), {}, "query must be torch.float32 like the module's weights"),
    ):
        with pytest.raises(TypeError, match=message):
            module(*arguments, **options)
    with pytest.raises(ValueError, match=r"key must have shape \(B, tokens, 32\)"):
        module(x, x[..., :5], x)


def test_dropout_is_said_once() -> None:
    attention_module._say_no_dropout.cache_clear()
    with pytest.warns(UserWarning, match="dropout has no effect"):
        LinearAttention(E, H, dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearAttention(E, H, dropout=0.1)


def swap(module: nn.Module, **options) -> nn.Module:
    """Every nn.MultiheadAttention in ``module`` becomes ours with the same weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                ours = LinearAttention(E, H, batch_first=child.batch_first, **options)
                ours.load_state_dict(child.state_dict())
                setattr(parent, name, ours)
    return module


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer_does_not_take_the_softmax_fast_path(
    masked: bool, norm_first: bool, grad: bool
) -> None:
    layer = nn.TransformerEncoderLayer(
        E, H, 64, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    softmax = copy.deepcopy(layer).eval()
    swap(layer)
    x, mask = torch.randn(B, N, E), padding() if masked else None
    with torch.set_grad_enabled(grad):
        trained = layer.train()(x, src_key_padding_mask=mask)
        assert torch.equal(layer.eval()(x, src_key_padding_mask=mask), trained)
        assert not torch.allclose(softmax(x, src_key_padding_mask=mask), trained, atol=1e-3)


@pytest.mark.parametrize("swapped", ["before", "after"])
def test_encoder_does_not_take_the_nested_fast_path(swapped: str) -> None:
    """Swapped in after the encoder was built, it is handed nested tensors in evaluation."""
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    if swapped == "before":
        with pytest.warns(UserWarning, match="use_nested_tensor is False"):
            encoder = nn.TransformerEncoder(swap(layer), 2)
    else:
        encoder = swap(nn.TransformerEncoder(layer, 2))
    x, mask = torch.randn(B, N, E), torch.zeros(B, N, dtype=torch.bool)
    mask[0, 5:] = True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        trained = encoder.train()(x, src_key_padding_mask=mask)
        out = encoder.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out[~mask], trained[~mask])
    assert swapped == "before" or out[mask].count_nonzero() == 0  # it did go through nested ones


def test_causal_encoder_and_decoder_layer() -> None:
    encoder = swap(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(E, H, 64, dropout=0.0), 2, enable_nested_tensor=False
        )
    )
    decoder = swap(nn.TransformerDecoderLayer(E, H, 64, dropout=0.0))
    x, memory = torch.randn(N, B, E), torch.randn(6, B, E)
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    changed = x.clone()
    changed[5:] += 1
    for run in (
        lambda y: encoder(y, mask=mask),
        lambda y: decoder(y, memory, tgt_mask=mask, tgt_is_causal=True),
    ):
        assert torch.equal(run(x)[:5], run(changed)[:5])
        assert not torch.allclose(run(x)[5:], run(changed)[5:])
    ignored = torch.zeros(B, 6, dtype=torch.bool)
    ignored[:, 4:] = True
    close(decoder(x, memory, memory_key_padding_mask=ignored), decoder(x, memory[:4]))


@pytest.mark.parametrize("feature_map", ["elu", "cosine", "hedgehog", "performer"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stream_equals_the_whole(batch_first: bool, feature_map: str) -> None:
    module = make(feature_map=feature_map, is_causal=True, num_kv_heads=2)
    module.batch_first = batch_first
    x = torch.randn(B, N, E) if batch_first else torch.randn(N, B, E)
    dim = 1 if batch_first else 0
    whole = module(x, x, x)[0]
    state = module.zero_state(B)
    places = [x.data_ptr() for x in state]
    parts = [module.step(part, state) for part in x.split([4, 1, 3, 1], dim)]
    close(torch.cat(parts, dim), whole)
    assert [x.data_ptr() for x in state] == places  # in place, so a graph can be captured


def test_steps_that_cannot_be() -> None:
    x = torch.randn(B, 1, E)
    for module, error, message in (
        (make(feature_map="cosformer", max_length=20), NotImplementedError, "counts positions"),
        (make(feature_map="efficient"), ValueError, "no running state"),
        (make(kdim=20), ValueError, "key must have shape"),
    ):
        with pytest.raises(error, match=message):
            module.step(x, make().zero_state(B))
    with pytest.raises(ValueError, match=r"x must have shape \(B, n, embed_dim\)"):
        make().step(x[:, 0], make().zero_state(B))


def test_own_module_as_feature_map() -> None:
    phi = nn.Sequential(nn.Linear(E // H, 12), nn.Softplus())
    module, x = make(feature_map=phi), torch.randn(B, N, E)
    close(module(x, x, x)[0], by_hand(module, x, x, x))
    assert module.zero_state(2).S.shape == (2, H, 12, E // H)
    module(x, x, x)[0].sum().backward()
    assert phi[0].weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "performer"])
def test_gradients_of_every_parameter(feature_map: str) -> None:
    module, x = make(feature_map=feature_map), torch.randn(B, N, E)
    target = torch.randn(B, N, E)
    grads = []
    for run in (lambda m: m(x, x, x, padding())[0], None):
        module.zero_grad()
        out = run(module) if run else None
        if run is None:
            double = copy.deepcopy(module).double()
            q, k, v = double._project(*3 * (x.double(),))
            q, k = double._features(q, k)
            out = fastattn.linear_attention(
                q, k, v, key_mask=~padding(), backend="reference", **double._options
            )
            out = double._output(out)
            parameters = list(double.parameters())
        else:
            parameters = list(module.parameters())
        loss = (out * target).sum()
        grads.append(torch.autograd.grad(loss, parameters))
    for got, wanted in zip(*grads):
        close(got, wanted, 1e-4)


@pytest.mark.parametrize("feature_map, dynamic", [("elu", False), ("hedgehog", True)])
def test_compiles_whole(feature_map: str, dynamic: bool) -> None:
    module, x = make(feature_map=feature_map), torch.randn(B, N, E)
    floats = torch.zeros(B, N).masked_fill(padding(), float("-inf"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for mask in (None, padding(), floats):
        module.zero_grad()
        expected = module(x, x, x, mask)[0]
        expected.square().sum().backward()
        wanted = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        out = compiled(x, x, x, mask)[0]
        out.square().sum().backward()
        torch.testing.assert_close(out, expected)
        for parameter, grad in zip(module.parameters(), wanted):
            torch.testing.assert_close(parameter.grad, grad)
    torch.compiler.reset()


def test_autocast_and_other_types() -> None:
    torch.manual_seed(0)  # how far rounding carries depends on the numbers
    x = torch.randn(B, N, E)
    for feature_map in ("elu", "hedgehog", "t2r", "performer"):
        module = make(feature_map=feature_map)
        exact = module(x, x, x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x, x, x, padding())[0]
        assert out.dtype == torch.bfloat16
        half = module.to(torch.bfloat16)(*3 * (x.bfloat16(),))[0]
        assert half.dtype == torch.bfloat16
        close(half.float(), exact, 0.05)
    with torch.device("meta"):
        assert LinearAttention(E, H, feature_map="t2r").in_proj_weight.is_meta


def test_survives_copy_and_pickle(tmp_path) -> None:
    module, x = make(feature_map="hedgehog", num_kv_heads=2), torch.randn(B, N, E)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for other in (copy.deepcopy(module), loaded):
        assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])
    assert "(query_feature_map): Hedgehog()" in repr(module)
    assert "feature_map='" not in repr(module) and "num_kv_heads=2" in repr(module)


def test_integers_of_numpy() -> None:
    module, x = LinearAttention(np.int64(E), np.int32(H)), torch.randn(B, N, E)
    assert module(x, x, x)[0].shape == x.shape
    assert type(module.num_heads) is int
