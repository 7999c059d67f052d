"""A whole run on a tiny model: what it leaves, how it goes on, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
)

import fastattn
from fastattn.recipes import job as recipe
from fastattn.recipes import measure as measuring
from fastattn.recipes.arguments import Arguments, fingerprint
from fastattn.recipes.data import find_files
from fastattn.recipes.errors import DataError, ModelError, OutputError
from fastattn.recipes.linearize import linearize
from fastattn.recipes.models import is_linear, load_config, load_model, load_tokenizer
from fastattn.recipes.report import plot, write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arguments(encoder: Path, data: Path) -> Arguments:
    train, dev = find_files(data)
    return Arguments(
        model=encoder,
        train=train,
        dev=dev,
        fine_tune_epochs=8,
        fine_tune_rate=3e-3,
        transfer_epochs=1,
        distill_epochs=2,
        batch_size=16,
    )


@pytest.fixture(scope="module")
def finished(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    report = linearize(arguments, output)
    write_json(report, output / "report.json")
    return output


def report_of(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def test_accuracy_comes_back(finished: Path) -> None:
    models = report_of(finished)["models"]
    assert list(models) == ["softmax", "swapped", "transferred", "linear"]
    assert models["softmax"]["accuracy"] > 0.85
    assert models["linear"]["accuracy"] > models["softmax"]["accuracy"] - 0.1


def test_saved_model_is_linear_and_gives_the_reported_accuracy(finished: Path, data: Path) -> None:
    assert is_linear(load_config(finished))
    model, tokenizer = fastattn.load(finished), load_tokenizer(finished)
    assert model.config.id2label == {0: "bad", 1: "good"}
    rows = [json.loads(line) for line in (data / "dev.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model.eval()(**inputs).logits.argmax(-1).tolist()
    right = sum(model.config.id2label[i] == row["label"] for i, row in zip(said, rows, strict=True))
    assert right / len(rows) == report_of(finished)["models"]["linear"]["accuracy"]


def test_other_lengths_are_measured_without_training_again(
    finished: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    monkeypatch.setattr(recipe, "fit", None)  # nothing is trained
    report = linearize(replace(arguments, lengths=(8, 16)), output)
    assert [point["length"] for point in report["measurements"]] == [8, 16, 8, 16]
    assert report["models"] == report_of(finished)["models"]


def test_a_measuring_process_that_is_killed_says_so(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed:
        def __init__(self, *_, **__) -> None:
            raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(measuring, "ProcessPoolExecutor", Killed)
    with pytest.raises(ModelError, match="measuring linear at 8 tokens failed.*shorter --lengths"):
        measuring.measure({"linear": finished}, (8,))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_measuring_process_outlives_a_killed_command(finished: Path, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"  # a process of a script that imports what it runs
    script.write_text(
        "from pathlib import Path\n"
        "from fastattn.recipes.measure import measure\n"
        "if __name__ == '__main__':\n"
        f"    measure({{'linear': Path({str(finished)!r})}}, [8] * 1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], env=environment, start_new_session=True) as run:
        until(lambda: len(processes_of_session(run.pid)) == 4)  # two helpers and the one that works
        run.kill()
    until(lambda: not processes_of_session(run.pid))


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of_session(session: int) -> list[str]:
    """Their command lines."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
    return found


def test_teacher_is_a_plain_model(finished: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(finished / "run" / "softmax")
    assert not is_linear(model.config)


def test_checkpoints_of_stages_are_cleared(finished: Path) -> None:
    assert not list(finished.rglob("checkpoints"))


def test_same_seed_same_model(arguments: Arguments, finished: Path, tmp_path: Path) -> None:
    linearize(arguments, tmp_path / "again")
    one, two = load_model(finished).state_dict(), load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_goes_on_from_its_last_stage(
    arguments: Arguments, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "distillation_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            linearize(arguments, output)
    record = json.loads((output / "run" / "run.json").read_text())
    assert list(record["stages"]) == ["softmax", "transfer"]
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "new_classifier", interrupt)  # nothing is fine-tuned again
        report = linearize(arguments, output)
    assert report["models"] == report_of(finished)["models"]
    with pytest.raises(OutputError, match="seed was 0, now 1"):
        linearize(replace(arguments, seed=1), output)


@pytest.mark.parametrize("schedule", ["linear", "constant", "blend"])
def test_replacing_attention_before_distillation(
    classifier: Path, arguments: Arguments, tmp_path: Path, schedule: str
) -> None:
    short = {"transfer_epochs": 0.5, "replace_epochs": 0.5, "distill_epochs": 0}
    given = replace(arguments, model=classifier, schedule=schedule, **short)
    report = linearize(given, tmp_path / "out")
    assert list(report["models"]) == ["softmax", "swapped", "transferred", "replaced", "linear"]
    assert report["models"]["replaced"] == report["models"]["linear"]
    before = AutoModelForSequenceClassification.from_pretrained(classifier).state_dict()
    after = load_model(tmp_path / "out").state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (".attention.self." not in name), name


def test_half_precision_is_trained_in_float32(arguments: Arguments, tmp_path: Path) -> None:
    short = {"fine_tune_epochs": 1, "transfer_epochs": 0.5, "distill_epochs": 0.5}
    results = []
    for dtype in (torch.float16, torch.float32):
        folder = tmp_path / str(dtype)
        shutil.copytree(arguments.model, folder)
        model = AutoModel.from_pretrained(arguments.model).half()
        model.to(dtype).save_pretrained(folder)
        linearize(replace(arguments, model=folder, **short), tmp_path / f"{dtype} out")
        results.append(load_model(tmp_path / f"{dtype} out").state_dict())
    for name, value in results[0].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, results[1][name]), name


