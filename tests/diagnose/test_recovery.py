"""A model that was recovered after the swap is closer to its original again, as diagnose sees."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastattn
from fastattn.diagnose import agreement, compare, impact_matrix
from fastattn.theseus import LinearSchedule, Theseus
from tests.recipes.tiny import make_rows

ROWS = make_rows(192, seed=1, longest=12)
TEXTS = [row["text"] for row in make_rows(8, seed=2, longest=12)]
STEPS = 150


def batches(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    found = []
    for start in range(0, len(ROWS), 32):
        rows = ROWS[start : start + 32]
        batch = dict(tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt"))
        batch["labels"] = torch.tensor([int(row["label"] == "bad") for row in rows])
        found.append(batch)
    return found


def train(model: Any, tokenizer: Any, rate: float, after_step: Any = lambda: None) -> Any:
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    data = batches(tokenizer)
    for step in range(STEPS):
        model(**data[step % len(data)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return model.eval()


@pytest.fixture(scope="module")
def original_and_tokenizer(classifier: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        classifier, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    return train(model, tokenizer, rate=3e-3), tokenizer


def mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined)


def closeness(original: Any, patched: Any, tokenizer: Any) -> dict[str, float]:
    """Mean rank correlations of impact matrices and of attributions."""
    impacts = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        matrices = [
            impact_matrix(model.bert.double(), ids, tokenizer.mask_token_id, metric="dist")
            for model in (copy.deepcopy(original), copy.deepcopy(patched))
        ]
        impacts.append(agreement(*matrices).spearman)
    summary = compare(original, patched, tokenizer, TEXTS, points=30).summary()
    return {"impact": mean(impacts), "attribution": summary["spearman"]}


def test_the_models_own_copy_agrees_exactly(original_and_tokenizer: tuple[Any, Any]) -> None:
    """Also where it was linearised with no layer: another attention function, the same softmax."""
    original, tokenizer = original_and_tokenizer
    identity = fastattn.linearize(copy.deepcopy(original), "elu", layers=[])
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    matrices = [
        impact_matrix(copy.deepcopy(model).bert.double(), ids, tokenizer.mask_token_id)
        for model in (original, copy.deepcopy(original), identity)
    ]
    assert agreement(matrices[0], matrices[1]).spearman == 1
    assert agreement(matrices[0], matrices[2]).spearman == pytest.approx(1, abs=1e-9)


def test_theseus_brings_the_correlations_back(original_and_tokenizer: tuple[Any, Any]) -> None:
    original, tokenizer = original_and_tokenizer
    swapped = fastattn.linearize(copy.deepcopy(original), "elu")
    before = closeness(original, swapped, tokenizer)
    theseus = Theseus(
        original, None, "linear", "elu", LinearSchedule.over(STEPS, base=0.5), match=1.0
    )
    train(theseus, tokenizer, rate=3e-3, after_step=theseus.step)
    after = closeness(original, theseus.export(), tokenizer)
    for name in ("impact", "attribution"):
        assert before[name] < 0.9
        assert after[name] > before[name] + 0.1, (name, before, after)
