"""Replacing, freezing and exporting: what runs when, what trains, and what comes out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fastattn
from fastattn.models.families import attention_modules
from fastattn.theseus import BlendSchedule, ConstantSchedule, LinearSchedule, Theseus
from tests.theseus.conftest import FAMILIES, inputs, make

MODES = {
    "fewer layers": {"num_layers": 2},
    "linear attention": {"attention": "linear"},
    "both": {"num_layers": 2, "attention": "linear"},
}


def logits(model: nn.Module, **changes) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(**changes)).logits


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_choose_between_predecessor_and_successor(family: str, mode: str) -> None:
    """With every gate shut a training pass is the predecessor's, with every gate open the
    exported successor's; in evaluation it always is the successor's."""
    predecessor = without_dropout(make(family))
    before = logits(predecessor)
    theseus = Theseus(predecessor, schedule=ConstantSchedule(0.0), **MODES[mode])
    successor = logits(theseus.export())
    assert not torch.allclose(before, successor, atol=1e-3)
    torch.testing.assert_close(logits(theseus.train()), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(theseus.eval()), successor)
    theseus.schedule = ConstantSchedule(1.0)
    torch.testing.assert_close(logits(theseus.train()), successor, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(predecessor), before)


def test_albert_attention_is_replaced_wherever_it_is_used() -> None:
    predecessor = make("Albert", embedding_size=16)
    theseus = Theseus(predecessor, attention="linear", schedule=ConstantSchedule(0.0))
    assert len(theseus.blocks) == 1
    torch.testing.assert_close(
        logits(without_dropout(theseus).train()), logits(predecessor), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(NotImplementedError, match="share one set of weights"):
        Theseus(predecessor, num_layers=2)


def test_each_pass_runs_what_its_draw_says() -> None:
    from fastattn.theseus.gates import draw

    theseus = Theseus(make(), num_layers=2, schedule=LinearSchedule(0.3, 0.05), seed=5).train()
    ran: list[str] = []
    for number, block in enumerate(theseus.blocks):
        for name in ("predecessor", "successor"):
            part = block.successor if name == "successor" else block.predecessor[0]
            part.register_forward_hook(lambda *_, n=number, w=name: ran.append(f"{n}{w[0]}"))
    for step in range(12):
        ran.clear()
        logits(theseus)
        gates = draw(5, step, 2, min(1.0, 0.3 + 0.05 * step))
        assert ran == [f"{n}{'s' if gate else 'p'}" for n, gate in enumerate(gates)]
        theseus.step()
    assert theseus.forwards == theseus.steps == 12


def test_blend_is_the_weighted_sum() -> None:
    predecessor = without_dropout(make())
    theseus = Theseus(predecessor, num_layers=1, schedule=BlendSchedule(4)).train()
    hidden = {}
    block = theseus.blocks[0]
    block.register_forward_hook(lambda _, args, output: hidden.update(x=args[0], y=output))
    theseus.step()
    logits(theseus)
    with torch.no_grad():
        mask = theseus.model.bert._create_attention_masks(
            inputs()["attention_mask"], None, hidden["x"], None, None
        )[0]
        old = hidden["x"]
        for layer in block.predecessor:
            old = layer(old, mask)
        new = block.successor(hidden["x"], mask)
    torch.testing.assert_close(hidden["y"], 0.75 * old + 0.25 * new)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_successor_trains_and_the_rest_stays_bit_for_bit(mode: str) -> None:
    theseus = Theseus(make(), schedule=ConstantSchedule(0.5), **MODES[mode]).train()
    before = copy.deepcopy(theseus.state_dict())
    trained = {n for n, p in theseus.named_parameters() if p.requires_grad}
    assert trained and all(".successor." in name for name in trained)
    optimizer = torch.optim.AdamW(theseus.parameters(), lr=0.01)
    for step in range(8):
        optimizer.zero_grad()
        theseus(**inputs(seed=step), labels=torch.tensor([0, 1, 0])).loss.backward()
        assert {n for n, p in theseus.named_parameters() if p.grad is not None} <= trained
        optimizer.step()
    for name, value in theseus.state_dict().items():
        if name in trained and "bias" not in name:
            assert not torch.equal(value, before[name]), name
        elif name not in trained and name != "_extra_state":
            assert torch.equal(value, before[name]), name


def test_a_pass_that_replaces_nothing_has_zero_gradients() -> None:
    theseus = Theseus(make(), num_layers=2, schedule=ConstantSchedule(0.0)).train()
    theseus(**inputs(), labels=torch.tensor([0, 1, 0])).loss.backward()
    for name, parameter in theseus.named_parameters():
        assert (parameter.grad is not None) == (".successor." in name)
        assert parameter.grad is None or not parameter.grad.any()


def test_predecessor_has_no_dropout() -> None:
    theseus = Theseus(make(), num_layers=2, schedule=ConstantSchedule(0.0)).train()
    for module in theseus.model.bert.embeddings.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theseus.model.dropout.p = 0.0
    assert torch.equal(logits(theseus), logits(theseus))


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_matching_trains_every_module_at_every_pass(rate: float) -> None:
    theseus = Theseus(make(), num_layers=2, match=2.0, schedule=ConstantSchedule(rate)).train()
    output = theseus(**inputs(), labels=torch.tensor([0, 1, 0]))
    labels_only = nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(output.loss, labels_only + 2.0 * output.matching_loss)
    output.loss.backward()
    assert all(p.grad is not None for n, p in theseus.named_parameters() if ".successor." in n)


def test_matching_loss_is_zero_where_successor_equals_predecessor_and_skips_padding() -> None:
    theseus = without_dropout(Theseus(make(), num_layers=4, match=1.0)).train()
    assert float(theseus(**inputs()).matching_loss.detach()) == pytest.approx(0.0, abs=1e-10)
    theseus = without_dropout(Theseus(make(), num_layers=2, match=1.0)).train()
    theseus.schedule = ConstantSchedule(0.0)
    padded = inputs(rows=1)
    alone = {name: value[:, :7] for name, value in padded.items()}
    torch.testing.assert_close(
        theseus(**padded).matching_loss, theseus(**alone).matching_loss, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_a_plain_model(family: str, mode: str, tmp_path: Path) -> None:
    predecessor = make(family)
    predecessor(**inputs(), output_hidden_states=True)  # transformers hooks the old layers
    theseus = Theseus(predecessor, **MODES[mode])
    theseus.eval()(**inputs())
    model = theseus.export()
    layers = MODES[mode].get("num_layers", 4)
    assert type(model) is type(predecessor)
    assert not any("theseus" in type(m).__module__ for m in model.modules())
    assert model.config.num_hidden_layers == layers
    assert torch.equal(logits(model), logits(theseus))
    output = model(**inputs(), output_hidden_states=True)
    assert len(output.hidden_states) == layers + 1
    model.save_pretrained(tmp_path)
    if mode == "fewer layers":
        loaded = type(model).from_pretrained(tmp_path).eval()
        attentions = (
            type(model)
            .from_pretrained(tmp_path, attn_implementation="eager")(
                **inputs(), output_attentions=True
            )
            .attentions
        )
        assert len(attentions) == layers
    else:
        loaded = fastattn.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_export_in_the_middle_changes_nothing() -> None:
    theseus = Theseus(make(), num_layers=2)
    before = copy.deepcopy(theseus.state_dict())
    first, second = theseus.export(), theseus.export()
    assert list(theseus.state_dict()) == list(before) and len(theseus.blocks) == 2
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert value.data_ptr() != second.state_dict()[name].data_ptr()


def test_exported_model_runs_without_fastattn(tmp_path: Path) -> None:
    import subprocess
    import sys

    Theseus(make(), num_layers=2).export().save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['fastattn'] = None\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        f"m = A.from_pretrained({str(tmp_path)!r}); print(len(m.bert.encoder.layer))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def test_pipeline_takes_the_export(tmp_path: Path) -> None:
    from tests.recipes.tiny import make_model

    folder = make_model(tmp_path / "tiny", labels=["good", "bad"])
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for mode in ({"num_layers": 1}, {"attention": "linear"}):
        model = Theseus(load(folder), **mode).export()
        pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
        assert pipe("the film is great")[0]["label"] in ("good", "bad")


def test_successor_starts_from_the_first_layer_it_replaces_or_from_the_first_of_all() -> None:
    predecessor = make()
    layers = predecessor.bert.encoder.layer

    def equal(one: nn.Module, two: nn.Module) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))

    spread = Theseus(predecessor, num_layers=2).export().bert.encoder.layer
    assert equal(spread[0], layers[0]) and equal(spread[1], layers[2])
    first = Theseus(predecessor, num_layers=2, first=True).export().bert.encoder.layer
    assert equal(first[0], layers[0]) and equal(first[1], layers[1])


def test_start_gives_the_successor_its_feature_maps() -> None:
    predecessor = make()
    fitted = fastattn.linearize(copy.deepcopy(predecessor), "hedgehog")
    with torch.no_grad():
        for name, parameter in fitted.named_parameters():
            if "feature_map" in name:
                parameter.normal_()
    whole = Theseus(predecessor, attention="linear", start=fitted)
    assert torch.equal(logits(whole.export()), logits(fitted))
    half = Theseus(predecessor, 2, "linear", start=fitted).export()
    got = half.bert.encoder.layer[1].attention.self.query_feature_map.weight
    assert torch.equal(got, fitted.bert.encoder.layer[2].attention.self.query_feature_map.weight)
    with pytest.raises(ValueError, match="other feature maps"):
        Theseus(predecessor, attention="linear", feature_map="t2r", start=fitted)


def test_linear_predecessor_loses_layers_and_keeps_its_maps(tmp_path: Path) -> None:
    predecessor = without_dropout(fastattn.linearize(make(), "hedgehog"))
    theseus = Theseus(predecessor, 2, "linear", schedule=ConstantSchedule(0.0)).train()
    torch.testing.assert_close(logits(theseus), logits(predecessor), rtol=1e-5, atol=1e-5)
    theseus.export().save_pretrained(tmp_path)
    assert torch.equal(logits(fastattn.load(tmp_path)), logits(theseus.eval()))
    with pytest.raises(ValueError, match="has linear attention"):
        Theseus(predecessor, 2)


@pytest.mark.parametrize("train", [("layers",), ("layers", "head"), ("embeddings", "head")])
def test_phase_two_trains_what_it_is_told(train: tuple[str, ...]) -> None:
    theseus = Theseus(make(), attention="linear").train()
    theseus.fine_tune(train)
    assert not theseus.blocks and theseus.share == 1.0
    for name, parameter in theseus.model.named_parameters():
        part = "layers" if ".layer." in name else "embeddings" if ".embed" in name else "head"
        assert parameter.requires_grad == (part in train), name
    assert torch.equal(logits(theseus.eval()), logits(theseus.export()))
    for given in (("everything",), "everything"):
        with pytest.raises(ValueError, match="got everything"):
            theseus.fine_tune(given)


def test_any_list_of_layers_the_user_names() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Module()
            self.body.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.body.parts:
                x = torch.tanh(part(x))
            return x

    class Wrapped(Theseus):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.set_gates()
            return self.model(x)

    stack = Stack()
    theseus = Wrapped(stack, 3, layers="body.parts").train()
    assert theseus(torch.ones(1, 4)).shape == (1, 4)
    assert len(theseus.export().body.parts) == 3
    with pytest.raises(ValueError, match="there is body.parts"):
        Theseus(stack, 3, layers="body.part")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_layers": 3}, ValueError, r"must divide the 4 layers \(1, 2, 4\); got 3"),
        ({"num_layers": 0}, ValueError, "must divide"),
        ({"num_layers": 8}, ValueError, "must divide"),
        ({"attention": "sparse"}, ValueError, "'softmax' or 'linear'; got 'sparse'"),
        ({"attention": "linear", "feature_map": "magic"}, ValueError, "feature_map"),
        ({"num_layers": 2, "match": -1.0}, ValueError, "match"),
        ({"num_layers": 2, "match": float("nan")}, ValueError, "match must not be negative"),
        ({"num_layers": 2, "feature_map": "elu"}, ValueError, "needs attention='linear'"),
        ({"num_layers": 2, "schedule": "linear"}, TypeError, r"LinearSchedule\(\); got 'linear'"),
        ({"num_layers": 2, "start": make(num_hidden_layers=1)}, ValueError, "is missing, not"),
        ({"num_layers": 2, "start": make(vocab_size=51)}, ValueError, r"is \(51, 32\), not"),
        ({"num_layers": 2, "linear_layers": [0]}, ValueError, "needs attention='linear'"),
        ({"attention": "linear", "linear_layers": [4]}, ValueError, r"within 0..3; got \[4\]"),
    ],
)
def test_bad_arguments_raise(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Theseus(make(), **arguments)


@pytest.mark.parametrize("match", [0.0, 1.0])
def test_a_model_that_returns_tuples(match: float) -> None:
    """Also where a draw replaces nothing, and the output gets zeros for the successor."""
    schedule = ConstantSchedule(0.0)
    theseus = Theseus(make(return_dict=False), 2, schedule=schedule, match=match).train()
    given = {**inputs(), "labels": torch.tensor([0, 1, 0])}
    theseus(**given).loss.backward()
    assert isinstance(theseus.eval()(**given), tuple)


@pytest.mark.parametrize("match", [0.0, 1.0])
def test_a_decoder_trains_without_a_cache(match: float) -> None:
    """Old and new layers would share its places."""
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=4, n_head=2, initializer_range=0.2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    predecessor = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": inputs()["input_ids"], "labels": inputs()["input_ids"]}
    theseus = Theseus(
        predecessor, 2, layers="transformer.h", schedule=ConstantSchedule(0.5), match=match
    ).train()
    drawn = set()
    for _ in range(8):
        output = theseus(**batch)
        shares = tuple(block.share for block in theseus.blocks)
        drawn.add(shares)
        assert output.past_key_values is None
        if not any(shares):
            loss = output.loss - match * output.get("matching_loss", 0)
            torch.testing.assert_close(loss, predecessor(**batch, use_cache=False).loss)
    assert (0.0, 0.0) in drawn and len(drawn) > 1
    for name, value in (("use_cache", True), ("cache", transformers.DynamicCache())):
        with pytest.raises(ValueError, match=f"keeps no cache; got {name}"):
            theseus(**batch, **{name: value})


def test_copies_of_data_parallel_are_refused() -> None:
    theseus = Theseus(make(), 2).train()
    theseus._is_replica = True  # as torch.nn.parallel.replicate leaves them
    with pytest.raises(NotImplementedError, match=r"nn.DataParallel.*torchrun"):
        theseus(**inputs())


def test_layers_that_the_configuration_does_not_count() -> None:
    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match=r"can't be saved with 2 layers in 'model.dec"):
        Theseus(model, 2, layers="model.decoder.layers")


def test_unsupported_models_raise() -> None:
    mpnet = make("MPNet")
    with pytest.raises(NotImplementedError, match="not supported in MPNet"):
        Theseus(mpnet, 2)
    assert len(Theseus(mpnet, 2, layers="mpnet.encoder.layer").blocks) == 2
    types = ["full_attention", "sliding_attention"] * 2
    mixed = make("ModernBert", hidden_activation="gelu", layer_types=types)
    with pytest.raises(NotImplementedError, match="of one kind"):
        Theseus(mixed, 2)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_branches_give_the_same(whole: bool) -> None:
    """``Theseus.compile`` and ``torch.compile`` of all: gates still decide, outside of graphs."""
    theseus = Theseus(without_dropout(make()), num_layers=2, schedule=ConstantSchedule(0.5)).train()
    passes = [logits(theseus) for _ in range(6)]
    theseus.forwards = 0
    if whole:
        run = torch.compile(theseus, backend="aot_eager")
    else:
        theseus.compile(backend="aot_eager")
        run = theseus
    for before in passes:
        torch.testing.assert_close(logits(run), before)
    assert len({tuple(p.flatten().tolist()) for p in passes}) > 1


@pytest.mark.parametrize("num_layers", [2, 4])
def test_chosen_layers_stay_softmax(num_layers: int, tmp_path: Path) -> None:
    predecessor = without_dropout(make())
    options = {"attention": "linear", "linear_layers": [1]}
    theseus = Theseus(predecessor, num_layers, schedule=ConstantSchedule(0.0), **options)
    assert len(theseus.blocks) == (1 if num_layers == 4 else 2)  # attention, or layers
    torch.testing.assert_close(logits(theseus.train()), logits(predecessor), rtol=1e-5, atol=1e-5)
    model = theseus.export()
    assert model.config.fastattn["layers"] == [1]
    maps = [hasattr(m, "query_feature_map") for m in attention_modules(model)]
    assert maps == [index == 1 for index in range(num_layers)]
    assert torch.equal(logits(model), logits(theseus.eval()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(fastattn.load(tmp_path)), logits(model))


def test_modernbert_replaces_attention_of_its_global_layers() -> None:
    """Its local layers are linear in the length already, so they keep softmax."""
    types = ["full_attention", "sliding_attention"] * 2
    predecessor = without_dropout(make("ModernBert", layer_types=types, local_attention=8))
    theseus = Theseus(predecessor, attention="linear", schedule=ConstantSchedule(0.0)).train()
    assert len(theseus.blocks) == 2
    torch.testing.assert_close(logits(theseus), logits(predecessor), rtol=1e-5, atol=1e-5)
    assert theseus.export().config.fastattn["layers"] == [0, 2]


def test_modernbert_with_layers_of_one_kind_loses_some(tmp_path: Path) -> None:
    predecessor = without_dropout(make("ModernBert", layer_types=["full_attention"] * 4))
    theseus = Theseus(predecessor, 2, schedule=ConstantSchedule(0.0)).train()
    torch.testing.assert_close(logits(theseus), logits(predecessor), rtol=1e-5, atol=1e-5)
    model = theseus.export()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))
    assert model.config.layer_types == ["full_attention"] * 2
