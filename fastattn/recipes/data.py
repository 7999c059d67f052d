"""Text-classification data from files: read, checked, and turned into token ids.

A task is a training file and a dev file with the columns ``text``, optionally ``text_pair``, and
``label``. Whatever is wrong with them is found here, before any minute of training, and said in
terms of the file, the column and the label.

Formats: ``.tsv`` (GLUE's way: tabs separate, quotes are ordinary characters), ``.csv`` (RFC 4180)
and ``.jsonl`` / ``.json`` (one object a line). No cell is ever read as "missing": the text "NA" is
a text.
"""

from __future__ import annotations

import csv
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.recipes.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json")


@dataclass(frozen=True)
class Task:
    """A classification task: ``train`` and ``dev`` have the columns text[, text_pair], label.

    ``label`` holds indices into ``labels``, the names in the order of the model's outputs.
    """

    train: Dataset
    dev: Dataset
    labels: tuple[str, ...]
    has_pairs: bool

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))


def find_files(
    folder: Path | None, train: Path | None = None, dev: Path | None = None
) -> tuple[Path, Path]:
    """The training and dev file: the ones named, else ``train.*`` and ``dev.*`` in ``folder``.

    Raises:
        DataError: a file or the folder does not exist, or two files could be meant.
    """
    if folder is None and (train is None or dev is None):
        raise DataError("give a data folder with train.* and dev.* files, or both files by name")
    if folder is not None and not folder.is_dir():
        if folder.is_file():
            raise DataError(
                f"data folder {folder} is a file; to name single files use --train and --dev"
            )
        raise DataError(f"data folder {folder} does not exist")
    return _find(folder, "train", train), _find(folder, "dev", dev)


def find_dev_file(folder: Path | None, dev: Path | None = None) -> Path:
    """The dev file alone, found and refused in the same way."""
    if dev is not None:
        return _find(folder, "dev", dev)
    if folder is None:
        raise DataError("give a data folder with a dev.* file, or the file with --dev")
    if not folder.is_dir():
        raise DataError(f"data folder {folder} is not a folder")
    return _find(folder, "dev", None)


def load_task(train_file: Path, dev_file: Path, labels: tuple[str, ...] | None = None) -> Task:
    """Read and check both files.

    Args:
        labels: names of a fine-tuned model's outputs, in order; None takes them from the
            training file (numbers in numeric order, words in alphabetical order).

    Raises:
        DataError: an unreadable or empty file, a missing column, an empty or unknown label,
            fewer than two classes, or text pairs in one file only.
    """
    train, dev = _read(train_file), _read(dev_file)
    has_pairs = "text_pair" in train.column_names
    if has_pairs != ("text_pair" in dev.column_names):
        with_pairs, without = (train_file, dev_file) if has_pairs else (dev_file, train_file)
        raise DataError(f"{with_pairs} has a column 'text_pair' and {without} has none")

    if labels is not None and len(labels) < 2:
        raise DataError(
            f"the model has the single output {labels[0]!r}: it is no classifier, and a task needs "
            "at least two classes"
        )
    names = labels or _sorted_labels(set(train["label"]))
    if len(names) < 2:
        raise DataError(
            f"{train_file}: all {len(train)} rows have the label {names[0]!r}; "
            "a task needs at least two classes"
        )
    index = {name: i for i, name in enumerate(names)}
    for i, name in enumerate(names):  # what transformers calls an output that was given no name
        if name == str(i):
            index.setdefault(f"LABEL_{i}", i)
    _check_labels(train, train_file, index)
    _check_labels(dev, dev_file, index)

    def encode(dataset: Dataset) -> Dataset:
        column = [index[label] for label in dataset["label"]]
        return dataset.remove_columns("label").add_column("label", column)

    return Task(encode(train), encode(dev), names, has_pairs)


def read_texts(path: Path) -> list[str | tuple[str, str]]:
    """The texts, or pairs of texts, of one file: labels are not needed. Blank ones are left out.

    Raises:
        DataError: no such file, another format or encoding, no column 'text', a cell that is no
            string, half a pair, or no text in it.
    """
    if not path.is_file():
        raise DataError(f"file {path} does not exist")
    if path.suffix not in (*SUFFIXES, ".txt"):
        raise DataError(f"{path} must end in one of {', '.join((*SUFFIXES, '.txt'))}")
    if path.suffix == ".txt":
        try:
            texts: list[Any] = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"can't read {path}: it is not UTF-8 ({error.reason})") from error
    else:
        dataset = _parse(path)
        if "text" not in dataset.column_names:
            there = ", ".join(map(repr, dataset.column_names)) or "nothing"
            raise DataError(f"{path} has no column 'text'; its columns are {there}")
        columns = [name for name in ("text", "text_pair") if name in dataset.column_names]
        texts = list(zip(*(_texts_of(path, dataset, name) for name in columns), strict=True))
        for row, cells in enumerate(texts, start=1):
            if any(cell.strip() for cell in cells) and not all(cell.strip() for cell in cells):
                raise DataError(f"{path}: row {row} has half a pair: {cells!r}")
        texts = [cells if len(columns) == 2 else cells[0] for cells in texts]
    found = [text for text in texts if "".join(text).strip()]
    if not found:
        raise DataError(f"{path} has no texts")
    return found


def _texts_of(path: Path, dataset: Dataset, column: str) -> list[str]:
    cells: list[str] = ["" if cell is None else cell for cell in dataset[column][:]]
    for row, cell in enumerate(cells, start=1):
        if type(cell) is not str:
            raise DataError(f"{path}: row {row} has the {column} {cell!r}; it must be a string")
    return cells


