"""Compressing a tiny model end to end, going on after an interruption, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import fastattn
from fastattn.recipes import job as stages
from fastattn.recipes.compress import CompressArguments, compress
from fastattn.recipes.data import find_files
from fastattn.recipes.errors import DataError, ModelError
from fastattn.recipes.job import Job
from fastattn.recipes.models import load_model
from fastattn.recipes.tune import LoggedSearch
from tests.recipes.tiny import make_model


@pytest.fixture(scope="module")
def arguments(encoder: Path, data: Path) -> CompressArguments:
    train, dev = find_files(data)
    return CompressArguments(
        model=encoder,
        train=train,
        dev=dev,
        num_layers=1,
        fine_tune_epochs=8,
        fine_tune_rate=3e-3,
        transfer_epochs=1,
        replace_epochs=3,
        replace_rate=1e-3,
        distill_rate=1e-3,
        distill_epochs=2,
        batch_size=16,
    )


@pytest.fixture(scope="module")
def finished(
    arguments: CompressArguments, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, compress(arguments, output)


def test_half_as_deep_and_about_as_accurate(finished: tuple[Path, dict]) -> None:
    output, report = finished
    scores = report["models"]
    assert list(scores) == ["softmax", "replaced", "compressed"]
    assert scores["softmax"]["accuracy"] > 0.85
    assert scores["compressed"]["accuracy"] > scores["softmax"]["accuracy"] - 0.15  # of 48 rows
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 1
    assert getattr(model.config, "fastattn", None) is None


def test_one_layer_and_linear(
    arguments: CompressArguments, finished: tuple[Path, dict], tmp_path: Path
) -> None:
    """From the model that another run has fine-tuned."""
    teacher = finished[0] / "run" / "softmax"
    given = replace(arguments, model=teacher, attention="linear")
    report = compress(given, tmp_path / "out")
    scores = report["models"]
    assert list(scores) == ["softmax", "swapped", "transferred", "replaced", "compressed"]
    assert scores["compressed"]["accuracy"] > scores["softmax"]["accuracy"] - 0.15  # of 48 rows
    model = fastattn.load(tmp_path / "out")
    assert len(model.bert.encoder.layer) == 1


def test_attention_alone(
    arguments: CompressArguments, finished: tuple[Path, dict], tmp_path: Path
) -> None:
    teacher = finished[0] / "run" / "softmax"
    few = {"transfer_epochs": 0.5, "replace_epochs": 0.5, "distill_epochs": 0}
    given = replace(arguments, model=teacher, num_layers=None, attention="linear", **few)
    compress(given, tmp_path / "out")
    model, before = fastattn.load(tmp_path / "out"), load_model(teacher)
    assert len(model.bert.encoder.layer) == 2
    for name, value in before.state_dict().items():
        changed = not torch.equal(value, model.state_dict()[name])
        assert changed == (".attention.self." in name), name


def test_some_layers_stay_softmax(
    arguments: CompressArguments, finished: tuple[Path, dict], tmp_path: Path
) -> None:
    teacher = finished[0] / "run" / "softmax"
    few = {"transfer_epochs": 0.5, "replace_epochs": 0.5, "distill_epochs": 0}
    given = replace(
        arguments, model=teacher, num_layers=None, attention="linear", layers=(1,), **few
    )
    compress(given, tmp_path / "out")
    model, before = fastattn.load(tmp_path / "out"), load_model(teacher)
    assert model.config.fastattn["layers"] == [1]
    for name, value in before.state_dict().items():
        changed = not torch.equal(value, model.state_dict()[name])
        assert changed == (".layer.1.attention.self." in name), name


def test_a_student_that_reads_on_learns_from_predictions_that_are_kept(
    arguments: CompressArguments, finished: tuple[Path, dict], tmp_path: Path
) -> None:
    """The teacher can't be asked about what it can't read; another run's answers are taken."""
    teacher = finished[0] / "run" / "softmax"
    few = {"transfer_epochs": 0.5, "replace_epochs": 0.5, "distill_epochs": 0.5}
    given = replace(arguments, model=teacher, attention="linear", extend_to=96, **few)
    compress(given, tmp_path / "out")
    kept = list((tmp_path / "out" / "run" / "softmax").glob("teacher_logits*"))
    assert len(kept) == 1
    again = replace(given, model=tmp_path / "out" / "run" / "softmax")
    compress(again, tmp_path / "again")
    assert not list((tmp_path / "again" / "run" / "softmax").glob("teacher_logits*"))


def test_an_interrupted_run_goes_on(
    arguments: CompressArguments, finished: tuple[Path, dict], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Job, "distill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(arguments, output)
    record = json.loads((output / "run" / "run.json").read_text())
    assert list(record["stages"]) == ["softmax", "replace"]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "new_classifier", None)  # nothing is fine-tuned again
        assert compress(arguments, output)["models"] == finished[1]["models"]


