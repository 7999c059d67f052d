"""The command as a user runs it: files, tables, exit codes, one-line errors."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

from fastattn.cli.app import app
from fastattn.cli.exits import NEEDED, exit_codes, writing
from fastattn.cli.options import numbers
from fastattn.recipes.arguments import Arguments
from fastattn.recipes.compress import CompressArguments

ROOT = Path(__file__).parents[2]
FEW = ("--epochs", "0.5", "--no-bf16", "--threads", "1", "--lengths", "16,32")


def run(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_info_shows_backends_and_choices() -> None:
    result = run("info")
    assert result.exit_code == 0
    for word in ("cpu", "reference", "float32", "bfloat16", "threads"):
        assert word in result.stdout


def test_python_m_is_the_command() -> None:
    command = [sys.executable, "-m", "fastattn", "no-such-command"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_info_json() -> None:
    report = json.loads(run("info", "--json").stdout)
    assert report["backends"]["reference"] == {"available": True, "reason": None}
    assert set(report["versions"]) >= {"torch", "transformers"}
    for answers in report["calls"].values():
        for answer in answers.values():
            assert answer["backend"] in report["backends"]
            assert answer["kernel"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_says_what_is_wrong_with_the_instruction_set() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastattn.cli", "info"],
        env={**os.environ, "FASTATTN_CPU_ISA": "mmx"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "FASTATTN_CPU_ISA must be one of" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_info_calls_no_gpu_backend_usable_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built or installed is not enough."""
    from fastattn import backends
    from fastattn.backends.cuda import CUDABackend

    class Built(CUDABackend):
        def __init__(self) -> None:
            pass

    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: Built() if name == "cuda" else load(name))
    report = json.loads(run("info", "--json").stdout)["backends"]
    reason = "its kernels are built, but PyTorch finds no CUDA device"
    assert report["cuda"] == {"available": False, "reason": reason}
    assert not report["triton"]["available"]


def test_linearize_leaves_model_report_and_plot(encoder: Path, data: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user starts it; then the same command again."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "fastattn.cli", "linearize", "--model", encoder]
    command += ["--data", data, "--output", output, *FEW]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    for attempt in ("first", "again"):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert ("Fine-tuning" in done.stderr) == (attempt == "first")
        for word in ("softmax, fine-tuned", "swapped, untrained", "linear, distilled", "faster"):
            assert word in done.stdout
    report = json.loads((output / "report.json").read_text())
    assert set(report) == {
        "machine", "arguments", "data", "models", "seconds", "measurements",
    }  # fmt: skip
    for scores in report["models"].values():
        assert set(scores) == {"rows", "accuracy", "matthews", "f1", "loss", "max_length"}
    for point in report["measurements"]:
        assert set(point) == {"name", "length", "batch", "seconds", "peak_bytes"}
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "config.json").is_file() and (output / "tokenizer.json").is_file()


