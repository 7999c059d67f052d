"""What a run of ``linearize`` or ``compress`` is asked to do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fastattn.models.marks import is_linear
from fastattn.models.positions import position_limit
from fastattn.recipes.errors import ModelError
from fastattn.recipes.models import is_fine_tuned, tokenizer_files, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_TOKENS = 2**20  # of one text: beyond that the positions alone take gigabytes


@dataclass(frozen=True)
class Arguments:
    """What a run is asked to do; the results depend on nothing else.

    max_length: tokens the softmax model reads of a text; None: what it has positions for, at
    most 512. extend_to: tokens the linear model reads, with its positions extended; None: the
    same. layers: indices of the layers to make linear; None: all. fine_tune: whether to fine-tune
    the softmax model; None: if it has no trained head. schedule: of replacing, with its base; see
    ``theseus.schedules.make_schedule``. match: weight of the loss on the outputs of what is
    replaced. hidden: weight of the loss on hidden states in distillation. change: ask the softmax
    model about changed texts, too. batch_size: rows a step; None: 8 to 64 by the length of the
    texts. lengths: input lengths to measure. The epochs, if None, are those of
    ``default_epochs``, and more where the data are so few that these would be a few hundred
    steps.
    """

    model: Path
    train: Path
    dev: Path
    feature_map: str = "hedgehog"
    layers: tuple[int, ...] | None = None
    max_length: int | None = None
    extend_to: int | None = None
    train_limit: int | None = None
    fine_tune: bool | None = None
    fine_tune_epochs: float | None = None
    transfer_epochs: float | None = None
    replace_epochs: float | None = 0.0
    distill_epochs: float | None = None
    fine_tune_rate: float = 1e-4
    transfer_rate: float = 2e-2
    replace_rate: float = 1e-4
    distill_rate: float = 7e-5
    schedule: str = "linear"
    base: float = 0.5
    match: float = 1.0
    change: bool = False
    hidden: float = 0.0
    batch_size: int | None = None
    bf16: bool = False
    seed: int = 0
    lengths: tuple[int, ...] = ()
    default_epochs: ClassVar[dict[str, float]] = {
        "fine_tune": 3.0, "transfer": 2.0, "replace": 2.0, "distill": 2.0,
    }  # fmt: skip

    @property
    def student_length(self) -> int:
        """Tokens the linear model reads; needs ``max_length`` to be settled."""
        assert self.max_length is not None
        return max(self.max_length, self.extend_to or 0)


ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


def settle(arguments: ArgumentsT, config: PretrainedConfig) -> tuple[ArgumentsT, bool]:
    """Arguments with the lengths filled in and checked, and whether to fine-tune."""
    if is_linear(config):
        raise ModelError(f"{arguments.model} has linear attention already")
    fine_tune = arguments.fine_tune
    if fine_tune is None:
        fine_tune = not is_fine_tuned(config)
    elif not fine_tune and not is_fine_tuned(config):
        raise ModelError(
            f"{arguments.model} has no classification head (it is a "
            f"{', '.join(config.architectures or ['model of unknown class'])}), "
            "so it must be fine-tuned first: leave out --no-fine-tune"
        )
    limit = position_limit(config)
    max_length = arguments.max_length or min(512, limit or 512)
    if limit is not None and max_length > limit:
        raise ModelError(
            f"max_length {max_length} is more than the {limit} positions of {arguments.model}; "
            "for the linear model to read more, give --extend-to"
        )
    extend_to = arguments.extend_to
    if extend_to is not None and not max_length <= extend_to <= MOST_TOKENS:
        raise ModelError(
            f"--extend-to must be at least {max_length}, what the softmax model reads, and at most "
            f"{MOST_TOKENS}; got {extend_to}"
        )
    return replace(arguments, max_length=max_length), fine_tune


def fingerprint(arguments: Arguments) -> dict[str, Any]:
    """The arguments with a digest of each file: a changed file is other data. Without the lengths
    to measure at, which no training depends on."""
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, path in (
            ("train sha256", arguments.train),
            ("dev sha256", arguments.dev),
            ("config.json sha256", arguments.model / "config.json"),
        )
    }
    asked = as_json(arguments)
    del asked["lengths"]
    digests["tokenizer sha256"] = _digest(tokenizer_files(arguments.model))
    return {**asked, **digests, "weights sha256": weights_digest(arguments.model)}


def weights_digest(folder: Path) -> str:
    """Of all files of weights in a model's folder: changed weights are another model."""
    return _digest(weight_files(folder))


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def as_json(arguments: Arguments) -> dict[str, Any]:
    fields = asdict(arguments)
    return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in fields.items()}
