"""Real labelled text that every machine with PyTorch has: the documentation of its packages.

A text is what one top-level class says about itself and its methods, one long function's
documentation, or that of a module's short functions together; its label is the subpackage it was
found in. Sources are parsed, never imported. Everything is decided by the texts themselves (sorted
by their digest), so the same package versions give the same data set on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUBPACKAGES = (
    "matplotlib", "networkx.algorithms", "networkx.generators", "numpy._core", "numpy.lib",
    "numpy.ma", "pandas.core", "pandas.io", "sympy.combinatorics", "sympy.core",
    "sympy.functions", "sympy.integrals", "sympy.matrices", "sympy.ntheory", "sympy.physics",
    "sympy.polys", "sympy.stats", "torch._dynamo", "torch._inductor", "torch.distributed",
    "torch.fx", "torch.nn", "torch.utils", "transformers.generation", "transformers.utils",
    "huggingface_hub",
)  # fmt: skip
MIN_CLASSES = 20
MIN_CHARACTERS = 250
LONG_CHARACTERS = 1700  # mostly more than 512 word pieces
SKIPPED = {"tests", "test", "testing", "_testing", "_vendor", "__pycache__"}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Text:
    text: str
    label: str
    module: str

    @property
    def digest(self) -> str:
        return _digest(self.text)


def harvest(
    train_rows: int = 76, dev_rows: int = 14, long_share: float = 0.18
) -> dict[str, list[Text]]:
    """``{"train": [...], "dev": [...]}`` with at most so many texts of each subpackage.

    At most ``long_share`` of them are long. All texts of a module are in the same split:
    docstrings of one file repeat each other's phrases. Duplicates, also those that differ in
    white space or case only, are removed.
    """
    seen: set[str] = set()
    splits: dict[str, list[Text]] = {"train": [], "dev": []}
    for label in SUBPACKAGES:
        texts = []
        for text in sorted(_texts(label), key=lambda t: t.digest):
            if (key := _digest(" ".join(text.text.lower().split()))) not in seen:
                seen.add(key)
                texts.append(text)
        split_of = _split_modules(Counter(text.module for text in texts), dev_rows)
        for split, rows in (("train", train_rows), ("dev", dev_rows)):
            own = [text for text in texts if split_of[text.module] == split]
            long = [text for text in own if len(text.text) >= LONG_CHARACTERS]
            short = [text for text in own if len(text.text) < LONG_CHARACTERS]
            long = long[: round(rows * long_share)]
            splits[split] += long + short[: rows - len(long)]
    classes = len({text.label for text in splits["train"]})
    if classes < MIN_CLASSES:
        raise RuntimeError(
            f"only {classes} of {MIN_CLASSES} subpackages found: is torch installed?"
        )
    return {split: sorted(rows, key=lambda t: t.digest) for split, rows in splits.items()}


def write(splits: dict[str, list[Text]], folder: Path) -> None:
    """``train.jsonl`` and ``dev.jsonl`` with the columns text and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        rows = (json.dumps({"text": t.text, "label": t.label}, ensure_ascii=False) for t in texts)
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _texts(label: str) -> Iterator[Text]:
    package = label.split(".")[0]
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        return
    root = Path(spec.origin).parent
    below = root.joinpath(*label.split(".")[1:])
    files = below.rglob("*.py") if "." in label else below.glob("*.py")
    for file in sorted(files):
        module = file.relative_to(root.parent).as_posix()
        if SKIPPED.isdisjoint(file.relative_to(root).parts):
            for text in _module_texts(file):
                if len(text) >= MIN_CHARACTERS:
                    yield Text(text, label, module)


def _module_texts(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberate errors
        return
    rest = [ast.get_docstring(tree) or ""]
    for node in tree.body:
        if isinstance(node, Definition):
            text = "\n\n".join(_docstrings(node))
            if len(text) >= MIN_CHARACTERS:
                yield text
            else:
                rest.append(text)
    yield "\n\n".join(filter(None, rest))


def _docstrings(node: Definition) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield from _docstrings(child)


def _split_modules(sizes: Counter[str], dev_rows: int) -> dict[str, str]:
    """Modules, in the order of their digests, go to the dev set until it has ``dev_rows`` texts;
    a module that would fill more than half of it goes to the training set."""
    split_of, filled = {}, 0
    for module in sorted(sizes, key=_digest):
        is_dev = filled < dev_rows and sizes[module] <= dev_rows / 2
        split_of[module] = "dev" if is_dev else "train"
        filled += sizes[module] * is_dev
    return split_of


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def describe(splits: dict[str, list[Text]]) -> str:
    """One line: how many texts of how many kinds."""
    labels = Counter(text.label for text in splits["train"])
    return (
        f"{len(splits['train'])} training and {len(splits['dev'])} dev texts of "
        f"{len(labels)} subpackages ({min(labels.values())} to {max(labels.values())} each)"
    )