def test_another_tokenizer_is_another_run(arguments: Arguments, tmp_path: Path) -> None:
    shutil.copytree(arguments.model, tmp_path / "model")
    given = replace(arguments, model=tmp_path / "model")
    before = fingerprint(given)
    assert fingerprint(given) == before
    (tmp_path / "model" / "special_tokens_map.json").write_text('{"cls_token": "[X]"}')
    after = fingerprint(given)
    assert [name for name in after if after[name] != before[name]] == ["tokenizer sha256"]


def test_fine_tuned_model_is_taken_as_it_is(
    classifier: Path, arguments: Arguments, tmp_path: Path
) -> None:
    given = replace(arguments, model=classifier, transfer_epochs=0, distill_epochs=0)
    report = linearize(given, tmp_path / "out")
    before = AutoModelForSequenceClassification.from_pretrained(classifier).state_dict()
    after = load_model(tmp_path / "out" / "run" / "softmax").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report["data"]["labels"] == ["good", "bad"]  # in the model's order
    assert list(report["models"]) == ["softmax", "swapped", "linear"]


def test_linear_model_reads_more_than_the_softmax_model_can(
    classifier: Path, arguments: Arguments, tmp_path: Path
) -> None:
    given = replace(arguments, model=classifier, extend_to=96, max_length=16, distill_epochs=1)
    report = linearize(given, tmp_path / "out")
    read = {name: scores["max_length"] for name, scores in report["models"].items()}
    others = dict.fromkeys(("windows", "swapped", "transferred", "linear"), 96)
    assert read == {"softmax": 16, **others}
    assert report["models"]["windows"]["loss"] != report["models"]["softmax"]["loss"]
    model = fastattn.load(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 96
    ids = torch.randint(5, 20, (1, 96))
    assert model(input_ids=ids).logits.isfinite().all()


def test_chosen_layers_and_a_map_without_parameters(
    classifier: Path, arguments: Arguments, tmp_path: Path
) -> None:
    given = replace(arguments, model=classifier, layers=(1,), feature_map="elu", distill_epochs=1)
    linearize(given, tmp_path / "out")
    assert is_linear(load_config(tmp_path / "out"))


def test_refused_before_any_training(
    arguments: Arguments, classifier: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="does not exist"):
        linearize(replace(arguments, model=tmp_path / "gone"), out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        linearize(replace(arguments, model=tmp_path / "empty"), out)
    with pytest.raises(ModelError, match="has linear attention already"):
        linearize(replace(arguments, model=finished), out)
    with pytest.raises(ModelError, match="leave out --no-fine-tune"):
        linearize(replace(arguments, fine_tune=False), out)
    with pytest.raises(ModelError, match="more than the 64 positions"):
        linearize(replace(arguments, max_length=100), out)
    with pytest.raises(ModelError, match="feature_map"):
        linearize(replace(arguments, feature_map="nonsense"), out)
    with pytest.raises(ModelError, match="layers"):
        linearize(replace(arguments, layers=(0, 2)), out)
    other = tmp_path / "dev.jsonl"
    other.write_text('{"text": "a", "label": "so-so"}\n')
    with pytest.raises(DataError, match="unknown label 'so-so'"):
        linearize(replace(arguments, dev=other), out)
    assert not out.exists()


def test_restart_with_its_own_teacher_is_refused(arguments: Arguments, finished: Path) -> None:
    given = replace(arguments, model=finished / "run" / "softmax")
    with pytest.raises(OutputError, match="--restart would delete model"):
        linearize(given, finished, restart=True)
    assert load_model(finished / "run" / "softmax")


def test_unsupported_model(arguments: Arguments, tmp_path: Path) -> None:
    BertConfig(is_decoder=True).save_pretrained(tmp_path / "decoder")
    (tmp_path / "mpnet").mkdir()
    (tmp_path / "mpnet" / "config.json").write_text('{"model_type": "mpnet"}')
    for name in ("decoder", "mpnet"):
        with pytest.raises(ModelError, match="support"):
            linearize(replace(arguments, model=tmp_path / name), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_plot_and_points(arguments: Arguments, finished: Path, tmp_path: Path) -> None:
    from fastattn.recipes.measure import measure

    models = {"softmax": finished / "run" / "softmax", "linear": finished}
    points = measure(models, (32, 128), threads=1)  # 128 is beyond the model's 64 positions
    assert [(p["name"], p["length"]) for p in points] == [
        ("softmax", 32), ("softmax", 128), ("linear", 32), ("linear", 128),
    ]  # fmt: skip
    assert all(p["seconds"] > 0 and (p["peak_bytes"] or 1) > 0 for p in points)
    plot({**report_of(finished), "measurements": points}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
