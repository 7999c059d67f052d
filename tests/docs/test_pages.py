"""README and docs are true: their Python runs, their tables come from the committed run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from bench import publish

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_python_in_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        with torch.no_grad():
            exec(compile(block, "README.md", "exec"), {})


def test_figures_are_those_of_the_committed_run() -> None:
    for page in publish.PAGES:
        text = page.read_text()
        assert publish.fill(text) == text, f"{page.name}: run python -m bench.publish"


def test_an_unknown_block_or_result_is_refused() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        publish.fill("<!-- bench nonsense cpu -->\n<!-- bench end -->")
    with pytest.raises(FileNotFoundError, match=r"nonsense\.json"):
        publish.fill("<!-- bench summary nonsense -->\n<!-- bench end -->")
