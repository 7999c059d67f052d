"""Two models side by side: scores, intervals, agreement, sizes; and what can't be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastattn
from fastattn.recipes.compare import bootstrap, compare
from fastattn.recipes.comparison import plot_comparison, print_comparison
from fastattn.recipes.errors import DataError, ModelError
from fastattn.recipes.models import load_model, load_tokenizer
from tests.recipes.tiny import make_model


@pytest.fixture(scope="module")
def linear(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    fastattn.linearize(model, "hedgehog").save_pretrained(folder)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)
    return folder


def test_report_and_what_is_shown_of_it(
    classifier: Path, linear: Path, data: Path, tmp_path: Path
) -> None:
    report = compare(classifier, linear, data / "dev.jsonl", lengths=(16, 32))
    a, b = report["models"]["A"], report["models"]["B"]
    assert (a["attention"], b["attention"]) == ("softmax", "linear")
    maps = sum(p.numel() for n, p in fastattn.load(linear).named_parameters() if "feature_map" in n)
    assert b["parameters"] - a["parameters"] == maps > 0
    assert a["disk_bytes"] == (classifier / "model.safetensors").stat().st_size
    for model in (a, b):
        low, high = model["intervals"]["accuracy"]
        assert low <= model["accuracy"] <= high
    assert report["difference"]["accuracy"]["value"] == b["accuracy"] - a["accuracy"]
    assert 0 <= report["agreement"] <= 1
    console = Console(width=120, record=True, file=(tmp_path / "shown").open("w"))
    print_comparison(report, console)
    shown = console.export_text()
    for text in (f"{100 * a['accuracy']:.1f} %", "2, linear", "same prediction", "faster"):
        assert text in shown
    plot_comparison(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_against_itself_differs_in_nothing(classifier: Path, data: Path) -> None:
    report = compare(classifier, classifier, data / "dev.jsonl")
    assert report["agreement"] == 1.0
    for score in report["difference"].values():
        assert score == {"value": 0.0, "interval": (0.0, 0.0)}


def test_bootstrap_in_parts_gives_the_same_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = torch.arange(600) % 3
    said = torch.where(torch.arange(600) < 200, 0, truth)
    whole = bootstrap(said, truth, truth, 3)
    monkeypatch.setattr("fastattn.recipes.compare.DRAWN_AT_ONCE", 7 * 600)
    in_parts = bootstrap(said, truth, truth, 3)
    for of in whole:
        for score in whole[of]:
            assert in_parts[of][score] == pytest.approx(whole[of][score], abs=0.006)


def test_bootstrap_interval_has_the_binomial_width() -> None:
    truth = torch.zeros(1000, dtype=torch.long)
    said = (torch.arange(1000) < 200).long()  # 80 % right
    found = bootstrap(said, truth, truth, 2)
    low, high = found["A"]["accuracy"]
    assert (low, high) == pytest.approx((0.775, 0.825), abs=0.004)  # 1.96 sqrt(.8 .2 / 1000)
    assert found["B"]["accuracy"] == (1.0, 1.0)
    assert found["B - A"]["accuracy"] == pytest.approx((1 - high, 1 - low), abs=1e-6)
    assert found == bootstrap(said, truth, truth, 2) != bootstrap(said, truth, truth, 2, seed=1)


def test_an_extended_softmax_model_reads_all_it_has_positions_for(
    classifier: Path, data: Path, tmp_path: Path
) -> None:
    longer = tmp_path / "longer"
    model = fastattn.extend_positions(load_model(classifier), 1024)
    model.save_pretrained(longer)
    load_tokenizer(classifier).save_pretrained(longer)
    models = compare(classifier, longer, data / "dev.jsonl")["models"]
    assert models["A"]["max_length"] == 64
    assert models["B"]["max_length"] == 1024
    assert models["B"]["attention"] == "softmax"


def test_what_cannot_be_compared(
    classifier: Path, encoder: Path, data: Path, tmp_path: Path
) -> None:
    dev = data / "dev.jsonl"
    with pytest.raises(ModelError, match="no trained classification head"):
        compare(classifier, encoder, dev)
    other = make_model(tmp_path / "other", labels=["yes", "no"])
    with pytest.raises(ModelError, match="different labels"):
        compare(classifier, other, dev)
    with pytest.raises(ModelError, match="max_length 99 is more than the 64 positions"):
        compare(classifier, classifier, dev, max_length=99)
    with pytest.raises(DataError, match="unknown label"):
        compare(other, other, dev)
