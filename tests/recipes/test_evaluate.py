"""Scores agree with scikit-learn; predictions come in the order of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastattn.recipes.data import find_files, load_task, tokenize
from fastattn.recipes.evaluate import (
    batches_by_length,
    confusion,
    evaluate,
    f1,
    matthews,
    predict,
)
from fastattn.recipes.training import Collator, model_inputs


@pytest.mark.parametrize("classes", [2, 5])
def test_matthews_agrees_with_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    labels = torch.randint(classes, (200,))
    predicted = torch.where(torch.rand(200) < 0.5, labels, torch.randint(classes, (200,)))
    expected = metrics.matthews_corrcoef(labels.numpy(), predicted.numpy())
    assert float(matthews(confusion(predicted, labels, classes))) == pytest.approx(
        expected, abs=1e-12
    )


def test_matthews_of_known_tables() -> None:
    labels = torch.tensor([0, 0, 1, 1])

    def score(*predicted: int) -> float:
        return float(matthews(confusion(torch.tensor(predicted), labels, 2)))

    assert score(0, 0, 1, 1) == pytest.approx(1.0)
    assert score(1, 1, 0, 0) == pytest.approx(-1.0)
    assert score(0, 0, 0, 0) == 0.0
    # TP 1, TN 2, FP 0, FN 1: 2 / sqrt(1 * 2 * 2 * 3)
    assert score(0, 0, 0, 1) == pytest.approx(2 / 12**0.5)


def test_f1_is_that_of_the_second_class() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    labels = (torch.rand(200) < 0.2).long()
    predicted = torch.where(torch.rand(200) < 0.7, labels, 1 - labels)
    expected = metrics.f1_score(labels.numpy(), predicted.numpy())
    assert float(f1(confusion(predicted, labels, 2))) == pytest.approx(expected, abs=1e-12)
    zeros = torch.zeros(4, dtype=torch.long)
    assert float(f1(confusion(zeros, zeros, 2))) == 0
    assert evaluate(torch.randn(4, 3), zeros).f1 is None


def test_weighted_rows_count_as_often_as_they_weigh() -> None:
    torch.manual_seed(0)
    labels, predicted = torch.randint(3, (20,)), torch.randint(3, (20,))
    drawn = torch.randint(20, (4, 20))
    weights = torch.zeros(4, 20).scatter_add_(1, drawn, torch.ones(4, 20))
    tables = confusion(predicted, labels, 3, weights)
    for rows, table in zip(drawn, tables, strict=True):
        assert torch.equal(table, confusion(predicted[rows], labels[rows], 3))


def test_evaluate() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    scores = evaluate(logits, torch.tensor([0, 1, 1]))
    assert scores.rows == 3 and scores.accuracy == pytest.approx(2 / 3)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1]))
    assert scores.loss == pytest.approx(float(expected))


def test_batches_hold_all_rows_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 120, 9, 1]
    batches = batches_by_length(lengths, tokens=100)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert batches[0] == [4]  # longer than the budget: alone
    for batch in batches[1:]:
        assert len(batch) * max(lengths[row] for row in batch) <= 100


def test_predictions_come_in_the_order_of_the_rows(classifier: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).train()
    tokens = tokenize(load_task(*find_files(data)).dev, tokenizer, 32)
    logits = predict(model, tokens, tokenizer)
    assert model.training  # as it was
    model.eval()
    for row in (0, 5, 17):
        with torch.no_grad():
            alone = model(**model_inputs(Collator(tokenizer)([tokens[row]]))).logits[0]
        torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=1e-4)
