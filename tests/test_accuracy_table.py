"""The table of bench.accuracy, from the score files of its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")

from bench.accuracy import table


def test_scores_are_set_against_the_teacher_of_their_own_seed(tmp_path: Path) -> None:
    runs = [
        ("teacher", 0, 0.9), ("teacher", 1, 0.8), ("theseus", 0, 0.81), ("theseus", 1, 0.8),
    ]  # fmt: skip
    for variant, seed, accuracy in runs:
        folder = tmp_path / f"rte-{seed}-{variant}"
        folder.mkdir()
        scores = {"task": "rte", "variant": variant, "seed": seed, "seconds": 90}
        (folder / "scores.json").write_text(json.dumps({**scores, "accuracy": accuracy}))
    _, _, teacher, theseus = table(tmp_path).splitlines()
    assert "| 0.8500 | 100.0 % | 0, 1 | 2 |" in teacher
    assert "| 0.8050 | 95.0 % | 0, 1 | 2 |" in theseus
