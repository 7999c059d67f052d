"""What a wheel holds, and what importing it costs and needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

import fastattn

ROOT = Path(__file__).parents[1]


def run(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_folder_is_a_package() -> None:
    """A folder without ``__init__.py`` works in a checkout and is missing in a wheel."""
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "fastattn").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert set(find_packages(str(ROOT), include=["fastattn", "fastattn.*"])) == names


def test_import_is_light_and_needs_torch_alone() -> None:
    """With the packages of every extra missing, all but the Hugging Face part works."""
    done = run(
        "import sys\n"
        "extras = ('transformers', 'safetensors', 'datasets', 'accelerate', 'matplotlib', 'rich',\n"
        "          'typer', 'pandas')\n"
        "import fastattn\n"
        "assert not [name for name in extras if name in sys.modules]\n"
        "for name in extras:\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "module, x = fastattn.LinearAttention(8, 2, feature_map='t2r'), torch.ones(3, 1, 8)\n"
        "assert module(x, x, x)[0].shape == x.shape\n"
        "fastattn.linearize\n"
    )
    assert done.returncode == 1
    assert "fastattn.models needs transformers: pip install 'fastattn[models]'" in done.stderr


@pytest.mark.parametrize("name", ["models", "theseus", "theseus.mgs", "generation"])
def test_a_missing_transformers_names_its_extra(name: str) -> None:
    done = run(f"import sys\nsys.modules['transformers'] = None\nimport fastattn.{name}\n")
    assert done.returncode == 1
    assert done.stderr.endswith("needs transformers: pip install 'fastattn[models]'\n")


def test_native_library_knows_nothing_of_torch() -> None:
    libraries = [str(file) for file in (ROOT / "fastattn").glob("_native*.so")]
    done = run(
        "import importlib.util, sys\n"
        f"for path in {libraries}:\n"
        "    spec = importlib.util.spec_from_file_location('_native', path)\n"
        "    native = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(native)\n"
        "    assert native.isas()\n"
        "assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    build = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "requires" in build and '"torch' not in build


def test_public_names_are_there() -> None:
    for name in fastattn.__all__:
        assert getattr(fastattn, name) is not None
