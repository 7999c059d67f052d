"""A linearised checkpoint comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastattn
from fastattn.models import NAME
from fastattn.models.marks import is_linear
from tests.models.encoders import FAMILIES, inputs, make

ROOT = Path(__file__).parents[2]


def save(model, folder: Path) -> Path:
    """With every weight moved, so that one which is not loaded shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu", "performer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_comes_back_bit_for_bit(family: str, feature_map: str, tmp_path: Path) -> None:
    layers = [0] if family in ("Albert", "ModernBert") else [0, 2]
    model = fastattn.linearize(make(family, "ForSequenceClassification"), feature_map, layers)
    save(model, tmp_path / "one")
    expected = outputs(model)
    for load in (
        fastattn.load,
        type(model).from_pretrained,
        transformers.AutoModelForSequenceClassification.from_pretrained,
    ):
        loaded = load(tmp_path / "one")
        assert not loaded.training
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
        if load is fastattn.load:
            assert torch.equal(outputs(loaded), expected)
        torch.testing.assert_close(outputs(loaded), expected)
    loaded.save_pretrained(tmp_path / "two")  # what was loaded can be saved again
    assert torch.equal(outputs(fastattn.load(tmp_path / "two")), expected)
    assert not torch.allclose(outputs(fastattn.restore(loaded)), expected, atol=1e-3)


def test_other_types_and_sharded_files(tmp_path: Path) -> None:
    model = fastattn.linearize(
        make("Bert", "ForSequenceClassification").to(torch.bfloat16), "hedgehog"
    )
    model.save_pretrained(tmp_path / "half")
    loaded = fastattn.load(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16 and torch.equal(outputs(loaded), outputs(model))
    assert fastattn.load(tmp_path / "half", dtype=torch.float32).dtype == torch.float32
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert torch.equal(outputs(fastattn.load(tmp_path / "shards")), outputs(model))


def test_extended_positions_come_back(tmp_path: Path) -> None:
    model = fastattn.linearize(make("Roberta", "ForSequenceClassification"), "elu")
    fastattn.extend_positions(model, 200).save_pretrained(tmp_path)
    ids = torch.randint(5, 50, (1, 200))
    with torch.no_grad():
        assert torch.equal(fastattn.load(tmp_path)(ids).logits, model(ids).logits)


def test_backbone_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = fastattn.linearize(make("Bert", "ForSequenceClassification"), "hedgehog")
    model.save_pretrained(tmp_path)
    backbone = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.bert(**inputs()).last_hidden_state
        torch.testing.assert_close(backbone(**inputs()).last_hidden_state, expected)


LOAD = """
import sys, transformers
names = "AutoModel", "AutoModelForSequenceClassification", "BertForSequenceClassification"
for folder in sys.argv[1:]:
    for name in names:
        try:
            model = getattr(transformers, name).from_pretrained(folder)
            print(model.config._attn_implementation)
        except ValueError as error:
            print("refused:", error)
"""


def test_a_stranger_cannot_load_it_as_softmax(tmp_path: Path) -> None:
    """In a process that never imports fastattn, as whoever is handed the folder will do it."""
    folders = []
    for feature_map in ("hedgehog", "elu"):
        model = fastattn.linearize(make("Bert", "ForSequenceClassification"), feature_map)
        folders.append(str(tmp_path / feature_map))
        model.save_pretrained(folders[-1])
    stranger = LOAD + "assert not any(name.startswith('fastattn') for name in sys.modules)"
    for script, expected in (
        (stranger, f'refused: Specified `attn_implementation="{NAME}"` is not supported'),
        ("import fastattn.models\n" + LOAD, NAME),
    ):
        command = [sys.executable, "-c", script, *folders]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 6 and all(line.startswith(expected) for line in lines)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_is_refused(name: str, tmp_path: Path) -> None:
    fastattn.linearize(make("Bert", "ForSequenceClassification")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"linearised.*{name}.*fastattn.restore"):
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=name)


