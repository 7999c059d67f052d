"""Texts that are not in the data, for a student to learn more of its teacher from.

A teacher knows the rows it was trained on by heart, so that its predictions of them say little more
than their labels. Of a text that has been changed it says something new, at no cost in labels
(Jiao et al. 2020, TinyBERT, https://arxiv.org/abs/1909.10351, who change words with a language
model and with neighbours among word vectors; here the latter, from the teacher's own embeddings,
and whatever words as in Tang et al. 2019, https://arxiv.org/abs/1903.12136).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.recipes.training import Batch, Collator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -100  # what cross entropy leaves out
SHARE_NEAR = 0.7  # of the changed tokens become one of their neighbours

Neighbours = dict[int, list[int]]


class ChangingCollator(Collator):
    """As ``Collator``, with half of the rows changed and without their labels.

    Of a changed row a share of the tokens, drawn anew between 0 and ``most``, becomes others: most
    of them one of their ``neighbours``, the rest (and those without neighbours) any token of the
    batch, distributed as those of the data are. In one batch of four all rows are changed, and
    before that get the text of another row added, unless they become longer than ``max_length``:
    where the texts to be judged are longer than those of the training data, it helps to have seen
    such, and rows of like length waste no padding. In the other batches a third of the rows are
    changed. All draws are from torch's generator.

    Args:
        join: whether texts may be joined; not where a row is a pair of texts. If not, half of the
            rows of each batch are changed.
        neighbours: of each token, as ``nearest_tokens`` finds them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        join: bool,
        neighbours: Neighbours,
        most: float = 0.4,
    ) -> None:
        super().__init__(tokenizer)
        self.neighbours = neighbours
        self.special = set(tokenizer.all_special_ids)
        self.max_length, self.join, self.most = max_length, join, most

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        pool = [token for row in rows for token in row["input_ids"] if token not in self.special]
        if not pool:
            return super().__call__(rows)
        join = self.join and _random() < 0.25
        every = 1 if join else 3 if self.join else 2
        return super().__call__(
            [
                row if (i + 1) % every else self._change(row, rows, pool, join)
                for i, row in enumerate(rows)
            ]
        )

    def _change(
        self, row: dict[str, Any], rows: Sequence[dict[str, Any]], pool: list[int], join: bool
    ) -> dict[str, Any]:
        ids = list(row["input_ids"])
        if join:
            other = rows[_below(len(rows))]["input_ids"]
            ids = self._joined(ids, [token for token in other if token not in self.special])
        rate = _random() * self.most
        chosen = (torch.rand(len(ids)) < rate).tolist()
        for i, is_chosen in enumerate(chosen):
            if is_chosen and ids[i] not in self.special:
                near = self.neighbours.get(ids[i])
                others = near if near and _random() < SHARE_NEAR else pool
                ids[i] = others[_below(len(others))]
        changed = {**row, "input_ids": ids, "label": NO_LABEL}
        if len(ids) != len(row["input_ids"]):  # of one text, so one value fits all
            for name in ("attention_mask", "token_type_ids"):
                if name in row:
                    changed[name] = [row[name][0]] * len(ids)
        return changed

    def _joined(self, ids: list[int], more: list[int]) -> list[int]:
        end = len(ids)
        while end and ids[end - 1] in self.special:
            end -= 1
        joined = ids[:end] + more + ids[end:]
        return joined if len(joined) <= self.max_length else ids


def nearest_tokens(embedding: Tensor, tokens: Iterable[int], count: int = 10) -> Neighbours:
    """For each of ``tokens`` those ``count`` others of them with the largest cosine.

    Args:
        embedding: (vocabulary, features), whose mean is taken off first: it is most of what word
            embeddings have in common.
    """
    known = torch.tensor(sorted(set(tokens)))
    count = min(count, len(known) - 1)
    if count < 1:
        return {}
    with torch.no_grad():
        vectors = embedding.detach().cpu().float()[known]
        vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
        found: Neighbours = {}
        for at in torch.arange(len(known)).split(1024):
            similar = vectors[at] @ vectors.T
            similar[torch.arange(len(at)), at] = -torch.inf
            nearest = known[similar.topk(count, -1).indices].tolist()
            found.update(zip(known[at].tolist(), nearest, strict=True))
    return found


def _random() -> float:
    return float(torch.rand(()))


def _below(limit: int) -> int:
    return int(torch.randint(limit, ()))
