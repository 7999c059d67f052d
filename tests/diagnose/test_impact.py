"""Perturbed masking against the double loop it stands for, and on structure that was planted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastattn.diagnose import agreement, impact_matrix

MASK = 1
SIZES = {
    "vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
LEARNS = {
    "initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def masked_language_model(attention: str = "softmax attention", **sizes: float) -> Any:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**{**SIZES, **sizes})).eval()
    if attention != "softmax attention":
        import fastattn

        fastattn.linearize(model, attention)
    return model


def naive(
    model: Any, ids: Tensor, metric: str, layer: int, spans: list[list[int]], **others: Tensor
) -> Tensor:
    """As the definition says: one input at a time, T^2 of them."""

    def reading(masked: list[int], unit: list[int]) -> Tensor:
        changed = ids.clone()
        changed[masked] = MASK
        with torch.no_grad():
            output = model(input_ids=changed[None], output_hidden_states=True, **others)
        if metric == "prob":
            log_probs = output.logits[0].log_softmax(-1)
            return sum(log_probs[i, ids[i]] for i in unit)
        return output.hidden_states[layer][0, unit].mean(0)

    result = torch.zeros(len(spans), len(spans), dtype=torch.float64)
    for i, row in enumerate(spans):
        for j, column in enumerate(spans):
            a, b = reading(row, row), reading([*row, *column], row)
            if metric == "prob":
                result[i, j] = a - b
            elif metric == "dist":
                result[i, j] = (a - b).norm()
            else:
                result[i, j] = 1 - torch.cosine_similarity(a, b, dim=0)
    return result


@pytest.mark.parametrize("attention", ["softmax attention", "elu"])
@pytest.mark.parametrize("metric", ["prob", "dist", "cos"])
def test_equals_the_double_loop(metric: str, attention: str, seed: int) -> None:
    # In float64: one minus a cosine of nearly 1 is mostly rounding in float32.
    model, ids = masked_language_model(attention).double(), torch.randint(2, 30, (9,))
    for layer, spans in ((-1, [[i] for i in range(9)]), (1, [[0, 1], [4], [3, 7, 8]])):
        got = impact_matrix(
            model, ids, MASK, metric=metric, layer=layer, spans=spans, tokens_per_batch=40
        )
        assert torch.equal(got.diagonal(), torch.zeros(len(spans), dtype=torch.float64))
        want = naive(model, ids, metric, layer, spans)
        assert (got - want).norm() <= 1e-9 * want.norm()
        assert (want - want.T).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("metric", ["prob", "dist"])
def test_a_pair_keeps_its_token_types(metric: str, seed: int) -> None:
    model, ids = masked_language_model().double(), torch.randint(2, 30, (9,))
    types, spans = torch.tensor([[0] * 5 + [1] * 4]), [[i] for i in range(9)]
    want = naive(model, ids, metric, -1, spans, token_type_ids=types)
    for given in (types, types[0]):
        got = impact_matrix(model, ids, MASK, metric=metric, token_type_ids=given)
        assert (got - want).norm() <= 1e-9 * want.norm()
    as_one_text = impact_matrix(model, ids, MASK, metric=metric)
    assert (as_one_text - want).norm() > 1e-3 * want.norm()


def test_band_computes_the_neighbours_alone(seed: int) -> None:
    model, ids = masked_language_model(), torch.randint(2, 30, (9,))
    whole, band = (impact_matrix(model, ids, MASK, band=band) for band in (None, 1))
    near = (torch.arange(9)[:, None] - torch.arange(9)).abs() <= 1
    assert (band - whole)[near].norm() <= 1e-5 * whole.norm()
    assert band[~near].isnan().all()


def test_runs_each_distinct_input_once(seed: int) -> None:
    model, ids = masked_language_model(), torch.randint(2, 30, (9,))
    inputs: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.extend(map(tuple, kwargs["input_ids"].tolist())),
        with_kwargs=True,
    )
    impact_matrix(model, ids, MASK)
    assert len(inputs) == len(set(inputs)) == 9 * 10 // 2
    inputs.clear()
    impact_matrix(model, ids, MASK, band=1)
    assert len(inputs) == 2 * 9 - 1


def test_nothing_where_attention_is_blocked(seed: int) -> None:
    """Two halves that can't see each other: no impact across but for rounding in float64."""
    model, ids = masked_language_model().double(), torch.randint(2, 30, (8,))
    half = torch.arange(8) // 4
    seen = (half[:, None] == half)[None, None]

    class Blocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
            mask = seen.expand(len(input_ids), 1, 8, 8)
            return self.model(input_ids=input_ids, attention_mask=mask, **options)

    for metric in ("prob", "dist"):
        matrix = impact_matrix(Blocked(), ids, MASK, metric=metric)
        assert matrix[half[:, None] != half].abs().max() < 1e-12
        inside = matrix[(half[:, None] == half) & ~torch.eye(8, dtype=bool)]
        assert inside.abs().min() > 1e-6


