"""Dependency trees against a treebank, beside the chains that any parser must beat.

A score means little alone: on English PUD "each word's head is the next word" reaches 35.04, and an
encoder with random weights as much. Always report the chains, a random encoder and a zero matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sentence:
    """Words and their heads: 1 is the first word, 0 means root."""

    words: list[str]
    heads: list[int]

    @property
    def root(self) -> int:
        """Index from 0 of the word without a head."""
        return self.heads.index(0)


def read_conllu(path: str | Path) -> list[Sentence]:
    """The sentences of a CoNLL-U file; multiword ranges and empty nodes are left out.

    Raises:
        ValueError: a line that is no CoNLL-U, with its number, or a sentence without a root.
    """
    sentences: list[Sentence] = []
    words: list[str] = []
    heads: list[int] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate([*lines, ""], start=1):
        if not line.strip():
            if words:
                if 0 not in heads:
                    raise ValueError(f"{path}: the sentence that ends at line {number} has no root")
                sentences.append(Sentence(words, heads))
                words, heads = [], []
        elif not line.startswith("#"):
            fields = line.split("\t")
            if len(fields) != 10 or (fields[0].isdecimal() and not fields[6].isdecimal()):
                raise ValueError(f"{path}, line {number} is no CoNLL-U: {line[:60]!r}")
            if fields[0].isdecimal():
                words.append(fields[1])
                heads.append(int(fields[6]))
    return sentences


def chain(sentence: Sentence, direction: str = "right") -> list[int]:
    """Each word's head is the next word ("right") or the one before ("left"); the root is given.

    Raises:
        ValueError: another direction.
    """
    if direction not in ("right", "left"):
        raise ValueError(f"direction must be right or left; got {direction!r}")
    step = 1 if direction == "right" else -1
    numbers = range(1, len(sentence.words) + 1)
    return [0 if i == sentence.root + 1 else i + step for i in numbers]


@dataclass(frozen=True)
class AttachmentScore:
    """Per cent of words whose head is right (``uas``), in either direction (``uuas``). Punctuation
    counts, and so does the root, which is right where it was given."""

    words: int
    uas: float
    uuas: float


def score_attachment(
    predicted: Sequence[Sequence[int]], gold: Sequence[Sentence]
) -> AttachmentScore:
    """Compare heads, numbered as in ``Sentence``, with a treebank's.

    Raises:
        ValueError: not as many trees, or words in a tree, as in ``gold``.
    """
    if [len(heads) for heads in predicted] != [len(sentence.heads) for sentence in gold]:
        raise ValueError("predicted must have one head for each word of gold")
    words = directed = undirected = 0
    for heads, sentence in zip(predicted, gold, strict=True):
        for word, (head, true) in enumerate(zip(heads, sentence.heads, strict=True), start=1):
            reversed_too = 1 <= head <= len(heads) and sentence.heads[head - 1] == word
            words += 1
            directed += head == true
            undirected += head == true or reversed_too
    return AttachmentScore(words, 100 * directed / max(words, 1), 100 * undirected / max(words, 1))