def test_linear_part_of_a_composite_model(tmp_path: Path) -> None:
    encoder = transformers.BertConfig(**FAMILIES["Bert"])
    decoder = transformers.BertConfig(**FAMILIES["Bert"], is_decoder=True, add_cross_attention=True)
    build = transformers.EncoderDecoderConfig.from_encoder_decoder_configs
    model = transformers.EncoderDecoderModel(build(encoder, decoder)).eval()
    fastattn.linearize(model.encoder, "hedgehog")
    save(model, tmp_path)
    message = "composite model.*attn_implementation={'encoder': 'fastattn_linear'}"
    with pytest.raises(ValueError, match=message):
        transformers.EncoderDecoderModel.from_pretrained(tmp_path)
    loaded = transformers.EncoderDecoderModel.from_pretrained(
        tmp_path, attn_implementation={"encoder": NAME}
    )
    given = {**inputs(), "decoder_input_ids": inputs()["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits, model(**given).logits)


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "performer"])
def test_maps_that_a_checkpoint_has_not_start_as_new_ones(feature_map: str, tmp_path: Path) -> None:
    """Softmax weights under a linear configuration, by transformers' own loading."""
    softmax = make("Bert")
    softmax.save_pretrained(tmp_path)
    config = fastattn.linearize(make("Bert"), feature_map).config
    loaded = transformers.BertModel.from_pretrained(tmp_path, config=config)
    for name, value in fastattn.linearize(softmax, feature_map).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_what_runs_softmax_is_not_saved_as_linear(tmp_path: Path) -> None:
    model = fastattn.linearize(make("Bert"), "elu")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"was linearised and now runs 'sdpa'.*fastattn.restore"):
        model.save_pretrained(tmp_path)
    fastattn.restore(model).save_pretrained(tmp_path)
    assert not is_linear(transformers.BertModel.from_pretrained(tmp_path).config)


def test_offloaded_maps_are_brought_back() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    model = fastattn.linearize(make("Bert", "ForSequenceClassification"), "hedgehog")
    expected = outputs(model)
    assert torch.equal(outputs(accelerate.cpu_offload(model)), expected)


def test_softmax_checkpoints_are_untouched(tmp_path: Path) -> None:
    model = make("Bert", "ForSequenceClassification")
    model.set_attn_implementation(NAME)  # by name: transformers keeps no names, and we don't here
    model.save_pretrained(tmp_path / "named")
    fastattn.restore(fastattn.linearize(model, "hedgehog")).save_pretrained(tmp_path / "restored")
    for folder in ("named", "restored"):
        loaded = type(model).from_pretrained(tmp_path / folder)
        assert loaded.config._attn_implementation == "sdpa" and not is_linear(loaded.config)
        with pytest.raises(ValueError, match="holds no linearised model: load it with from_pretr"):
            fastattn.load(tmp_path / folder)
    by_name = type(model).from_pretrained(tmp_path / "named", attn_implementation=NAME)
    model.set_attn_implementation(NAME)
    assert torch.equal(outputs(by_name), outputs(model))


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    model = fastattn.linearize(make("Bert", "ForSequenceClassification"), "hedgehog")
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="gone"):
        fastattn.load(tmp_path / "gone")

    weights, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    name = "bert.encoder.layer.1.attention.self.key_feature_map.weight"
    for kind, changed in (
        ("missing keys", {k: v for k, v in weights.items() if k != name}),
        ("unexpected keys", {**weights, "bert.extra": torch.zeros(2)}),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"don't fit: {kind} (bert.extra|{name})"):
            fastattn.load(tmp_path)
    save_file(weights, file, metadata={"format": "pt"})

    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"fastattn": "yes"}, "damaged field 'fastattn'"),
        ({"fastattn": {"feature_map": "hedgehog", "layers": [9]}}, "layers must be within"),
        ({"fastattn": {"feature_map": "magic", "layers": [0]}}, "feature_map must be one of"),
        ({"architectures": ["Nonsense"]}, "unknown class: Nonsense"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            fastattn.load(tmp_path)