def test_compress_then_compare(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # so that no cell is wrapped
    output, few = tmp_path / "out", (*FEW[:-1], "16")
    done = run("compress", "--model", classifier, "--data", data, "--output", output,
               "--layers", 1, "--attention", "linear", *few)  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in ("successor, after distillation", "faster", "predecessor:"):
        assert word in done.stdout
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 1
    before, figures, drawing = output / "run" / "softmax", tmp_path / "c.json", tmp_path / "c.png"
    done = run("compare", before, output, "--data", data, "--lengths", "16,32", "--no-bf16",
               "--json", figures, "--plot", drawing)  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in ("2, softmax", "1, linear", "same prediction", "faster"):
        assert word in done.stdout
    report = json.loads(figures.read_text())
    assert report["models"]["B"]["parameters"] < report["models"]["A"]["parameters"]
    assert drawing.read_bytes().startswith(b"\x89PNG")


def test_attention_is_replaced_where_asked_for(
    classifier: Path, data: Path, tmp_path: Path
) -> None:
    options = ("--model", classifier, "--data", data, *FEW[:-2], "--lengths", "")
    asked = ("--linear-layers", "1", "--schedule", "blend")
    done = run("compress", "--attention", "linear", *asked, "--output", tmp_path / "a", *options)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["fastattn"]["layers"] == [1]
    done = run("linearize", "--replace-epochs", 1, "--output", tmp_path / "b", *options)
    assert done.exit_code == 0, done.output
    stages = json.loads((tmp_path / "b" / "report.json").read_text())["seconds"]
    assert list(stages) == ["softmax", "transfer", "replace", "distill", "measure"]


def test_compress_towards_a_metric(classifier: Path, data: Path, tmp_path: Path) -> None:
    """In a process of its own, so that what is said while it tunes is seen as well."""
    command = [sys.executable, "-m", "fastattn.cli", "compress", "--model", classifier]
    command += ["--data", data, "--output", tmp_path / "out", "--layers", "1", "--metric", "f1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140"}
    done = subprocess.run(
        [*command, *FEW[:-2], "--lengths", ""], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"Tuning f1 2/2 .* f1 0\.\d+, \d\.\d of 4 candidates count", done.stderr)
    assert "Warning" not in done.stderr
    for word in ("successor, tuned on the metric", "F1", "candidates counted", "search log:"):
        assert word in done.stdout
    assert (tmp_path / "out" / "run" / "tune" / "search.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("compress", "--layers", "1", "--metric", "bleu"), 2, "'matthews'"),
        (("compress", "--layers", "1", "--metric-epochs", "1"), 2, "without --metric"),
        (("compress", "--layers", "1", "--feature-map", "elu"), 2, "without --attention"),
        (("compress", "--layers", "1", "--transfer-epochs", "1"), 2, "without --attention"),
        (("compress", "--replace-epochs", "0", "--schedule", "blend"), 2, "epochs above 0"),
        (("linearize", "--schedule", "constant"), 2, "without --replace-epochs above 0"),
        (("linearize", "--no-fine-tune", "--fine-tune-epochs", "1"), 2, "without --fine-tune"),
        (("linearize", "--fine-tune-epochs", "1"), 2, "is fine-tuned already"),
        (("compress", "--layers", "1", "--fine-tune-epochs", "1"), 2, "is fine-tuned already"),
        (("linearize", "--feature-map", "elu", "--transfer-epochs", "1"), 2, "hedgehog or t2r"),
        (("compress", "--layers", "3"), 4, "must divide the 2 layers"),
        (("compress", "--layers", "1", "--linear-layers", "0"), 2, "without --attention"),
        (("compress", "--attention", "linear", "--linear-layers", "2"), 4, "got [2]"),
        (("compress", "--layers", "1", "--schedule", "steep"), 2, "'blend'"),
        (("compress",), 4, "nothing to do"),
        (("compress", "--attention", "sparse"), 2, "'linear'"),
        (("compare", "gone"), 4, "does not exist"),
        (("compare", "--json", "gone/x.json"), 5, "there is no folder gone"),
        (("compare", "--plot", "."), 5, "it is a folder"),
        (("compare", "--plot", "x.xyz"), 5, "--plot must end in .png"),
        (("compare", "--dev", "gone.tsv"), 3, "gone.tsv does not exist"),
    ],
)
def test_errors_of_options_and_models(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    name, *rest = options
    if name != "compare":
        rest += ["--model", str(classifier), "--output", "out"]
    else:
        rest = [str(classifier)] * (2 - (rest == ["gone"])) + rest
    result = run(name, *rest, "--data", data)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--data": "gone"}, 3, "gone does not exist"),
        ({"--train": "bad.tsv"}, 3, "no column 'text'"),
        ({"--dev": "other.tsv"}, 3, "unknown label 'maybe'"),
        ({"--model": "gone"}, 4, "does not exist"),
        ({"--model": "mpnet"}, 4, "not supported"),
        ({"--max-length": "999"}, 4, "positions"),
        ({"--layers": "7"}, 4, "layers"),
        ({"--output": "full"}, 5, "not empty"),
        ({"--output": "bad.tsv/out"}, 5, "can't write"),
        ({"--feature-map": "magic"}, 2, "hedgehog"),
        ({"--layers": "a-b"}, 2, "no list of numbers"),
        ({"--epochs": "-1"}, 2, "--epochs"),
        ({"--lengths": "0,64"}, 2, "an input has at least 1 token"),
        ({"--lengths": "", "--model": "gone"}, 4, "does not exist"),
        ({"--lengths": "5-3"}, 2, "'5-3' has its larger number first"),
        ({"--seed": "-1"}, 2, "--seed"),
        ({"--extend-to": "32"}, 4, "--extend-to must be at least 64"),
        ({"--extend-to": "2000000"}, 4, "and at most 1048576; got 2000000"),
    ],
)
def test_errors(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.tsv").write_text("sentence\tlabel\na\tgood\nb\tbad\n")
    (tmp_path / "other.tsv").write_text("text\tlabel\na\tmaybe\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "mpnet").mkdir()
    (tmp_path / "mpnet" / "config.json").write_text('{"model_type": "mpnet"}')
    options = {"--model": encoder, "--data": data, "--output": "out", **change}
    few = () if "--lengths" in change else FEW[2:]
    result = run("linearize", *(part for option in options.items() for part in option), *few)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("linearize", "matplotlib", "cli"), ("compare", "datasets", "cli"),
     ("diagnose", "captum", "diagnose")],
)  # fmt: skip
def test_a_missing_package_is_said_before_any_work(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: str, module: str, extra: str,
) -> None:  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == module else find(name)
    )
    models = ["--model", classifier] if command == "linearize" else [classifier, classifier]
    source = data / "dev.jsonl" if command == "diagnose" else data
    output = [] if command == "compare" else ["--output", tmp_path / "out"]
    result = run(command, *models, "--data", source, *output)
    assert result.exit_code == 1
    assert f"needs {module}: pip install 'fastattn[{extra}]'" in result.output
    assert not (tmp_path / "out").exists()