def test_tuned_on_the_metric(
    arguments: CompressArguments, finished: tuple[Path, dict], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every step is one of MGS and logged; interrupted and resumed it ends as it would have."""
    teacher = finished[0] / "run" / "softmax"
    few = {"replace_epochs": 1, "distill_epochs": 0, "tune_epochs": 2}
    given = replace(arguments, model=teacher, metric="f1", **few)
    report = compress(given, tmp_path / "whole")
    scores = report["models"]
    assert list(scores) == ["softmax", "replaced", "compressed", "tuned"]
    assert scores["tuned"]["f1"] > scores["compressed"]["f1"] - 0.05
    lines = log_of(tmp_path / "whole")
    steps = 2 * 192 // 16
    assert [line["step"] for line in lines] == list(range(steps))
    assert all(1 <= line["effective_samples"] <= 4 for line in lines)
    assert all(len(line["candidates"]) == 4 and 0 <= line["f1"] <= 1 for line in lines)
    assert report["search"]["steps"] == steps and report["search"]["metric"] == "f1"
    untuned = load_model(tmp_path / "whole" / "run" / "distill").state_dict()
    tuned = load_model(tmp_path / "whole").state_dict()
    assert not torch.equal(tuned["classifier.weight"], untuned["classifier.weight"])
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(tuned[words], untuned[words])

    measured = LoggedSearch.on_pre_optimizer_step

    def interrupted(self: LoggedSearch, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == steps // 2 + 3:
            raise KeyboardInterrupt
        measured(self, args, state, *rest, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LoggedSearch, "on_pre_optimizer_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(given, tmp_path / "cut")
    assert len(log_of(tmp_path / "cut")) == steps // 2 + 3
    compress(given, tmp_path / "cut")
    assert log_of(tmp_path / "cut") == lines
    for name, value in load_model(tmp_path / "cut").state_dict().items():
        assert torch.equal(value, tuned[name]), name


def log_of(output: Path) -> list[dict]:
    path = output / "run" / "tune" / "search.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_metric_that_does_not_fit_the_labels(tmp_path: Path, encoder: Path) -> None:
    def task(name: str, labels: str) -> Path:
        rows = [json.dumps({"text": "a film", "label": label}) for label in labels]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        return tmp_path / f"{name}.jsonl"

    def run(model: Path, train: Path, metric: str) -> None:
        given = CompressArguments(model=model, train=train, dev=train, num_layers=1, metric=metric)
        compress(given, tmp_path / "out")

    three = task("three", "abcabc")
    with pytest.raises(
        DataError, match=r"metric f1 is for two labels; these data have 3 \(a, b, c"
    ):
        run(encoder, three, "f1")
    with pytest.raises(DataError, match="metric must be one of f1, matthews, accuracy; got 'bleu'"):
        run(encoder, three, "bleu")
    one_sided = task("one", "aaa")
    labelled = make_model(tmp_path / "labelled", labels=["a", "b"])
    with pytest.raises(DataError, match="metric matthews is constant.* all 3 training rows .* 'a'"):
        run(labelled, one_sided, "matthews")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"must divide the 2 layers \(1, 2\); got 3"),
        ({"num_layers": 2}, "nothing to do"),
        ({"num_layers": None}, "nothing to do"),
        ({"attention": "linear", "feature_map": "magic"}, "feature_map"),
        ({"layers": (0,)}, "needs attention='linear'"),
        ({"attention": "linear", "layers": (1,)}, r"layers must be within 0..0; got \[1\]"),
    ],
)
def test_refused_before_any_training(
    arguments: CompressArguments, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        compress(replace(arguments, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_small_data_get_more_epochs_unless_told(arguments: CompressArguments, data: Path) -> None:
    job = Job.__new__(Job)
    train = {"length": [10] * 1000}

    class Rows(list):
        def __getitem__(self, key):
            return train[key] if isinstance(key, str) else super().__getitem__(key)

    rows = Rows([0] * 1000)
    job.arguments = replace(arguments, batch_size=None, fine_tune_epochs=None)
    assert job.settings("fine_tune", rows).epochs == 10  # at most
    assert job.settings("distill", rows).epochs == 2  # as told
    job.arguments = replace(job.arguments, batch_size=8)
    assert job.settings("fine_tune", rows).epochs == 5  # 600 steps of 8 of 1000 rows
    job.arguments = replace(job.arguments, batch_size=1)
    assert job.settings("fine_tune", rows).epochs == 3


def test_unsupported_model(tmp_path: Path, arguments: CompressArguments) -> None:
    (tmp_path / "mpnet").mkdir()
    (tmp_path / "mpnet" / "config.json").write_text('{"model_type": "mpnet"}')
    with pytest.raises(ModelError, match="support"):
        compress(replace(arguments, model=tmp_path / "mpnet"), tmp_path / "out")
