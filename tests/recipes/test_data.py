"""Files are read as they are, and what is wrong with them is said before any training."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets")

from fastattn.recipes.data import find_files, limit_train, load_task, read_texts, tokenize
from fastattn.recipes.errors import DataError

TSV = "text\tlabel\nfine\t1\npoor\t0\n"


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        split, _, suffix = name.partition("_")
        (folder / f"{split}.{suffix}").write_text(content, encoding="utf-8")
    return folder


def load(folder: Path, **options: object):
    return load_task(*find_files(folder), **options)


def test_tsv_takes_quotes_and_words_like_NA_as_text(tmp_path: Path) -> None:
    write(tmp_path, train_tsv='text\tlabel\n"half open\t1\nNA\t0\n12\t1\n', dev_tsv=TSV)
    task = load(tmp_path)
    assert task.train["text"][:] == ['"half open', "NA", "12"]
    assert task.train["label"][:] == [1, 0, 1]


def test_csv_takes_quoted_commas_and_line_breaks(tmp_path: Path) -> None:
    write(tmp_path, train_csv='text,label\n"a, ""b""\nc",x\nd,y\n', dev_csv="text,label\nd,x\n")
    task = load(tmp_path)
    assert task.train["text"][:] == ['a, "b"\nc', "d"]
    assert task.labels == ("x", "y")


def test_jsonl_takes_string_and_integer_labels_and_other_columns(tmp_path: Path) -> None:
    write(
        tmp_path,
        train_jsonl='{"id": 7, "text": "a", "label": 10}\n{"id": 8, "text": "b", "label": 9}\n',
        dev_jsonl='{"text": "b", "label": "10"}\n',
    )
    task = load(tmp_path)
    assert task.labels == ("9", "10")  # by number, not by letter
    assert task.train["label"][:] == [1, 0]
    assert task.id2label == {0: "9", 1: "10"}


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    """A column whose kind changes beyond the rows that a parser looks at first."""
    rows = "".join(f"text,{i if i < 11_000 else ''},{i % 2}\n" for i in range(11_001))
    task = load(write(tmp_path, train_csv="text,year,label\n" + rows, dev_csv="text,label\na,0\n"))
    assert len(task.train) == 11_001


def test_labels_with_signs_are_numbers(tmp_path: Path) -> None:
    signed = "text,label\na,+1\nb,-1\nc,--1\n"
    assert load(write(tmp_path, train_csv=signed, dev_csv=signed)).labels == ("+1", "--1", "-1")
    signed = signed.replace("c,--1\n", "")
    assert load(write(tmp_path, train_csv=signed, dev_csv=signed)).labels == ("-1", "+1")


def test_a_model_with_one_output_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model has the single output 'LABEL_0'"):
        load(write(tmp_path, train_tsv=TSV, dev_tsv=TSV), labels=("LABEL_0",))


def test_texts_without_labels(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "a.tsv"
    lines.write_bytes("\ufefffine\n\n  \npoor\n".encode())
    assert read_texts(lines) == ["fine", "poor"]
    rows.write_text("text\ttext_pair\na\tb\n\t\nc\td\n")
    assert read_texts(rows) == [("a", "b"), ("c", "d")]
    rows.write_text("text\ttext_pair\na\tb\nc\t \n")
    with pytest.raises(DataError, match="row 2 has half a pair"):
        read_texts(rows)
    numbers = tmp_path / "a.jsonl"
    numbers.write_text('{"text": 12}\n')
    with pytest.raises(DataError, match="row 1 has the text 12; it must be a string"):
        read_texts(numbers)
    lines.write_bytes("f\xfcr\n".encode("latin-1"))
    with pytest.raises(DataError, match="it is not UTF-8"):
        read_texts(lines)


def test_pairs(tmp_path: Path) -> None:
    pairs = "text\ttext_pair\tlabel\na\tb\tyes\nc\td\tno\n"
    task = load(write(tmp_path, train_tsv=pairs, dev_tsv=pairs))
    assert task.has_pairs and task.labels == ("no", "yes")
    write(tmp_path, dev_tsv=TSV)
    with pytest.raises(DataError, match="'text_pair' and .* has none"):
        load(tmp_path)


def test_labels_of_a_fine_tuned_model_decide_the_order(tmp_path: Path) -> None:
    task = load(write(tmp_path, train_tsv=TSV, dev_tsv=TSV), labels=("1", "0", "2"))
    assert task.train["label"][:] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("text\tlabel\n", "has no rows"),
        ("sentence\tlabel\na\t1\n", "no column 'text'; its columns are 'sentence', 'label'"),
        ("text\tclass\na\t1\n", "no column 'label'"),
        ("text\tlabel\na\n", "row 1 has no label"),
        ("text\tlabel\na\t \n", "row 1 has no label"),
        ("text\tlabel\na\tb\t1\n", "can't read"),
        ("text\tlabel\na\t1\nb\tc\t1\n", "Expected 2 fields in line 3"),
        ("text\tlabel\na\t1\nb\t1\n", "all 2 rows have the label '1'"),
    ],
)
def test_bad_training_file(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, train_tsv=content, dev_tsv=TSV)
    with pytest.raises(DataError, match=message) as raised:
        load(tmp_path)
    assert "train.tsv" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"text": "a", "label"', "can't read"),
        ('{"text": "a"}\n', "no column 'label'"),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "row 2 has no label"),
        ('{"text": "a", "label": 1.5}\n', "label 1.5"),
        ('{"text": "a", "label": true}\n', "label True"),
        ('{"text": ["a"], "label": 1}\n', "a text must be a string"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, train_jsonl=content, dev_tsv=TSV)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    write(tmp_path, dev_tsv=TSV)
    (tmp_path / "train.tsv").write_bytes(b"text\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match="utf-8"):
        load(tmp_path)


def test_outputs_without_names_go_by_both_spellings(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\na\tLABEL_1\nb\tLABEL_0\nc\t1\n")
    task = load_task(*find_files(tmp_path), ("0", "1"))
    assert task.train["label"][:] == [1, 0, 1]
    (tmp_path / "dev.tsv").write_text("text\tlabel\na\tLABEL_2\n")
    with pytest.raises(DataError, match=r"unknown label 'LABEL_2' \(1 rows\); known: 0, 1$"):
        load_task(*find_files(tmp_path), ("0", "1"))


def test_unknown_label_in_dev(tmp_path: Path) -> None:
    write(tmp_path, train_tsv=TSV, dev_tsv="text\tlabel\na\tmaybe\nb\tmaybe\n")
    with pytest.raises(DataError, match=r"dev.tsv: unknown label 'maybe' \(2 rows\); known: 0, 1"):
        load(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_files(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file; to name single files use --train and --dev"):
        find_files(tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(DataError, match="give a data folder"):
        find_files(None, tmp_path / "train.tsv")
    write(tmp_path, train_tsv=TSV, other_txt="x")
    with pytest.raises(DataError, match="no dev file in .* there is other.txt, train.tsv"):
        find_files(tmp_path)
    with pytest.raises(DataError, match="dev file .* does not exist"):
        find_files(tmp_path, dev=tmp_path / "gone.tsv")
    with pytest.raises(DataError, match="must end in one of"):
        find_files(tmp_path, dev=tmp_path / "other.txt")
    write(tmp_path, train_csv="text,label\n")
    with pytest.raises(DataError, match="train.tsv and train.csv: name the one"):
        find_files(tmp_path)


def test_reading_changes_no_setting_of_datasets(tmp_path: Path) -> None:
    from datasets.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load(write(tmp_path, train_tsv=TSV, dev_tsv=TSV))
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_limit_is_drawn_with_the_seed(tmp_path: Path) -> None:
    rows = "".join(f"text {i}\t{i % 2}\n" for i in range(40))
    task = load(write(tmp_path, train_tsv="text\tlabel\n" + rows, dev_tsv=TSV))
    drawn = [limit_train(task, 10, seed).train["text"][:] for seed in (0, 0, 1)]
    assert len(drawn[0]) == 10 and drawn[0] == drawn[1] != drawn[2]
    assert len(limit_train(task, 100, 0).train) == 40


def test_tokenize_truncates_and_keeps_labels(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.recipes.tiny import make_model

    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "model"))
    task = load(write(tmp_path, train_tsv=TSV + "the film was great\t1\n", dev_tsv=TSV))
    tokens = tokenize(task.train, tokenizer, max_length=5)
    assert tokens["length"][:] == [3, 3, 5]
    assert tokens["row"][:] == [0, 1, 2]
    assert tokens["label"][:] == [1, 0, 1]
    assert [len(ids) for ids in tokens["input_ids"]] == [3, 3, 5]
