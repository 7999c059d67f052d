"""Integrated gradients: which tokens an output comes from, with a check that nothing is missing.

Attributions of a path from a baseline x' to the input x add up to F(x) - F(x') (completeness). The
sum is a number anyone can check, and it only comes out if every backward kernel on the way is
right: a gap is a wrong gradient before it is anything else.

Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", 2017,
https://arxiv.org/abs/1703.01365. Captum (an extra: ``pip install 'fastattn[diagnose]'``) walks the
path; the quadrature is Gauss-Legendre.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.diagnose.texts import Text, check_texts, encode, evaluating, forward

Objective = Callable[[Any, Tensor], Tensor]
BASELINES = ("pad", "mask", "zero")
TOKENS_PER_CHUNK = 4096


@dataclass(frozen=True)
class Attribution:
    """One text's attributions.

    Attributes:
        tokens: the T tokens as the tokenizer spells them, special tokens included.
        special: for each token, whether the tokenizer added it.
        scores: (T,) float64, signed; what each token adds to the output.
        output, baseline_output: F(x) and F(x').
    """

    tokens: list[str]
    special: list[bool]
    scores: Tensor
    output: float
    baseline_output: float

    @property
    def change(self) -> float:
        """F(x) - F(x'), what the scores should add up to."""
        return self.output - self.baseline_output

    @property
    def gap(self) -> float:
        """|sum of scores - change| / |change|: the completeness gap."""
        return abs(float(self.scores.sum()) - self.change) / max(abs(self.change), 1e-300)

    @property
    def word_scores(self) -> Tensor:
        """The scores of the tokens that are not special."""
        return self.scores[~torch.tensor(self.special)]


def attribute(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    objective: Objective | None = None,
    target: int | Sequence[int] | None = None,
    baseline: str = "pad",
    points: int = 100,
    max_length: int | None = None,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
) -> list[Attribution]:
    """Integrated gradients of an output with respect to the embeddings of the tokens.

    The path runs from the baseline's word embeddings to the text's; the padding mask, positions
    and token types are those of the text all along. A token's score is the signed sum over its
    embedding, so the scores of a text add up to the change of the output. Attribute logits or
    cosines: probabilities saturate.

    Args:
        model: a transformers encoder or classifier, on any device; runs in evaluation mode.
        tokenizer: its tokenizer.
        texts: strings, or pairs of strings.
        objective: ``objective(outputs, attention_mask)`` gives (rows,), the value F to attribute:
            see ``similarity_to``. By default the logit of ``target``.
        target: the class whose logit is attributed, one for all texts or one for each; by default
            the class that ``model`` predicts.
        baseline: "pad" or "mask": each token but the special ones becomes the padding or mask
            token; "zero": all embeddings are 0, as in the paper.
        points: nodes of the Gauss-Legendre rule on the path.
        max_length: tokens that are read of a text; None reads all.
        tokens_per_chunk: tokens (points x length) in one forward and backward pass.

    Raises:
        ModuleNotFoundError: captum is not installed; names the extra that brings it.
        TypeError: one string in place of several.
        ValueError: an unknown baseline, a baseline token that the tokenizer lacks, a target out
            of range, no points, or a model without logits and no objective.
    """
    check_texts(texts)
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}; got {baseline!r}")
    if objective is not None and target is not None:
        raise ValueError("give an objective or a target, not both")
    if isinstance(target, Sequence) and len(target) != len(texts):
        raise ValueError(f"target has {len(target)} classes for {len(texts)} texts")
    attributions = []
    with evaluating(model):
        for row, text in enumerate(texts):
            inputs, special = encode(model, tokenizer, text, max_length)
            embeddings, start = _path_ends(model, tokenizer, inputs, special, baseline)
            chosen = target[row] if isinstance(target, Sequence) else target
            value = objective or _class_logit(model, inputs, chosen)

            def at(embedded: Tensor, inputs: Any = inputs, value: Objective = value) -> Tensor:
                outputs, mask = forward(model, inputs, embedded)
                return value(outputs, mask)

            with torch.no_grad():
                output, baseline_output = (float(at(x)) for x in (embeddings, start))
            chunk = max(1, tokens_per_chunk // embeddings.shape[1])
            gradients = integrated_gradients(at, embeddings, start, points=points, chunk=chunk)
            ids = inputs["input_ids"][0].tolist()
            attributions.append(
                Attribution(
                    tokens=tokenizer.convert_ids_to_tokens(ids),
                    special=special,
                    scores=gradients[0].double().sum(-1).cpu(),
                    output=output,
                    baseline_output=baseline_output,
                )
            )
    return attributions


def similarity_to(reference: Tensor) -> Objective:
    """The objective for an encoder without a head: the cosine of its mean-pooled last hidden state
    with ``reference`` (D,)."""

    def objective(outputs: Any, mask: Tensor) -> Tensor:
        embedding = mean_pooled(outputs.last_hidden_state, mask)
        return nn.functional.cosine_similarity(embedding, reference.to(embedding), dim=-1)

    return objective


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, D) of ``hidden`` (B, T, D) over the tokens that ``mask`` (B, T) keeps."""
    kept = mask.to(hidden)[..., None]
    return (hidden * kept).sum(1) / kept.sum(1)


def integrated_gradients(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    baseline: Tensor,
    *,
    points: int = 100,
    chunk: int | None = None,
) -> Tensor:
    """IG_i = (x_i - x'_i) times the mean of dF/dx_i over the straight line from x' to x.

    Args:
        function: F, maps (rows, ...) to (rows,); a row's value depends on that row alone.
        inputs: x (B, ...), floating point.
        baseline: x', of the same shape.
        points: nodes of the Gauss-Legendre rule, exact for F a polynomial of degree 2 points.
        chunk: rows in one call of ``function``; None: all B x points at once.

    Returns:
        (B, ...), in the dtype of ``inputs``; the weights of the rule are exact in it.
    """
    if points < 1:
        raise ValueError(f"points must be at least 1; got {points}")
    if inputs.shape != baseline.shape:
        raise ValueError(
            f"baseline must have the shape of inputs, {tuple(inputs.shape)}; "
            f"got {tuple(baseline.shape)}"
        )
    walker = _walker(function)
    rows = None if chunk is None else max(chunk, len(inputs))
    result: Tensor = walker.attribute(
        inputs, baselines=baseline, n_steps=points, internal_batch_size=rows
    )
    return result


def _walker(function: Callable[[Tensor], Tensor]) -> Any:
    """Captum's integrated gradients, with weights in the dtype of the gradients: its own are
    rounded to float32, which costs seven digits in float64."""
    try:
        from captum._utils.gradient import compute_gradients
        from captum.attr import IntegratedGradients
        from captum.attr._utils.approximation_methods import approximation_parameters
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"attribution needs {error.name}: pip install 'fastattn[diagnose]'", name=error.name
        ) from error

    rule = approximation_parameters("gausslegendre")

    class Walker(IntegratedGradients):  # type: ignore[misc]
        def _attribute(
            self, inputs: Any, *args: Any, step_sizes_and_alphas: Any = None, **kwargs: Any
        ) -> Any:
            points = kwargs["n_steps"]
            weights, alphas = step_sizes_and_alphas or (rule[0](points), rule[1](points))

            def weighted(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
                gradients = compute_gradients(*args, **kwargs)
                return tuple(
                    g * _each_point(weights, g).repeat_interleave(len(g) // points, 0)
                    for g in gradients
                )

            self.gradient_func = weighted
            return super()._attribute(
                inputs, *args, step_sizes_and_alphas=([1.0] * points, alphas), **kwargs
            )

    return Walker(function)


def _each_point(weights: list[float], like: Tensor) -> Tensor:
    """The weights as (points, 1, ...), to multiply gradients with."""
    return torch.tensor(weights, dtype=like.dtype, device=like.device).view(
        -1, *[1] * (like.ndim - 1)
    )


def _path_ends(
    model: Any, tokenizer: Any, inputs: dict[str, Tensor], special: list[bool], baseline: str
) -> tuple[Tensor, Tensor]:
    """Word embeddings (1, T, D) of the text and of its baseline."""
    embed = model.get_input_embeddings()
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeddings = embed(ids)
        if baseline == "zero":
            return embeddings, torch.zeros_like(embeddings)
        token = tokenizer.pad_token_id if baseline == "pad" else tokenizer.mask_token_id
        if token is None:
            raise ValueError(f"baseline={baseline!r}: the tokenizer has no {baseline} token")
        keep = torch.tensor([special], device=ids.device)
        return embeddings, embed(torch.where(keep, ids, token))


def _class_logit(model: nn.Module, inputs: dict[str, Tensor], target: int | None) -> Objective:
    """The logit of ``target``, or of the class that ``model`` predicts."""
    with torch.no_grad():
        logits = getattr(forward(model, inputs)[0], "logits", None)
    if logits is None or logits.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} gives no class logits: say what to attribute with "
            "objective=, for example similarity_to(a sentence's embedding)"
        )
    chosen = int(logits.argmax(-1)) if target is None else target
    if not 0 <= chosen < logits.shape[-1]:
        raise ValueError(f"target must be within 0..{logits.shape[-1] - 1}; got {chosen}")
    return lambda outputs, mask: outputs.logits[:, chosen]
