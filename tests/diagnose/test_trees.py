"""Decoders against enumeration, the evaluator against hand-counted trees, ties against chains."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fastattn.diagnose import (
    Sentence,
    adjacent_impact,
    chain,
    read_conllu,
    score_attachment,
    score_segmentation,
    segment,
    spans_of_words,
    tree,
)


def is_projective_tree(heads: tuple[int, ...]) -> bool:
    if heads.count(0) != 1:
        return False
    for word in range(1, len(heads) + 1):
        seen, at = set(), word
        while at:
            if at in seen:
                return False
            seen.add(at)
            at = heads[at - 1]
    arcs = [tuple(sorted((word, head))) for word, head in enumerate(heads, 1) if head]
    crossing = any(a < c < b < d for (a, b), (c, d) in itertools.permutations(arcs, 2))
    root = heads.index(0) + 1
    covered = any(a < root < b for a, b in arcs)
    return not crossing and not covered


@pytest.mark.parametrize("words", [1, 2, 3, 4, 5])
def test_eisner_finds_the_best_projective_tree(words: int, seed: int) -> None:
    matrix = 4 * torch.randn(words, words)
    weight = matrix.double().softmax(1)

    def score(heads: tuple[int, ...]) -> float:
        return sum(float(weight[i, head - 1]) for i, head in enumerate(heads) if head)

    everything = itertools.product(range(words + 1), repeat=words)
    trees = [heads for heads in everything if is_projective_tree(heads)]
    assert tuple(tree(matrix)) == max(trees, key=score)
    for root in range(words):
        best = max((heads for heads in trees if heads[root] == 0), key=score)
        assert tuple(tree(matrix, root=root)) == best


def test_bracketings_find_the_planted_halves() -> None:
    """Strong impact within words 0-2 and 3-6, weak across."""
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    matrix = torch.where(group[:, None] == group, 5.0, 0.1)
    left, (middle, right) = tree(matrix, "su")
    assert (flat(left), middle, flat(right)) == ([0, 1, 2], 3, [4, 5, 6])
    for method in ("mart", "su"):
        assert flat(tree(matrix, method)) == list(range(7))


def test_mart_cuts_where_its_formula_says(seed: int) -> None:
    n = 6
    matrix = torch.randn(n, n)
    distance = 1 - matrix.double().exp() / matrix.double().exp().sum(0)
    distance.fill_diagonal_(0)
    costs = []
    for k in range(1, n):
        inside = distance[:k, :k].sum() / (2 * k) + distance[k + 1 :, k + 1 :].sum() / (2 * (n - k))
        across = distance[:k, k + 1 :].sum() + distance[k + 1 :, :k].sum()
        costs.append(float(inside - across / (k * (n - k))))
    k = 1 + costs.index(min(costs))
    left, right = tree(matrix, "mart")
    assert flat(left) == list(range(k)) and right[0] == k


def flat(bracketing: object) -> list[int]:
    if isinstance(bracketing, int):
        return [bracketing]
    return [word for part in bracketing for word in flat(part)]


def test_ties_are_broken_at_random() -> None:
    """A zero matrix must not become the right chain, which is a strong baseline in English."""
    zero = torch.zeros(12, 12)
    found = {tuple(tree(zero, seed=seed)) for seed in range(20)}
    assert len(found) > 15
    right = tuple(chain(Sentence(["w"] * 12, [0] * 12)))
    assert right not in found
    assert tree(zero, seed=3) == tree(zero, seed=3)
    assert len({str(tree(zero, "su", seed=seed)) for seed in range(20)}) > 5


def test_tree_arguments() -> None:
    square = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="method must be one of eisner, mart, su; got 'cky'"):
        tree(square, "cky")
    with pytest.raises(ValueError, match=r"square and not empty; got \[2, 3\]"):
        tree(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="NaN"):
        tree(square + torch.nan)
    with pytest.raises(ValueError, match="infinite"):
        tree(torch.full((4, 4), torch.inf))
    with pytest.raises(ValueError, match="root must be within 0..2; got 3"):
        tree(square, root=3)
    with pytest.raises(ValueError, match="root is for"):
        tree(square, "su", root=1)


CONLLU = """\
# text = They don't go far
1\tThey\tthey\tPRON\t_\t_\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\t_\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\t_\t_\t4\tadvmod\t_\t_
4\tgo\tgo\tVERB\t_\t_\t0\troot\t_\t_
4.1\tgo\t_\t_\t_\t_\t_\t_\t_\t_
5\tfar\tfar\tADV\t_\t_\t4\tadvmod\t_\t_
"""


def test_conllu_and_scores(tmp_path: Path) -> None:
    path = tmp_path / "some.conllu"
    path.write_text(CONLLU + "\n" + CONLLU)  # the second one ends with the file
    sentences = read_conllu(path)
    assert [s.words for s in sentences] == [["They", "do", "n't", "go", "far"]] * 2
    assert sentences[0].heads == [4, 4, 4, 0, 4]
    for direction in ("right", "left"):
        score = score_attachment([chain(s, direction) for s in sentences], sentences)
        assert (score.words, score.uas, score.uuas) == (10, 40, 40)
    score = score_attachment([[4, 4, 4, 5, 0]] * 2, sentences)  # go-far the wrong way round
    assert (score.words, score.uas, score.uuas) == (10, 60, 80)
    path.write_text("1\tThey\n")
    with pytest.raises(ValueError, match="line 1 is no CoNLL-U"):
        read_conllu(path)
    with pytest.raises(ValueError, match="one head for each word"):
        score_attachment([[1]], sentences[:1])
    with pytest.raises(ValueError, match="direction"):
        chain(sentences[0], "up")


def test_pud_chains() -> None:
    """The published baselines, where the treebank is at hand."""
    import os

    folder = os.environ.get("FASTATTN_DATA")
    if not folder or not (Path(folder) / "pud" / "en_pud.conllu").is_file():
        pytest.skip("set FASTATTN_DATA to a folder with pud/en_pud.conllu")
    gold = read_conllu(Path(folder) / "pud" / "en_pud.conllu")
    scores = {d: score_attachment([chain(s, d) for s in gold], gold) for d in ("right", "left")}
    assert scores["right"].words == 21176
    assert [round(s.uas, 2) for s in scores.values()] == [35.04, 10.74]
    assert [round(s.uuas, 2) for s in scores.values()] == [39.84, 37.03]


def test_segmentation() -> None:
    matrix = torch.zeros(5, 5)
    for i, strength in enumerate([4.0, 1.0, 5.0, 0.5]):
        matrix[i, i + 1], matrix[i + 1, i] = strength - 0.25, strength + 0.25
    assert adjacent_impact(matrix).tolist() == [4, 1, 5, 0.5]
    assert segment(matrix, threshold=2) == [(0, 2), (2, 4), (4, 5)]
    assert segment(matrix, quantile=0.0) == [(0, 5)]
    assert segment(matrix, quantile=0.5) == [(0, 2), (2, 4), (4, 5)]
    assert segment(torch.zeros(1, 1), quantile=0.5) == [(0, 1)]
    gold = spans_of_words(["ab", "c", "de"])
    assert gold == [(0, 2), (2, 3), (3, 5)]
    score = score_segmentation([segment(matrix, threshold=2)], [gold])
    assert (score.precision, score.recall) == (1 / 3, 1 / 3)
    assert score.f1 == pytest.approx(1 / 3)
    assert score_segmentation([gold], [gold]).f1 == 1
    with pytest.raises(ValueError, match="a threshold or a quantile; got None and None"):
        segment(matrix)
    with pytest.raises(ValueError, match="infinite entries beside its diagonal"):
        segment(matrix + torch.nan, threshold=0.0)
    with pytest.raises(ValueError, match="quantile must be within 0..1; got 2"):
        segment(matrix, quantile=2)
    with pytest.raises(ValueError, match="ends at 3 but its gold at 5"):
        score_segmentation([[(0, 3)]], [gold])
