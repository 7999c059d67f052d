"""Perturbed masking: how much one token's representation depends on another token.

Mask token i and look at its vector; mask token j as well and see how far it moves:
F[i, j] = d(H(x without i)_i, H(x without i, j)_i). Nothing is trained, so the matrix shows what
the encoder itself knows of structure, and two encoders can be compared entry by entry.

Source: Wu, Chen, Kao, Liu, "Perturbed Masking", 2020, https://arxiv.org/abs/2004.14786.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.diagnose.ranks import kendall, spearman
from fastattn.diagnose.texts import evaluating

METRICS = ("prob", "dist", "cos")
TOKENS_PER_BATCH = 4096


def impact_matrix(
    model: nn.Module,
    input_ids: Tensor,
    mask_token_id: int,
    *,
    token_type_ids: Tensor | None = None,
    metric: str = "dist",
    layer: int = -1,
    spans: Sequence[Sequence[int]] | None = None,
    band: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Tensor:
    """The impact F (n, n) of each span (column) on each span (row); its diagonal is 0.

    The input without i and j is that without j and i, so n (n + 1) / 2 distinct inputs are run.

    Args:
        model: a transformers encoder; for "prob" one with a masked-language-model head.
        input_ids: (T,) or (1, T), one text without padding.
        mask_token_id: what a masked token becomes.
        token_type_ids: as the tokenizer gives them for a pair, of the shape of ``input_ids``; None
            leaves them to the model, which takes all as one text.
        metric: "prob": the drop of the log-probability of span i's own tokens; "dist": the
            Euclidean distance, "cos": one minus the cosine, of its mean vector.
        layer: which hidden state "dist" and "cos" look at: 0 is the embeddings, -1 the last layer.
        spans: positions of each unit, for example a word's pieces; all of them are masked together.
            By default each of the T tokens, special tokens included.
        band: compute only |i - j| <= band; the other entries are NaN. For segmentation, 1.
        tokens_per_batch: tokens in one forward pass.

    Raises:
        ValueError: an unknown metric, a span that is empty or out of range, more than one text or
            none, a text longer than the model's positions, token types of another shape, a layer
            that isn't there, a band below 1, or no mask token.

    On float32 models entries that should be 0 are as large as rounding.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    ids = input_ids.reshape(-1) if input_ids.ndim < 2 or len(input_ids) == 1 else None
    if ids is None:
        raise ValueError(f"input_ids must be one text, (T,) or (1, T); got {list(input_ids.shape)}")
    _check_model(model, len(ids), mask_token_id, layer)
    if metric == "prob" and _predicts_the_next(model):
        raise _no_masked_head(model)
    if band is not None and band < 1:
        raise ValueError(f"band must be at least 1; got {band}")
    if token_type_ids is not None and token_type_ids.numel() != len(ids):
        raise ValueError(
            f"token_type_ids must be {len(ids)} like input_ids; got {list(token_type_ids.shape)}"
        )
    units: list[Sequence[int]] = [[i] for i in range(len(ids))] if spans is None else list(spans)
    for number, unit in enumerate(units):
        if not unit or min(unit) < 0 or max(unit) >= len(ids):
            raise ValueError(
                f"spans[{number}] must hold positions in 0..{len(ids) - 1}; got {unit}"
            )
    ids = ids.to(next(model.parameters()).device)
    types = None if token_type_ids is None else token_type_ids.reshape(-1).to(ids)
    count = len(units)
    reach = count if band is None else band
    pairs = [(i, j) for i in range(count) for j in range(i, min(count, i + reach + 1))]
    probe = _Probe(model, ids, types, units, metric, layer)
    rows_per_batch = max(1, tokens_per_batch // len(ids))
    seen: dict[tuple[int, int], Tensor] = {}  # (i, j): unit i's reading without i and j
    with evaluating(model), torch.no_grad():
        for start in range(0, len(pairs), rows_per_batch):
            batch = pairs[start : start + rows_per_batch]
            masked = ids.repeat(len(batch), 1)
            for row, (i, j) in enumerate(batch):
                masked[row, [*units[i], *units[j]]] = mask_token_id
            seen.update(probe.read(masked, batch))
    matrix = torch.full((count, count), torch.nan, dtype=torch.float64)
    matrix.fill_diagonal_(0)
    for (i, j), reading in seen.items():
        if i != j:
            matrix[i, j] = probe.distance(seen[i, i], reading)
    return matrix


def _check_model(model: Any, tokens: int, mask_token_id: int | None, layer: int) -> None:
    from fastattn.models.positions import position_limit  # needs transformers, as its models do

    config = getattr(model, "config", None)
    limit = None if config is None else position_limit(config)
    if not 1 <= tokens <= (limit or tokens):
        most = "" if limit is None else f" and at most {limit}, the model's positions"
        raise ValueError(f"input_ids must have at least 1 token{most}; got {tokens}")
    if mask_token_id is None or mask_token_id < 0:
        raise ValueError(f"mask_token_id must be a token id; got {mask_token_id}")
    states = getattr(config, "num_hidden_layers", None)
    if states is not None and not -states - 1 <= layer <= states:
        raise ValueError(f"layer must be within {-states - 1}..{states}; got {layer}")


def _predicts_the_next(model: Any) -> bool:
    """A language model whose logits at a position are those of the token after it."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    return getattr(config, "is_decoder", False) or bool(can_generate and can_generate())


def _no_masked_head(model: Any) -> ValueError:
    return ValueError(
        f'metric="prob" needs a masked-language-model head; {type(model).__name__} has none: use '
        '"dist" or "cos"'
    )


class _Probe:
    """What is read of a unit (its tokens' log-probability, or its mean vector), and how far two
    readings are apart."""

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        types: Tensor | None,
        units: list[Sequence[int]],
        metric: str,
        layer: int,
    ) -> None:
        self.model, self.ids, self.types, self.units = model, ids, types, units
        self.metric, self.layer = metric, layer

    def read(self, masked: Tensor, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        """Readings of both units of each pair from one batch of inputs without both."""
        output = self._run(masked)
        wanted = [(row, i, j) for row, pair in enumerate(pairs) for i, j in (pair, pair[::-1])]
        return {(i, j): self._of_unit(output[row], i) for row, i, j in wanted}

    def distance(self, alone: Tensor, together: Tensor) -> float:
        """From the reading without unit i to that without i and j."""
        if self.metric == "prob":
            return float(alone - together)
        if self.metric == "dist":
            return float(torch.linalg.vector_norm(alone - together))
        return float(1 - nn.functional.cosine_similarity(alone, together, dim=0))

    def _run(self, masked: Tensor) -> Tensor:
        inputs = {"input_ids": masked, "attention_mask": torch.ones_like(masked)}
        if self.types is not None:
            inputs["token_type_ids"] = self.types.expand_as(masked)
        if self.metric != "prob":
            hidden: Tensor = self.model(**inputs, output_hidden_states=True).hidden_states[
                self.layer
            ]
            return hidden
        logits = getattr(self.model(**inputs), "logits", None)
        vocabulary = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if logits is None or logits.ndim != 3 or vocabulary not in (None, logits.shape[-1]):
            raise _no_masked_head(self.model)
        truth = self.ids.expand_as(masked)[..., None]
        own: Tensor = logits.gather(-1, truth)[..., 0] - logits.logsumexp(-1)
        return own

    def _of_unit(self, output: Tensor, unit: int) -> Tensor:
        values = output[self.units[unit]].double()
        return values.sum(0) if self.metric == "prob" else values.mean(0)


@dataclass(frozen=True)
class Agreement:
    """How alike two impact matrices are, over their off-diagonal entries.

    Attributes:
        spearman, kendall: rank correlations.
        top: the share of rows whose largest entry is at the same place, among those that have one
            largest entry in both; NaN if there are none.
    """

    spearman: float
    kendall: float
    top: float


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """Compare two models' impact matrices (n, n) of the same text.

    Raises:
        ValueError: shapes that differ, empty matrices, or such with NaN (made with ``band``).
    """
    shape = list(first.shape)
    if first.shape != second.shape or len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(
            f"two square matrices of one shape are needed; got {list(first.shape)} "
            f"and {list(second.shape)}"
        )
    if first.isnan().any() or second.isnan().any():
        raise ValueError("the matrices have NaN entries: compute them without band=")
    off_diagonal = ~torch.eye(len(first), dtype=torch.bool)
    a, b = first[off_diagonal], second[off_diagonal]
    (best_a, clear_a), (best_b, clear_b) = (
        _largest(x.masked_fill(~off_diagonal, -torch.inf)) for x in (first, second)
    )
    same = (best_a == best_b)[clear_a & clear_b]  # the mean of none is NaN
    return Agreement(spearman(a, b), kendall(a, b), float(same.double().mean()))


def _largest(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each row's largest entry, and whether it is the only one as large."""
    largest, place = matrix.max(1)
    return place, (matrix == largest[:, None]).sum(1).eq(1) & largest.isfinite()
