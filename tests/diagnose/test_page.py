"""``fastattn diagnose``: the files it leaves, what it refuses, and the page in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import fastattn
from fastattn.cli.app import app
from fastattn.diagnose import impact_matrix
from fastattn.diagnose.page import render, signed_color
from tests.diagnose.browser import chromium, programs

TEXTS = ["the film was great <b>& a</b> happy actor", "a dull plot and this scene was poor"]


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folders(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A classifier, the same with linear attention, and texts."""
    made = tmp_path_factory.mktemp("patched")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    fastattn.linearize(model, "elu").save_pretrained(made)
    transformers.AutoTokenizer.from_pretrained(classifier).save_pretrained(made)
    (made / "texts.txt").write_text("\n".join([*TEXTS, ""]))
    return classifier, made, made / "texts.txt"


@pytest.fixture(scope="module")
def output(folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, with everything on the page."""
    original, patched, data = folders
    output = tmp_path_factory.mktemp("out")
    result = run(original, patched, "--data", data, "--output", output, "--lengths", "16,32",
                 "--points", "20")  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("tokens rank alike", "completeness gap", "diagnose.html"):
        assert word in result.stdout
    return output


def test_numbers(output: Path) -> None:
    report = json.loads((output / "diagnose.json").read_text())
    assert set(report) == {"models", "machine", "settings", "summary", "texts", "measurements"}
    assert sorted(entry["text"] for entry in report["texts"]) == sorted(TEXTS)
    for entry in report["texts"]:
        count = len(entry["impact"]["tokens"])
        assert len(entry["tokens"]) == len(entry["special"]) == count + 2
        for name in ("original", "patched"):
            assert len(entry[name]["scores"]) == count + 2
            assert [len(row) for row in entry["impact"][name]] == [count] * count
    assert -1 <= report["summary"]["spearman"] < 1
    assert len(report["measurements"]) == 4


def test_the_page_needs_nothing_else(output: Path) -> None:
    html = (output / "diagnose.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", html)
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert "<b>&" not in html, "texts are escaped"
    assert render(json.loads((output / "diagnose.json").read_text())) == html


def test_in_a_browser(output: Path, tmp_path: Path) -> None:
    if programs() is None:
        pytest.skip("no chromium with chromedriver here (Debian: chromium chromium-driver)")
    report = json.loads((output / "diagnose.json").read_text())
    entry = report["texts"][0]
    with chromium(tmp_path / "profile") as browser:
        browser.open(output / "diagnose.html")
        assert browser.run("return document.title").startswith("fastattn diagnose")
        assert browser.run("return document.querySelectorAll('article').length") == 2
        shown = browser.run(
            "return [...document.querySelectorAll('article:first-of-type .token')]"
            ".map(t => [t.textContent, getComputedStyle(t).backgroundColor])"
        )
        assert [text for text, _ in shown] == entry["tokens"] * 2
        for model, half in (("original", shown[: len(shown) // 2]),
                            ("patched", shown[len(shown) // 2 :])):  # fmt: skip
            scores = entry[model]["scores"]
            largest = max(map(abs, scores))
            strongest = next(i for i, score in enumerate(scores) if abs(score) == largest)
            want = signed_color(scores[strongest], largest).replace("0.750", "0.75")
            assert half[strongest][1] == want
        cells = "article:first-of-type .matrix td"
        count = len(entry["impact"]["tokens"])
        assert browser.run(f"return document.querySelectorAll('{cells}').length") == 2 * count**2
        assert browser.run("return document.querySelectorAll('svg.chart polyline').length") == 4
        assert browser.run("return document.querySelectorAll('#lengths tr').length") == 3

        framed = "return [...document.querySelectorAll('.same')].map(t => t.dataset.token)"
        assert browser.run(framed) == []
        browser.point_at("article:first-of-type .token[data-token='2']")
        assert browser.run(framed) == ["2", "2"], "the token is framed in both rows"

        wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not browser.run(wide), "no sideways scrolling"
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        assert [m for m in browser.messages() if m["level"] in ("SEVERE", "WARNING")] == []
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"data": "gone.txt"}, 3, "file gone.txt does not exist"),
        ({"data": "texts.pdf"}, 3, "must end in one of .tsv"),
        ({"data": "empty.txt"}, 3, "empty.txt has no texts"),
        ({"data": "other.csv"}, 3, "no column 'text'"),
        ({"original": "gone"}, 4, "does not exist"),
        ({"patched": "encoder"}, 4, "one gives class logits and one does not"),
        ({"metric": "prob"}, 4, "needs a masked-language-model head"),
        ({"output": "texts.pdf/out"}, 5, "can't write"),
        ({"metric": "l2"}, 2, "dist, cos, prob"),
        ({"baseline": "noise"}, 2, "pad, mask, zero"),
    ],
)
def test_errors(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("texts.pdf").write_text("the film")
    Path("empty.txt").write_text("\n\n")
    Path("other.csv").write_text("sentence,label\na,b\n")
    if change.get("patched"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folders[0])
        model.bert.save_pretrained("encoder")
        transformers.AutoTokenizer.from_pretrained(folders[0]).save_pretrained("encoder")
    given = {"original": folders[0], "patched": folders[1], "data": folders[2], "output": "out",
             "metric": "dist", "baseline": "pad", **change}  # fmt: skip
    options = [part for name in ("data", "output", "metric", "baseline")
               for part in (f"--{name}", given[name])]  # fmt: skip
    result = run(given["original"], given["patched"], *options, "--lengths", "", "--points", "2")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_model_compared_with_itself(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, _, data = folders
    result = run(original, original, "--data", data, "--output", tmp_path, "--lengths", "",
                 "--points", "2")  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "diagnose.json").read_text())["summary"]
    assert min(summary["spearman"], summary["impact_spearman"]) > 0.9  # rounding may swap two
    assert summary["output_difference"] < 1e-6


def test_pairs_keep_their_token_types(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, _, _ = folders
    (tmp_path / "pairs.tsv").write_text("text\ttext_pair\nthe film was great\ta dull plot\n")
    result = run(original, original, "--data", tmp_path / "pairs.tsv", "--output", tmp_path,
                 "--lengths", "", "--points", "2")  # fmt: skip
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((tmp_path / "diagnose.json").read_text())["texts"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(original)
    tokenizer = transformers.AutoTokenizer.from_pretrained(original)
    pair = tokenizer("the film was great", "a dull plot", return_tensors="pt")
    assert pair["token_type_ids"].any()
    words = [[i] for i in (1, 2, 3, 4, 6, 7, 8)]
    want = impact_matrix(
        model, pair["input_ids"], tokenizer.mask_token_id, spans=words,
        token_type_ids=pair["token_type_ids"],
    )  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(entry["impact"]["original"]).double(), want, atol=1e-4, rtol=1e-4
    )


def test_masked_language_models(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """They keep their head, which "prob" reads; attributions are those of their encoders."""
    classifier, _, data = folders
    config = transformers.AutoConfig.from_pretrained(classifier)
    model = transformers.BertForMaskedLM(config)
    for name in ("softmax", "linear"):
        model = fastattn.linearize(model, "elu") if name == "linear" else model
        model.save_pretrained(tmp_path / name)
        transformers.AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path / name)
    result = run(tmp_path / "softmax", tmp_path / "linear", "--data", data, "--output", tmp_path,
                 "--lengths", "16", "--points", "2", "--metric", "prob")  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "diagnose.json").read_text())
    assert report["settings"]["objective"].startswith("cosine")
    assert [point["length"] for point in report["measurements"]] == [16, 16]
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    entry = report["texts"][0]
    ids = tokenizer(entry["text"], return_tensors="pt")["input_ids"]
    words = [[i] for i, special in enumerate(entry["special"]) if not special]
    want = impact_matrix(
        fastattn.load(tmp_path / "linear"), ids, tokenizer.mask_token_id, metric="prob", spans=words
    )
    got = torch.tensor(entry["impact"]["patched"]).double()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