def test_a_planted_copy_is_found() -> None:
    """Trained on text whose second half repeats the first, the model gives each token its twin as
    the strongest impact; an untrained model does not."""
    torch.manual_seed(0)
    model, half = masked_language_model(**LEARNS), 5
    twin = torch.arange(2 * half).roll(half)

    def share_found() -> float:
        found = 0.0
        for _ in range(8):
            ids = torch.randint(2, 30, (half,)).repeat(2)
            matrix = impact_matrix(model, ids, MASK, metric="prob").fill_diagonal_(-torch.inf)
            found += float((matrix.argmax(1) == twin).double().mean()) / 8
        return found

    assert share_found() < 0.4  # chance is 1 / 9
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(250):
        ids = torch.randint(2, 30, (64, half)).repeat(1, 2)
        chosen = torch.rand(ids.shape) < 0.2
        labels = ids.masked_fill(~chosen, -100)
        optimizer.zero_grad()
        model(input_ids=ids.masked_fill(chosen, MASK), labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    assert share_found() >= 0.95


def test_agreement() -> None:
    torch.manual_seed(0)
    model, ids = masked_language_model().double(), torch.randint(2, 30, (9,))
    first = impact_matrix(model, ids, MASK)
    same = agreement(first, impact_matrix(model, ids, MASK))
    assert (same.spearman, same.top) == (1.0, 1.0)
    assert same.kendall == pytest.approx(1)
    other = agreement(first, impact_matrix(masked_language_model().double(), ids, MASK))
    assert other.spearman < 0.9
    reversed_order = agreement(first, -first)
    assert reversed_order.spearman == pytest.approx(-1)


def test_agreement_of_ties_is_none() -> None:
    zero, some = torch.zeros(3, 3), torch.tensor([[0.0, 2, 1], [1, 0, 1], [3, 1, 0]])
    assert math.isnan(agreement(zero, zero).top)
    assert math.isnan(agreement(torch.zeros(1, 1), torch.zeros(1, 1)).top)
    other = torch.tensor([[0.0, 2, 1], [1, 0, 5], [1, 3, 0]])
    assert agreement(some, other).top == 0.5  # rows 0 and 2: the middle one has no largest entry
    with pytest.raises(ValueError, match="of one shape"):
        agreement(zero[:0, :0], zero[:0, :0])


def test_probabilities_of_masked_language_models_alone() -> None:
    small = {"vocab_size": 30, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    encoder = masked_language_model().config
    tagger = transformers.BertForTokenClassification(encoder)
    for model in (decoder, tagger):
        with pytest.raises(ValueError, match="needs a masked-language-model head"):
            impact_matrix(model, torch.arange(2, 8), MASK, metric="prob")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: impact_matrix(m, ids, MASK, metric="l2"), "metric must be one of prob"),
        (lambda m, ids: impact_matrix(m, ids, MASK, spans=[[0], []]), r"spans\[1\] must hold"),
        (lambda m, ids: impact_matrix(m, ids, MASK, spans=[[9]]), r"positions in 0..8; got \[9\]"),
        (lambda m, ids: impact_matrix(m, ids.repeat(2, 1), MASK), r"one text, .*got \[2, 9\]"),
        (
            lambda m, ids: impact_matrix(m, ids, MASK, token_type_ids=torch.zeros(8)),
            r"token_type_ids must be 9 like input_ids; got \[8\]",
        ),
        (
            lambda m, ids: impact_matrix(m, ids, MASK, layer=9),
            r"layer must be within -\d..\d; got 9",
        ),
        (lambda m, ids: impact_matrix(m, ids, MASK, band=0), "band must be at least 1; got 0"),
        (lambda m, ids: impact_matrix(m, ids, None), "mask_token_id must be a token id; got None"),
        (lambda m, ids: impact_matrix(m, ids[:0], MASK), "at least 1 token and at most .* got 0"),
        (lambda m, ids: impact_matrix(m, ids.repeat(99), MASK), "model's positions; got 891"),
        (lambda m, ids: impact_matrix(m.bert, ids, MASK, metric="prob"), "head; BertModel has"),
        (lambda m, ids: agreement(torch.ones(2, 2), torch.ones(3, 3)), "of one shape"),
        (
            lambda m, ids: agreement(*[impact_matrix(m, ids, MASK, band=1)] * 2),
            "NaN entries: compute them without band",
        ),
    ],
)
def test_arguments(call: Callable[[Any, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(masked_language_model(), torch.arange(2, 11))
