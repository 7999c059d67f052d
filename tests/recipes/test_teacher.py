"""A teacher that reads less than its student is asked about windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastattn.recipes.data import tokenize
from fastattn.recipes.models import load_model, load_tokenizer
from fastattn.recipes.teacher import cut_into_windows, kept_logits, predict_in_windows
from tests.recipes.tiny import FILLERS

LENGTHS = (0, 1, 8, 9, 16, 17, 40)


@pytest.fixture(scope="module")
def tokenizer(classifier: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(classifier)


@pytest.fixture(scope="module")
def tokens(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    texts = [" ".join((FILLERS * 4)[:n]) for n in LENGTHS]
    dataset = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})
    return tokenize(dataset, tokenizer, 64)


@pytest.mark.parametrize("max_length", [3, 4, 10, 42, 64])
def test_windows_together_are_the_text(
    tokens: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    windows = cut_into_windows(tokens, tokenizer, max_length)
    assert set(windows.column_names) == set(tokens.column_names)
    for text in tokens:
        own = [window for window in windows if window["row"] == text["row"]]
        inner = [window["input_ids"][1:-1] for window in own]
        assert [token for ids in inner for token in ids] == text["input_ids"][1:-1]
        lengths = [len(ids) + 2 for ids in inner]
        assert len(own) == max(1, -(-(text["length"] - 2) // (max_length - 2)))
        assert max(lengths) <= max_length and max(lengths) - min(lengths) <= 1
        for window, length in zip(own, lengths, strict=True):
            assert window["length"] == length and window["label"] == text["label"]
            assert window["input_ids"][0] == tokenizer.cls_token_id
            assert window["input_ids"][-1] == tokenizer.sep_token_id
            assert window["attention_mask"] == [1] * length
            assert window["token_type_ids"] == [0] * length


def test_the_opinion_is_the_mean_over_windows(
    tokens: Dataset, tokenizer: PreTrainedTokenizerBase, classifier: Path
) -> None:
    model = load_model(classifier).eval()
    got = predict_in_windows(model, tokens, tokenizer, 10)
    first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    for logits, text, length in zip(got, tokens, LENGTHS, strict=True):
        inner, count = text["input_ids"][1:-1], max(1, -(-length // 8))
        pieces = [inner[length * i // count : length * (i + 1) // count] for i in range(count)]
        with torch.no_grad():
            said = [model(torch.tensor([first + ids + last])).logits[0] for ids in pieces]
        torch.testing.assert_close(logits, torch.stack(said).mean(0), rtol=0, atol=1e-5)


def test_logits_are_computed_once_for_a_key_and_taken_from_any_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    calls: list[int] = []

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.full((2, 2), float(len(calls)))

    first = kept_logits([there], ["key"], compute)
    assert torch.equal(kept_logits([here, there], ["key"], compute), first) and len(calls) == 1
    assert not list(here.iterdir())
    other = kept_logits([here, there], ["another"], compute)
    assert len(calls) == 2 and not torch.equal(other, first)
    assert [path.suffix for path in here.iterdir()] == [".safetensors"]
