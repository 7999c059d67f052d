"""``linearize`` and ``restore``: in place, reversible, every map, chosen layers."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch

import fastattn
from fastattn.models import NAME
from fastattn.models.conversion import MAPS
from fastattn.models.families import attention_modules
from fastattn.models.marks import is_linear
from tests.models.encoders import FAMILIES, inputs, make

LEARNED = ("hedgehog", "t2r", "performer")
FUSED = ("elu", "relu", "exp", "softmax", "cosine", "efficient")


@pytest.mark.parametrize("feature_map", [*LEARNED, *FUSED])
@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_padding_changes_nothing(family: str, feature_map: str) -> None:
    model = fastattn.linearize(make(family), feature_map)
    padded = inputs()
    with torch.no_grad():
        together = model(**padded).last_hidden_state[0, :7]
        alone = model(input_ids=padded["input_ids"][:1, :7]).last_hidden_state[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_maps_are_parameters_that_train(family: str) -> None:
    model = make(family)
    names = list(model.state_dict())
    assert fastattn.linearize(model, "hedgehog") is model
    added = [name for name in model.state_dict() if name not in names]
    linear = 1 if family in ("Albert", "ModernBert") else 3
    assert len(added) == 2 * linear and all(
        name in dict(model.named_parameters()) for name in added
    )
    assert [name for name in model.state_dict() if name in names] == names
    assert all(any(f".{map_name}." in name for map_name in MAPS) for name in added)
    model(**inputs()).last_hidden_state.square().sum().backward()
    for name in added:
        assert model.get_parameter(name).grad.count_nonzero() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_softmax_model_back(family: str) -> None:
    model = make(family)
    names, config = list(model.state_dict()), model.config.to_dict()
    real = inputs()["attention_mask"].bool()
    with torch.no_grad():
        before = model(**inputs()).last_hidden_state
        for feature_map in ("hedgehog", "performer", "elu"):
            changed = fastattn.linearize(model, feature_map)(**inputs()).last_hidden_state
            assert (before - changed)[real].abs().max() > 1e-2
        assert is_linear(model.config) and model.config.attn_implementation == NAME
        assert fastattn.restore(model) is model
        assert torch.equal(model(**inputs()).last_hidden_state, before)
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == config
    assert fastattn.restore(model) is model  # of a softmax model: nothing to do


def test_restore_goes_back_to_the_implementation_of_before() -> None:
    model = make("Bert")
    model.set_attn_implementation("eager")
    fastattn.linearize(fastattn.linearize(model), "t2r")
    assert fastattn.restore(model).config._attn_implementation == "eager"
    assert model(**inputs(), output_attentions=True).attentions[0].shape == (2, 2, 11, 11)


def test_layers_that_are_left_out_keep_softmax() -> None:
    model = make("Bert")
    real = inputs()["attention_mask"].bool()
    with torch.no_grad():
        softmax = model(**inputs(), output_hidden_states=True).hidden_states
        none = fastattn.linearize(model, layers=[])(**inputs()).last_hidden_state
        torch.testing.assert_close(none[real], softmax[-1][real])
        fastattn.linearize(model, "hedgehog", layers=[1])
        mixed = model(**inputs(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(mixed[1][real], softmax[1][real])
    assert (mixed[2] - softmax[2])[real].abs().max() > 1e-2
    has_maps = [hasattr(module, MAPS[0]) for module in attention_modules(model)]
    assert has_maps == [False, True, False]


def test_softmax_layers_keep_their_dropout() -> None:
    model = make("Bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    fastattn.linearize(model, layers=[0]).train()
    with torch.no_grad():
        states = [model(**inputs(), output_hidden_states=True).hidden_states for _ in range(2)]
    assert torch.equal(states[0][1], states[1][1])
    assert not torch.equal(states[0][2], states[1][2])


def test_hidden_states_are_captured_with_new_children() -> None:
    for captured_first in (False, True):
        model = make("Bert")
        if captured_first:
            model(**inputs(), output_hidden_states=True)
        fastattn.linearize(model, "hedgehog")
        assert len(model(**inputs(), output_hidden_states=True).hidden_states) == 4


def test_model_keeps_its_type_and_device_rules() -> None:
    model = fastattn.linearize(make("Bert").to(torch.bfloat16), "hedgehog")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        model = fastattn.linearize(make("Bert"), "t2r")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_copy_is_a_model_of_its_own() -> None:
    model = fastattn.linearize(make("Bert"), "hedgehog")
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**inputs()).last_hidden_state
        assert torch.equal(other(**inputs()).last_hidden_state, expected)
        fastattn.restore(other)
        assert torch.equal(model(**inputs()).last_hidden_state, expected)


def test_a_model_that_shares_its_config_is_not_made_linear_in_silence() -> None:
    teacher = make("Bert")
    student = type(teacher)(teacher.config)
    fastattn.linearize(student, "hedgehog")
    student(**inputs())
    with pytest.raises(ValueError, match=r"shares its config.*copy.deepcopy\(config\)"):
        teacher(**inputs())


@pytest.mark.parametrize("family, feature_map", [("Bert", "hedgehog"), ("ModernBert", "elu")])
def test_compiles_whole(family: str, feature_map: str) -> None:
    """Two layers, one of them softmax: torch takes long over a graph for all lengths."""
    changes = {"global_attn_every_n_layers": 2} if family == "ModernBert" else {}
    model = fastattn.linearize(make(family, num_hidden_layers=2, **changes), feature_map, [0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (11, 30):
        expected = model(**inputs(tokens=tokens)).last_hidden_state
        got = compiled(**inputs(tokens=tokens)).last_hidden_state
        torch.testing.assert_close(got, expected)
        got.sum().backward()
    torch.compiler.reset()


def test_bad_arguments() -> None:
    model = make("Bert")
    for feature_map in ("magic", "identity", "features", "cosformer"):
        with pytest.raises(ValueError, match="feature_map must be one of hedgehog, t2r, performer"):
            fastattn.linearize(model, feature_map)
    for layers in ([3], [-1], [0, 7]):
        with pytest.raises(ValueError, match="layers must be within 0..2; got"):
            fastattn.linearize(model, layers=layers)
    with pytest.raises(ValueError, match=r"within 0..0 \(its layers share their weights\)"):
        fastattn.linearize(make("Albert"), layers=[2])
    with pytest.raises(ValueError, match=r"layers \[1\] attend within a window.*linear: \[0\]"):
        fastattn.linearize(make("ModernBert"), layers=[0, 1])
    for layers in ([True], [0.0], ["0"]):
        with pytest.raises(TypeError, match=r"layers: only integers are allowed; got (T|0.0|'0')"):
            fastattn.linearize(model, layers=layers)
    assert not is_linear(model.config)
    assert model.config._attn_implementation == "sdpa"


def test_a_configuration_that_asks_for_weights_is_refused() -> None:
    model = make("Bert", output_attentions=True, attn_implementation="eager")
    with pytest.raises(ValueError, match="config.output_attentions is True"):
        fastattn.linearize(model)
    assert model.config._attn_implementation == "eager"


def test_integers_of_numpy_become_plain_ones() -> None:
    model = fastattn.linearize(make("Bert"), layers=numpy.array([2, 0]))
    layers = model.config.fastattn["layers"]
    assert layers == [0, 2] and {type(index) for index in layers} == {int}


@pytest.mark.parametrize("family", ["Bert", "Albert"])
def test_a_second_time_keeps_trained_maps(family: str) -> None:
    model = fastattn.linearize(make(family), "hedgehog")
    maps = {n: p for n, p in model.named_parameters() if "feature_map" in n}
    with torch.no_grad():
        for parameter in maps.values():
            parameter.add_(1)
    model.set_attn_implementation("sdpa")
    layers = list(range(len(attention_modules(model))))
    assert fastattn.linearize(model, "hedgehog", layers).config._attn_implementation == NAME
    again = dict(model.named_parameters())
    assert all(again[name] is parameter for name, parameter in maps.items())
    fastattn.linearize(fastattn.restore(model), "hedgehog")
    assert not any(torch.equal(model.get_parameter(name), maps[name]) for name in maps)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_model_gets_maps_of_the_other_weights_type() -> None:
    model = torch.ao.quantization.quantize_dynamic(make("Bert"), {torch.nn.Linear})
    fastattn.linearize(model, "hedgehog")
    assert model.encoder.layer[0].attention.self.query_feature_map.weight.dtype == torch.float32
    assert model(**inputs()).last_hidden_state.isfinite().all()