def limit_train(task: Task, rows: int | None, seed: int) -> Task:
    """``task`` with at most ``rows`` training rows, drawn with ``seed``. Classes are kept in the
    proportion they happen to be drawn in."""
    if rows is None or rows >= len(task.train):
        return task
    return replace(task, train=task.train.shuffle(seed=seed).select(range(rows)))


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids without padding (batches are padded to their own longest row).

    Returns a dataset with the tokenizer's columns (``input_ids``, ``attention_mask``, perhaps
    ``token_type_ids``), ``label``, ``length`` (number of tokens, for length-grouped batches) and
    ``row`` (its number, for looking up a teacher's cached outputs).
    """
    pairs = "text_pair" in dataset.column_names

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = (batch["text"], batch["text_pair"]) if pairs else (batch["text"],)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    drop = [name for name in dataset.column_names if name != "label"]
    with quiet():
        tokens = dataset.map(encode, batched=True, remove_columns=drop, keep_in_memory=True)
    return tokens.add_column("row", list(range(len(tokens))))


def _find(folder: Path | None, split: str, named: Path | None) -> Path:
    if named is not None:
        if not named.is_file():
            raise DataError(f"{split} file {named} does not exist")
        if named.suffix not in SUFFIXES:
            raise DataError(f"{split} file {named} must end in one of {', '.join(SUFFIXES)}")
        return named
    assert folder is not None
    found = [
        folder / (split + suffix) for suffix in SUFFIXES if (folder / (split + suffix)).is_file()
    ]
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise DataError(
            f"no {split} file in {folder}: expected {split} + one of {', '.join(SUFFIXES)}; "
            f"there is {there}"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{folder} has {names}: name the one you mean with --{split}")
    return found[0]


def _parse(path: Path) -> Dataset:
    """The rows of one file, text, text_pair and label unconverted."""
    from datasets import Dataset

    is_json = path.suffix in (".jsonl", ".json")
    try:
        with path.open("rb") as lines:
            if sum(1 for _ in zip(lines, range(2), strict=False)) < (1 if is_json else 2):
                raise DataError(f"{path} has no rows")
        # Our own cache folder: what `datasets` would keep in the user's is stale after an edit.
        with tempfile.TemporaryDirectory() as cache, quiet():
            options: dict[str, Any] = {"cache_dir": cache, "keep_in_memory": True}
            if is_json:
                dataset = Dataset.from_json(str(path), **options)
            else:
                tabs = path.suffix == ".tsv"
                sep = "\t" if tabs else ","
                quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
                dataset = Dataset.from_csv(
                    str(path),
                    sep=sep,
                    quoting=quoting,
                    # All columns: those that nobody asked for may hold anything.
                    converters=dict.fromkeys(_header(path, sep, quoting), str),
                    keep_default_na=False,
                    index_col=False,  # else one field too many makes the first column vanish
                    encoding="utf-8-sig",
                    **options,
                )
    except DataError:
        raise
    except Exception as error:  # the parsers raise whatever they like
        raise DataError(f"can't read {path}: {_cause(error)}") from error
    return dataset


def _header(path: Path, sep: str, quoting: int) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return next(csv.reader(lines, delimiter=sep, quoting=quoting), [])  # type: ignore[arg-type]


def _read(path: Path) -> Dataset:
    """The columns text[, text_pair], label of one file, all as strings."""
    from datasets import Dataset

    dataset = _parse(path)
    for column in ("text", "label"):
        if column not in dataset.column_names:
            there = ", ".join(map(repr, dataset.column_names)) or "nothing"
            raise DataError(
                f"{path} has no column {column!r}; its columns are {there} "
                "(wanted: 'text', optionally 'text_pair', and 'label')"
            )
    wanted = [name for name in ("text", "text_pair", "label") if name in dataset.column_names]
    columns = {name: dataset[name][:] for name in wanted}
    for name, cells in columns.items():
        for row, cell in enumerate(cells, start=1):
            if cell is None or (name == "label" and str(cell).strip() == ""):
                raise DataError(f"{path}: row {row} has no {name}")
            if type(cell) is not str and not (name == "label" and type(cell) is int):
                raise DataError(
                    f"{path}: row {row} has the {name} {cell!r}; a text must be a string, "
                    "a label a string or an integer"
                )
    columns["label"] = [str(label).strip() for label in columns["label"]]
    return Dataset.from_dict(columns)


def _cause(error: BaseException) -> str:
    """The innermost message: ``datasets`` wraps what the parser said two or three times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(error).split()) or type(error).__name__


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    def is_integer(label: str) -> bool:
        return label.removeprefix("-").removeprefix("+").isdecimal()

    key: Callable[[str], Any] = int if all(map(is_integer, labels)) else str
    return tuple(sorted(labels, key=key))


def _check_labels(dataset: Dataset, path: Path, index: dict[str, int]) -> None:
    unknown = Counter(label for label in dataset["label"] if label not in index)
    if unknown:
        worst, count = unknown.most_common(1)[0]
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        known = list(index)[: 1 + max(index.values())]  # without other spellings
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise DataError(f"{path}: unknown label {worst!r} ({count} rows){more}; known: {shown}")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or log lines of ``datasets`` inside, and pandas' "fields were dropped"
    is an error; all settings are put back afterwards."""
    from datasets.utils import logging
    from pandas.errors import ParserWarning

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
