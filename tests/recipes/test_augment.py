"""Changed texts: what changes, what stays, and that nothing else is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastattn.recipes.augment import NO_LABEL, ChangingCollator, nearest_tokens
from fastattn.recipes.data import find_files, load_task, tokenize
from fastattn.recipes.losses import imitation_loss
from fastattn.recipes.training import Collator, model_inputs

ROWS = range(16)


@pytest.fixture(scope="module")
def tokenizer(encoder: Path):
    return AutoTokenizer.from_pretrained(encoder)


@pytest.fixture(scope="module")
def rows(tokenizer, data: Path) -> list[dict]:
    tokens = tokenize(load_task(*find_files(data)).train, tokenizer, 32)
    return [tokens[i] for i in ROWS]


def ids(batch: dict, row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row] != 0].tolist()


def test_half_of_the_rows_stay_and_keep_their_labels(tokenizer, rows: list[dict]) -> None:
    torch.manual_seed(0)
    before = Collator(tokenizer)(rows)
    for join, changed in ((False, 8), (True, 5)):
        collate = ChangingCollator(tokenizer, 32, join=join, neighbours={})
        counts = set()
        for _ in range(20):
            after = collate(rows)
            stays = after["labels"] != NO_LABEL
            counts.add(int((~stays).sum()))
            assert torch.equal(after["labels"][stays], before["labels"][stays])
            for i in stays.nonzero().flatten().tolist():
                assert ids(after, i) == ids(before, i)
            assert torch.equal(after["row"], before["row"])
            assert set(after) == set(before)
        assert counts == ({changed, 16} if join else {changed})


def test_changed_tokens_are_those_of_the_batch_and_special_ones_stay(
    tokenizer, rows: list[dict]
) -> None:
    torch.manual_seed(0)
    special = set(tokenizer.all_special_ids)
    pool = {token for row in rows for token in row["input_ids"]} - special
    changed = total = 0
    for _ in range(50):
        batch = ChangingCollator(tokenizer, 32, join=False, neighbours={}, most=0.3)(rows)
        for i in ROWS[1::2]:
            old, new = rows[i]["input_ids"], ids(batch, i)
            assert len(new) == len(old)
            for a, b in zip(old, new, strict=True):
                assert a == b if a in special else b in pool
            changed += sum(a != b for a, b in zip(old, new, strict=True))
            total += sum(a not in special for a in old)
    assert 0.11 < changed / total < 0.16  # 0.15 on average, some for themselves


def test_joined_rows_are_one_text_within_the_length(tokenizer, rows: list[dict]) -> None:
    torch.manual_seed(0)
    texts = [row["input_ids"][1:-1] for row in rows]
    joined = 0
    for _ in range(80):
        batch = ChangingCollator(tokenizer, 40, join=True, neighbours={}, most=0.0)(rows)
        of_batch = 0
        for i in ROWS:
            new = ids(batch, i)
            assert new[0] == tokenizer.cls_token_id and new[-1] == tokenizer.sep_token_id
            assert new[1:-1] in [texts[i], *(texts[i] + text for text in texts)]
            assert len(new) <= 40
            of_batch += new[1:-1] != texts[i]
        assert of_batch == 0 or (batch["labels"] == NO_LABEL).all()
        joined += of_batch > 0
    assert 10 < joined < 32  # of 80 batches a fourth


def test_most_changed_tokens_become_neighbours(tokenizer, rows: list[dict]) -> None:
    torch.manual_seed(0)
    near = {token: [1000 + token] for row in rows for token in row["input_ids"]}
    collate = ChangingCollator(tokenizer, 32, join=False, neighbours=near, most=1.0)
    neighbours = others = 0
    for _ in range(50):
        batch = collate(rows)
        for i in ROWS[1::2]:
            for old, new in zip(rows[i]["input_ids"], ids(batch, i), strict=True):
                neighbours += new == 1000 + old
                others += new not in (old, 1000 + old)
    assert 0.6 < neighbours / (neighbours + others) < 0.8


def test_nearest_tokens_are_those_of_the_largest_cosine() -> None:
    embedding = torch.randn(3000, 8) + 5
    known = torch.randperm(3000)[:1500].tolist()
    found = nearest_tokens(embedding, known, 3)
    assert sorted(found) == sorted(known)
    centred = (embedding - embedding[sorted(known)].mean(0)).double()
    for token in known[:20]:
        others = [other for other in known if other != token]
        cosine = torch.cosine_similarity(centred[token], centred[others], dim=-1)
        best = cosine.topk(4).values
        for rank, other in enumerate(found[token]):
            got = torch.cosine_similarity(centred[token], centred[other], dim=-1)
            assert abs(got - best[rank]) < 1e-5 and other != token
    assert nearest_tokens(embedding, [5]) == {}


def test_draws_follow_torch_s_seed(tokenizer, rows: list[dict]) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ChangingCollator(tokenizer, 32, join=False, neighbours={})(rows)["input_ids"]

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_imitation_loss_is_zero_at_the_teacher_and_sees_hidden_states(
    classifier: Path, tokenizer, rows: list[dict]
) -> None:
    load = AutoModelForSequenceClassification.from_pretrained
    teacher, model = load(classifier).eval(), load(classifier).eval()
    batch = ChangingCollator(tokenizer, 32, join=False, neighbours={})(rows)
    options = {"task_weight": 0.0, "temperature": 2.0}
    alike = imitation_loss(teacher, hidden=1.0, **options)
    assert alike(model, batch).abs() < 1e-6
    with torch.no_grad():
        model.classifier.weight.zero_()
    only_hidden = alike(model, batch) - imitation_loss(teacher, **options)(model, batch)
    assert only_hidden.abs() < 1e-5
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.zero_()
    assert alike(model, batch) - imitation_loss(teacher, **options)(model, batch) > 0.1
    labelled = imitation_loss(teacher, task_weight=0.5, temperature=2.0)
    difference = labelled(model, batch) - imitation_loss(teacher, **options)(model, batch)
    kept = batch["labels"] != NO_LABEL
    logits = model(**model_inputs(batch)).logits[kept]
    expected = 0.5 * torch.nn.functional.cross_entropy(logits, batch["labels"][kept])
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)
    batch["labels"].fill_(NO_LABEL)
    assert labelled(model, batch) == imitation_loss(teacher, **options)(model, batch)