def test_what_commands_need_is_in_their_extras() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for extra, modules in NEEDED.items():
        lines = [line for line in text.splitlines() if line.startswith((f"{extra} =", "models ="))]
        assert all(any(f'"{module}>=' in line for line in lines) for module in modules)


@pytest.mark.parametrize("command", ["linearize", "compress", "compare"])
def test_help_says_the_defaults(command: str) -> None:
    """Square brackets are rich's markup, and vanish if they are not escaped."""
    shown = " ".join(run(command, "--help").stdout.replace("│", " ").split())
    for text in ("Threads [default:", "for none [default: 128,256,... to 8192]"):
        assert text in shown


@pytest.mark.parametrize(
    "name, arguments", [("linearize", Arguments), ("compress", CompressArguments)]
)
def test_help_has_the_epochs_of_the_recipe(name: str, arguments: type[Arguments]) -> None:
    said = {}
    for option in get_command(app).commands[name].params:  # type: ignore[attr-defined]
        default = re.search(r"\[default: (\d+), or more for few rows\]", option.help or "")
        if default:
            said[option.name.removesuffix("_epochs").replace("metric", "tune")] = int(default[1])
    assert len(said) == (3 if name == "linearize" else 5)  # linearize replaces only where asked to
    assert said == {stage: arguments.default_epochs[stage] for stage in said}


def test_help_names_the_exit_codes() -> None:
    assert "5 the output folder" in " ".join(run("linearize", "--help").stdout.split())


def test_a_report_that_cannot_be_written_is_the_folders_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, exit_codes(), writing(tmp_path):
        tmp_path.write_text("a folder stands there")
    assert stopped.value.exit_code == 5
    assert f"can't write {tmp_path}: Is a directory" in capsys.readouterr().err.replace("\n", "")


def test_numbers() -> None:
    assert numbers("0,2-4, 9", "--layers") == (0, 2, 3, 4, 9)
    assert numbers(None, "--layers") == numbers("", "--layers") == ()
