"""A model against itself, against a damaged copy, and against what can't be compared."""

from __future__ import annotations

import copy
import functools
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastattn
from fastattn.diagnose import attribute, compare
from fastattn.diagnose.ranks import top_overlap

TEXTS = ["the film was great with a happy actor", "a dull plot and this scene was poor"]


@pytest.fixture
def model_and_tokenizer(classifier: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    return model.train(), transformers.AutoTokenizer.from_pretrained(classifier)


def test_a_model_agrees_with_itself(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    model.double()  # in float32 the alignment of memory may round a product otherwise
    comparison = compare(model, copy.deepcopy(model), tokenizer, TEXTS)
    summary = comparison.summary()
    assert summary["spearman"] == summary["top_overlap"] == 1
    assert summary["kendall"] == pytest.approx(1)
    assert summary["output_difference"] < 1e-12
    assert max(summary["original_gap"], summary["patched_gap"]) < 1e-4
    assert model.training and all(p.requires_grad for p in model.parameters()), "left as it was"
    assert all(p.grad is None for p in model.parameters())


def test_damage_lowers_the_agreement(model_and_tokenizer: tuple[Any, Any]) -> None:
    """Noise on the weights lowers the agreement, more noise more so."""
    model, tokenizer = model_and_tokenizer
    correlations = []
    for noise in (0.01, 1.0):
        other = copy.deepcopy(model)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
        correlations.append(compare(model, other, tokenizer, TEXTS).summary()["spearman"])
    assert correlations[0] > 0.9 > correlations[1]


def test_encoders_without_a_head(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    encoder = model.bert
    linear = fastattn.linearize(copy.deepcopy(encoder))
    comparison = compare(encoder, linear, tokenizer, TEXTS, baseline="zero")
    for pair in comparison.pairs:
        assert pair.original.output == pytest.approx(1)  # the cosine to itself
        assert pair.patched.output < 1
        assert len(pair.original.tokens) == len(pair.original.scores)
    with pytest.raises(ValueError, match="one gives class logits and one does not"):
        compare(model, encoder, tokenizer, TEXTS)


def test_labels_must_be_the_same(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    other = copy.deepcopy(model)
    other.config.id2label = {0: "bad", 1: "good"}
    with pytest.raises(ValueError, match="same order; got good, bad and bad, good"):
        compare(model, other, tokenizer, TEXTS)


def test_pairs_targets_and_lengths(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    first, _ = attribute(model, tokenizer, TEXTS, target=[0, 1], points=20)
    assert len(first.word_scores) == len(TEXTS[0].split())
    with torch.no_grad():
        logits = model.eval()(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0]
    assert first.output == pytest.approx(float(logits[0]), abs=1e-5)
    (pair,) = attribute(model, tokenizer, [("the film", "was great")], points=20)
    assert pair.tokens == ["[CLS]", "the", "film", "[SEP]", "was", "great", "[SEP]"]
    assert [score == 0 for score in pair.scores] == pair.special
    (short,) = attribute(model, tokenizer, TEXTS[:1], points=20, max_length=5)
    assert len(short.tokens) == 5
    chunks = attribute(model, tokenizer, TEXTS[:1], target=0, points=20, tokens_per_chunk=1)
    torch.testing.assert_close(chunks[0].scores, first.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("max_length", [None, 500])
def test_more_tokens_than_positions(
    model_and_tokenizer: tuple[Any, Any], max_length: int | None
) -> None:
    model, tokenizer = model_and_tokenizer
    limit = model.config.max_position_embeddings
    text = "the film " * limit
    for call in (attribute, functools.partial(compare, model)):
        with pytest.raises(ValueError, match=f"max_length must be at most {limit}"):
            call(model, tokenizer, [text], max_length=max_length, points=2)


def test_arguments(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    for options, message in (
        ({"baseline": "noise"}, "baseline must be one of pad, mask, zero; got 'noise'"),
        ({"target": 2}, "target must be within 0..1; got 2"),
        ({"target": [0]}, "1 classes for 2 texts"),
        ({"target": 0, "objective": len}, "not both"),
        ({"points": 0}, "points must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(model, tokenizer, TEXTS, **options)
    with pytest.raises(ValueError, match="gives no class logits"):
        attribute(model.bert, tokenizer, TEXTS)
    with pytest.raises(ValueError, match="'' has no tokens"):
        attribute(model, tokenizer, [""])
    for call in (partial(attribute, model), partial(compare, model, model)):
        with pytest.raises(TypeError, match="texts must be a list of texts; got one string, 'cat'"):
            call(tokenizer, "cat")
        with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
            call(tokenizer, TEXTS, max_length=0)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        top_overlap(torch.ones(3), torch.ones(3), 0)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(model, model, tokenizer, [])


def test_one_word_has_no_rank(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    pair = compare(model, model, tokenizer, ["film"]).pairs[0]
    assert math.isnan(pair.spearman) and math.isnan(pair.top_overlap)


@pytest.mark.parametrize("package", ["captum", "scipy"])
def test_a_missing_package_names_the_extra(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    model, tokenizer = model_and_tokenizer
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastattn\[diagnose\]'"):
        compare(model, model, tokenizer, TEXTS).summary()
