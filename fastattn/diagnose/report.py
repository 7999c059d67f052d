"""Everything that two models say of some texts, as one plain dict: what ``diagnose.json`` holds.

The page is drawn from the dict alone, so it can be drawn again without the models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.diagnose.attribution import Attribution
from fastattn.diagnose.comparison import TOP, Pair, compare
from fastattn.diagnose.impact import agreement, impact_matrix
from fastattn.diagnose.texts import Text, encode
from fastattn.models.marks import is_linear
from fastattn.recipes.data import read_texts
from fastattn.recipes.errors import ModelError
from fastattn.recipes.measure import measure
from fastattn.recipes.models import is_fine_tuned, load_config, load_model, load_tokenizer
from fastattn.recipes.progress import progress
from fastattn.recipes.report import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = dict[str, Any]
TOKENS = 48  # read of a text: a matrix of more can't be looked at, and costs T^2 / 2 passes


def diagnose(
    original: Path,
    patched: Path,
    data: Path,
    *,
    rows: int = 8,
    baseline: str = "pad",
    points: int = 100,
    metric: str = "dist",
    max_length: int = TOKENS,
    lengths: Sequence[int] = (),
    seed: int = 0,
) -> Report:
    """Compare the checkpoints in two folders on ``rows`` texts of ``data``, drawn with ``seed``.

    Args:
        metric: of the impact matrices, or "none" for no matrices.
        lengths: input lengths to measure time and memory at.

    The other arguments are those of ``compare``.

    Raises:
        DataError, ModelError: what can't be used, and why.
        ModuleNotFoundError: a package of the extra "diagnose" is missing.
    """
    texts = read_texts(data)
    chosen = random.Random(seed).sample(texts, min(rows, len(texts)))
    models = {"original": _load(original), "patched": _load(patched)}
    tokenizer = load_tokenizer(original)
    if tokenizer.get_vocab() != load_tokenizer(patched).get_vocab():
        raise ModelError(f"the tokenizers of {original} and {patched} differ")
    if metric != "none" and tokenizer.mask_token_id is None:
        raise ModelError("the tokenizer has no mask token, which impact matrices need")
    entries = []
    objective = ""
    with progress("Comparing", len(chosen)) as advance:
        for text in chosen:
            options: Any = {"baseline": baseline, "points": points, "max_length": max_length}
            try:
                comparison = compare(
                    models["original"], models["patched"], tokenizer, [text], **options
                )
            except ValueError as error:
                raise ModelError(str(error)) from error
            objective, pair = comparison.objective, comparison.pairs[0]
            entry = _entry(pair)
            if metric != "none":
                entry["impact"] = _impact(models, tokenizer, text, metric, max_length)
            entries.append(entry)
            advance(1, f"rank correlation {pair.spearman:.2f}")
    folders = {"original": original, "patched": patched}
    return {
        "models": {name: str(folder) for name, folder in folders.items()},
        "machine": machine(),
        "settings": {
            "data": str(data), "rows": len(chosen), "baseline": baseline, "points": points,
            "metric": metric, "max_length": max_length, "seed": seed, "objective": objective,
        },
        "summary": _summary(entries),
        "texts": entries,
        "measurements": measure(folders, lengths) if lengths else [],
    }  # fmt: skip


def _load(folder: Path) -> PreTrainedModel:
    """The classifier or masked language model in ``folder``, or the encoder where it has neither
    head."""
    from transformers import AutoModel, AutoModelForMaskedLM

    import fastattn

    config = load_config(folder)
    if is_fine_tuned(config):
        model: PreTrainedModel = load_model(folder)
        return model.eval()  # type: ignore[no-any-return]
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    softmax = AutoModelForMaskedLM if masked else AutoModel
    try:
        found: Any = fastattn.load(folder) if is_linear(config) else softmax.from_pretrained(folder)
        return (found if masked else found.base_model).eval()  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise ModelError(f"can't load the model in {folder}: {error}") from error


def _entry(pair: Pair) -> dict[str, Any]:
    return {
        "text": pair.text,
        "tokens": pair.original.tokens,
        "special": pair.original.special,
        "original": _scores(pair.original),
        "patched": _scores(pair.patched),
        "spearman": _number(pair.spearman),
        "kendall": _number(pair.kendall),
        "top_overlap": _number(pair.top_overlap),
        "top": TOP,
        "impact": None,
    }


def _scores(found: Attribution) -> dict[str, Any]:
    return {
        "scores": [round(score, 8) for score in found.scores.tolist()],
        "output": found.output,
        "baseline_output": found.baseline_output,
        "gap": found.gap,
    }


def _impact(
    models: dict[str, PreTrainedModel], tokenizer: Any, text: Text, metric: str, max_length: int
) -> dict[str, Any]:
    """Matrices over the tokens that are not special, and how alike they are."""
    inputs, special = encode(models["original"], tokenizer, text, max_length)
    ids = inputs["input_ids"][0]
    words = [[i] for i, is_special in enumerate(special) if not is_special]
    options: dict[str, Any] = {
        "metric": metric, "spans": words, "token_type_ids": inputs.get("token_type_ids"),
    }  # fmt: skip
    try:
        found = {
            name: impact_matrix(model, ids, tokenizer.mask_token_id, **options)
            for name, model in models.items()
        }
    except ValueError as error:
        raise ModelError(str(error)) from error
    alike = asdict(agreement(*found.values()))
    return {
        "tokens": [tokenizer.convert_ids_to_tokens(int(ids[i])) for (i,) in words],
        **{name: [[round(x, 5) for x in row] for row in m.tolist()] for name, m in found.items()},
        **{name: _number(value) for name, value in alike.items()},
    }


def _summary(entries: list[dict[str, Any]]) -> dict[str, float | None]:
    def mean(values: list[float | None]) -> float | None:
        defined = [value for value in values if value is not None]
        return sum(defined) / len(defined) if defined else None

    impacts = [entry["impact"] for entry in entries if entry["impact"]]
    outputs = [abs(e["original"]["output"] - e["patched"]["output"]) for e in entries]
    return {
        "spearman": mean([entry["spearman"] for entry in entries]),
        "kendall": mean([entry["kendall"] for entry in entries]),
        "top_overlap": mean([entry["top_overlap"] for entry in entries]),
        "output_difference": mean(outputs),
        "impact_spearman": mean([impact["spearman"] for impact in impacts]),
        "impact_top": mean([impact["top"] for impact in impacts]),
        "gap_original": max(entry["original"]["gap"] for entry in entries),
        "gap_patched": max(entry["patched"]["gap"] for entry in entries),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value
