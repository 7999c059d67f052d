"""Is the new model still the old one? Attributions of both, token beside token.

Two models can agree on every label for different reasons; a model that was linearised or
compressed well also gives the tokens the same say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastattn.diagnose.attribution import (
    Attribution,
    Objective,
    attribute,
    mean_pooled,
    similarity_to,
)
from fastattn.diagnose.ranks import kendall, spearman, top_overlap
from fastattn.diagnose.texts import Text, check_texts, encode, evaluating, forward

TOP = 5


@dataclass(frozen=True)
class Pair:
    """One text seen by both models."""

    text: Text
    original: Attribution
    patched: Attribution

    @property
    def spearman(self) -> float:
        """Rank correlation of the words' scores; NaN for fewer than two."""
        return spearman(self.original.word_scores, self.patched.word_scores)

    @property
    def kendall(self) -> float:
        """Kendall's tau-b of the words' scores."""
        return kendall(self.original.word_scores, self.patched.word_scores)

    @property
    def top_overlap(self) -> float:
        """The share of the ``TOP`` strongest words that both models have in common; NaN for texts
        of no more words than that."""
        return top_overlap(self.original.word_scores, self.patched.word_scores, TOP)


@dataclass(frozen=True)
class Comparison:
    """The pairs of all texts, and their means."""

    pairs: list[Pair]
    objective: str

    def summary(self) -> dict[str, float]:
        """Means over the texts: rank correlations, overlap and outputs; the largest gaps."""
        pairs = self.pairs
        return {
            "texts": len(pairs),
            "spearman": _mean([pair.spearman for pair in pairs]),
            "kendall": _mean([pair.kendall for pair in pairs]),
            "top_overlap": _mean([pair.top_overlap for pair in pairs]),
            "output_difference": _mean([abs(p.original.output - p.patched.output) for p in pairs]),
            "original_gap": max(pair.original.gap for pair in pairs),
            "patched_gap": max(pair.patched.gap for pair in pairs),
        }


def compare(
    original: nn.Module,
    patched: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    baseline: str = "pad",
    points: int = 100,
    max_length: int | None = None,
) -> Comparison:
    """Attribute the same output of both models to the same tokens.

    Of classifiers, the logit of the class that ``original`` predicts; of other encoders, whatever
    their head, the cosine to ``original``'s own embedding of the text. The arguments and errors
    are those of ``attribute``.

    Raises:
        TypeError: one string in place of several.
        ValueError: no texts, or models with outputs of different kinds or different labels.
    """
    check_texts(texts)
    if not texts:
        raise ValueError("texts is empty: there is nothing to compare")
    options: dict[str, Any] = {"baseline": baseline, "points": points, "max_length": max_length}
    classify = _classifies(original)
    if classify != _classifies(patched):
        raise ValueError(
            f"{type(original).__name__} and {type(patched).__name__} can't be compared: one gives "
            "class logits and one does not"
        )
    if classify:
        _check_labels(original, patched)
    else:
        original, patched = (getattr(model, "base_model", model) for model in (original, patched))
    pairs = []
    for text in texts:
        wanted: dict[str, Any] = _target(original, tokenizer, text, max_length, classify)
        first, second = (
            attribute(model, tokenizer, [text], **wanted, **options)[0]
            for model in (original, patched)
        )
        pairs.append(Pair(text, first, second))
    what = "logit of the class that the original predicts"
    return Comparison(pairs, what if classify else "cosine to the original's embedding")


def _classifies(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _check_labels(original: Any, patched: Any) -> None:
    """One class must have one number in both, or different logits would be attributed."""
    from fastattn.recipes.models import (  # needs transformers, as its models do
        output_labels,
        show_labels,
    )

    labels, others = output_labels(original.config), output_labels(patched.config)
    if labels != others:
        raise ValueError(
            f"original and patched must have the same labels in the same order; got "
            f"{show_labels(labels)} and {show_labels(others)}"
        )


def _target(
    model: nn.Module, tokenizer: Any, text: Text, max_length: int | None, classify: bool
) -> dict[str, int | Objective]:
    inputs, _ = encode(model, tokenizer, text, max_length)
    with evaluating(model), torch.no_grad():
        outputs, mask = forward(model, inputs)
    if classify:
        return {"target": int(outputs.logits.argmax(-1))}
    return {"objective": similarity_to(mean_pooled(outputs.last_hidden_state, mask)[0])}


def _mean(values: list[float]) -> float:
    """The mean of those that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
